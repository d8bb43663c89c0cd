"""`Calibration`: a strength, what it rests on, and its file beside the adapter."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from svdecode.common.files import plain
from svdecode.constants import DIRECTIONS, PENALTY, Direction
from svdecode.ops.setting import Setting
from svdecode.strength import storage
from svdecode.strength.bootstrap import bootstrap_estimates, cross_fitted_gain, gain, interval
from svdecode.strength.cautions import about_judges, about_strength, few
from svdecode.strength.estimators import ESTIMATORS
from svdecode.strength.figure import plot_calibration
from svdecode.strength.storage import FILE_NAME, TOKENS_NAME
from svdecode.strength.token_statistics import TokenStatistics
from svdecode.strength.verdict import verdict_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SELECTED = "selected"
"""The name among the estimates of a strength that was chosen by a task's metric."""

# Calibrations that this process has saved or loaded, by the fingerprint of their adapter: peft does not record the folder
# that an adapter came from, so "beside the adapter" is found through the adapter's weights.
_SAVED: dict[str, Calibration] = {}
_PARTS = ("tokens", "held_out_tokens")
_NOT_IN_JSON = (*_PARTS, "judged")


@dataclass(repr=False)
class Calibration:
    """A calibrated strength and what it rests on. NLL, gains and KL are in nats per token; intervals are of 95%."""

    mu: float
    """The strength of the chosen estimator."""
    estimator: str
    """Which of `estimates` `mu` is."""
    estimates: dict[str, float]
    """Every estimator's strength (see `svdecode.strength.estimators`), and "selected" where a metric chose."""
    alpha: float
    direction: Direction
    coverage: float
    """Share of gold tokens inside the kept set; with a penalty of -inf the others have an infinite NLL and are left out."""
    num_tokens: int
    """Gold tokens seen."""
    mean_kl: float
    """Mean KL(p_ft || p_pre)."""
    kept: float
    """Mean size of the kept set."""
    mu_star_quantiles: dict[str, float]
    """The spread of the tokens' own optimal strengths, which is heavy-tailed."""
    adapter: str | None = None
    """Fingerprint of the adapter's weights."""
    num_sequences: int | None = None
    """Examples with a gold token: what the bootstrap resamples."""
    intervals: dict[str, list[float]] = field(default_factory=dict)
    """Bootstrap interval of each estimate; none with a single sequence."""
    gains: dict[str, dict] = field(default_factory=dict)
    """NLL at 0 minus NLL at `mu` (`svdecode.strength.bootstrap.gain`), by kind: "calibration", which the choice of mu flatters,
    and "held_out" or "cross_fitted", which it does not."""
    bytes_per_token: float | None = None
    """What one gold token took in memory, with its share of its sequence's curve."""
    data: str | None = None
    """SHA-256 of the token ids and labels."""
    held_out_data: str | None = None
    prompts: list[str] = field(default_factory=list)
    """`svdecode.data.splits.prompt_key` of each calibration text, by which data that judge mu are known again."""
    cautions: list[dict[str, str]] = field(default_factory=list)
    """What the strength cannot show, {"code", "text"} each: see `svdecode.strength.cautions`."""
    penalty: float | None = None
    """The penalty that `mu` was found for or selected with; None is -inf, and `steer` may take another."""
    exact_error: float | None = None
    """How far `exact` may be off, as an estimate (`svdecode.strength.nll_curve.NLLCurve.error`)."""
    table: list[dict] = field(default_factory=list)
    """The fair table (`svdecode.strength.fair_table`): what else could be done with the warm start, and what it gains."""
    recommendation: dict | None = None
    """What to do by that table: "use", "text" and "row"."""
    judged: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """By the table's names, (S, 2) float64: the NLL of each judged sequence, and how many tokens that is; not saved."""
    selection: dict | None = None
    """What `--select` compared (see `svdecode.calibration.selection`)."""
    tokens: TokenStatistics | None = field(default=None, repr=False)
    """The statistics of each token, for `curve` and `plot`."""
    held_out_tokens: TokenStatistics | None = field(default=None, repr=False)

    @classmethod
    def from_tokens(
        cls,
        tokens: TokenStatistics,
        *,
        estimator: str,
        alpha: float,
        direction: Direction,
        adapter: str | None = None,
        held_out: TokenStatistics | None = None,
        selected: float | None = None,
        seen_again: int = 0,
        seed: int = 0,
        **more: Any,
    ) -> Calibration:
        """Estimate all strengths, intervals and gains from token statistics.

        Args:
            tokens: of the calibration data.
            estimator: whose strength is `mu`, unless there is a `selected` one.
            alpha: as the tokens were collected, like `direction` and `adapter`.
            direction: see `alpha`.
            adapter: see `alpha`.
            held_out: tokens of data that took no part in the choice; None measures the gain by cross-fitting.
            selected: a strength that a metric chose.
            seen_again: how many of the held-out sequences are calibration data too.
            seed: of the bootstrap and the halves.
            more: other fields.
        """
        for which, some in {"": tokens, " of held_out": held_out}.items():
            if some is not None and not bool(some.curve.scored.any()):
                raise ValueError(
                    f"no gold token{which} is inside the kept set at alpha={alpha}: calibrate with a smaller alpha"
                )
        estimates = {name: function(tokens) for name, function in ESTIMATORS.items()}
        if selected is not None:
            estimates[SELECTED], estimator = selected, SELECTED
        mu = estimates[estimator]
        num_sequences = len(tokens.curve)
        gains = {"calibration": gain(tokens, mu, seed)}
        intervals = {}
        if num_sequences > 1:
            intervals = {name: list(interval(draws)) for name, draws in bootstrap_estimates(tokens, seed).items()}
        if held_out is not None:
            gains["held_out"] = gain(held_out, mu, seed)
        elif num_sequences > 1 and selected is None:
            crossed = cross_fitted_gain(tokens, estimator, seed)
            gains |= {} if crossed is None else {"cross_fitted": crossed}
        levels = torch.tensor(QUANTILES, dtype=torch.float64)
        quantiles = torch.quantile(tokens.gold.mu_star.double(), levels).tolist()
        found = cls(
            mu=mu,
            estimator=estimator,
            estimates=estimates,
            alpha=alpha,
            direction=direction,
            coverage=tokens.coverage,
            num_tokens=len(tokens),
            mean_kl=tokens.gold.kl.double().mean().item(),
            kept=tokens.gold.num_kept.double().mean().item(),
            mu_star_quantiles={str(level): value for level, value in zip(QUANTILES, quantiles, strict=True)},
            adapter=adapter,
            num_sequences=num_sequences,
            intervals=intervals,
            gains=gains,
            bytes_per_token=tokens.bytes / len(tokens),
            exact_error=tokens.curve.error(),
            tokens=tokens,
            held_out_tokens=held_out,
            **more,
        )
        judges = 0 if held_out is None else len(held_out.curve)
        found.cautions = [
            *about_strength(found),
            *few(num_sequences, "sequences"),
            *about_judges(seen_again, judges, "held-out sequences"),
        ]
        return found

    def curve(self, mus: Iterable[float], *, held_out: bool = False) -> Tensor:
        """(M,) float64: mean NLL of the scored gold tokens at each strength, of the calibration or the held-out data."""
        tokens = self.held_out_tokens if held_out else self.tokens
        if tokens is None:
            which = "held-out tokens" if held_out else f"its tokens ({TOKENS_NAME} is missing, or another's)"
            raise ValueError(f"this calibration was loaded without {which}: calibrate again")
        return torch.tensor([tokens.curve.mean(mu) for mu in mus], dtype=torch.float64)

    def plot(self, path: str | Path | None = None) -> Figure:
        """Which mu, how sure, does it help, as a figure, which a notebook shows: see `svdecode.plot_calibration`.

        Args:
            path: a file to write, in the format of its ending (.png, .svg, .pdf); None writes nothing.

        Raises:
            ValueError: a calibration without its tokens, or an unknown ending.
            ImportError: matplotlib is missing.
        """
        return plot_calibration(self, path)

    def __repr__(self) -> str:
        """The strength and its settings, one line."""
        setting = f"mu={self.mu:.4g} ({self.estimator}), alpha={self.alpha:g}, direction={self.direction!r}"
        penalty = "" if self.penalty is None else f", penalty={self.penalty:g}"
        return f"Calibration({setting}{penalty}, {self.num_tokens} tokens, coverage={self.coverage:.3f})"

    @property
    def setting(self) -> Setting:
        """The strength with the alpha, penalty and direction that it holds for."""
        return Setting(self.mu, self.alpha, PENALTY if self.penalty is None else self.penalty, self.direction)

    def setting_for(
        self,
        fingerprint: str | None,
        *,
        alpha: float | None = None,
        penalty: float | None = None,
        direction: str | None = None,
    ) -> Setting:
        """The setting for an adapter; what is named explicitly must be what the strength was found with.

        Args:
            fingerprint: of the adapter's weights; None for a model without one.
            alpha: None follows the calibration.
            penalty: None follows the calibration; another one is refused only where mu was found for one.
            direction: None follows the calibration.

        Raises:
            ValueError: made for another adapter, or with other settings.
        """
        if fingerprint is None and self.adapter is not None:
            raise ValueError(
                f"mu was calibrated for an adapter (weights {self.adapter[:12]}), and the model is not a PeftModel that has "
                "it: calibrate these models, or pass a number"
            )
        if fingerprint is not None and self.adapter not in (None, fingerprint):
            raise ValueError(
                f"mu was calibrated for another adapter (weights {self.adapter[:12]}, the model's are {fingerprint[:12]}): "
                "calibrate this one, or pass a number"
            )
        given = {"alpha": (alpha, self.alpha), "direction": (direction, self.direction)}
        if self.penalty is not None:
            given["penalty"] = (penalty, self.penalty)
        for name, (value, own) in given.items():
            if value is not None and value != own:
                raise ValueError(
                    f"mu was calibrated with {name}={own!r}, not with {name}={value!r}: "
                    f"leave {name} out, or pass a number as mu"
                )
        return self.setting if penalty is None else self.setting._replace(penalty=penalty)

    def verdict(self) -> str:
        """One sentence: whether a gain is shown, on data that did not choose the setting, and how large it is."""
        return verdict_of(self)

    def to_dict(self) -> dict[str, Any]:
        """Every field but the tokens, fit for JSON (`svdecode.common.files.plain`)."""
        return plain({name: value for name, value in vars(self).items() if name not in _NOT_IN_JSON})

    def save_pretrained(self, folder: str | Path) -> None:
        """Write svdecode.json (and the token statistics as safetensors) into the adapter's folder, each atomically."""
        parts = {part: getattr(self, part) for part in _PARTS if getattr(self, part) is not None}
        storage.save(Path(folder), self.to_dict(), parts)
        self._remember()

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Calibration:
        """Read what `save_pretrained` wrote; ValueError says what is missing or wrong."""
        path = Path(folder) / FILE_NAME
        if not path.exists():
            raise ValueError(f"no calibration in {folder}: {FILE_NAME} is missing (svdecode calibrate writes it)")
        values, parts = storage.load(path.parent, cls, _NOT_IN_JSON)
        try:
            calibration = cls(**values, **parts)
            calibration._validate()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is not a calibration: {error}") from None
        calibration._remember()
        return calibration

    def _validate(self) -> None:
        self.mean_kl = float(self.mean_kl)
        self.penalty = None if self.penalty is None else float(self.penalty)
        sound = (
            self.direction in DIRECTIONS and math.isfinite(self.mu) and self.estimates.get(self.estimator) == self.mu
        )
        sound &= 0 <= self.alpha <= 1 and 0 < self.coverage <= 1 and self.num_tokens > 0
        sound &= self.penalty is None or self.penalty <= 0
        if not sound or not all(len(pair) == 2 for pair in self.intervals.values()):
            raise ValueError("values contradict each other")

    def _remember(self) -> None:
        if self.adapter is not None:
            _SAVED[self.adapter] = self


def saved_calibration(fingerprint: str | None) -> Calibration:
    """The calibration that was saved or loaded for an adapter in this process; ValueError where there is none."""
    if fingerprint is None or fingerprint not in _SAVED:
        raise ValueError(
            "mu is missing and no calibration is known for this adapter: pass mu=, or "
            "mu=svdecode.Calibration.from_pretrained(ADAPTER_FOLDER)"
        )
    return _SAVED[fingerprint]
