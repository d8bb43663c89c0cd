"""`calibrate`: one constant strength for decoding, from gold tokens, and `Calibration`, the file beside the adapter."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from svdecode import calibration_file, validation
from svdecode.bootstrap import bootstrap_estimates, cross_fitted_gain, gain, interval
from svdecode.calibration_file import FILE_NAME, TOKENS_NAME
from svdecode.collection import collect, collect_tokens
from svdecode.constants import ALPHA, DIRECTIONS, KL
from svdecode.estimators import ESTIMATORS
from svdecode.token_statistics import TokenStatistics, token_statistics

__all__ = ["Calibration", "calibrate", "collect_tokens", "saved_calibration", "token_statistics"]

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SELECTED = "selected"
"""The name among the estimates of a strength that was chosen by a task's metric."""

# Calibrations that this process has saved or loaded, by the fingerprint of their adapter: peft does not record the folder
# that an adapter came from, so "beside the adapter" is found through the adapter's weights.
_SAVED: dict[str, Calibration] = {}
_PARTS = ("tokens", "held_out_tokens")


@dataclass
class Calibration:
    """A calibrated strength and what it rests on. NLL, gains and KL in nats a token; intervals are of 95%."""

    mu: float
    """The strength of the chosen estimator."""
    estimator: str
    """Which of `estimates` `mu` is."""
    estimates: dict[str, float]
    """Every estimator's strength (see `svdecode.estimators`), and "selected" where a metric chose."""
    alpha: float
    direction: str
    coverage: float
    """Share of gold tokens inside the kept set; the others have an infinite NLL at every mu and are left out of `exact`."""
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
    """NLL at 0 minus NLL at `mu` (`svdecode.bootstrap.gain`): "calibration", which the choice of mu flatters, and "held_out" or
    "cross_fitted", which it does not."""
    bytes_per_token: float | None = None
    """What a gold token took in memory: 44 bytes, and 8 for each token of its kept set."""
    data: str | None = None
    """SHA-256 of the token ids and labels."""
    held_out_data: str | None = None
    penalty: float | None = None
    """The penalty that was selected with `mu`; None where any will do."""
    selection: dict | None = None
    """What `--select` compared (see `svdecode.selection`)."""
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
        direction: str,
        adapter: str | None = None,
        held_out: TokenStatistics | None = None,
        selected: float | None = None,
        seed: int = 0,
        **more: object,
    ) -> Calibration:
        """Estimate everything from token statistics.

        Args:
            tokens: of the calibration data.
            estimator: whose strength is `mu`, unless there is a `selected` one.
            alpha: as the tokens were collected, like `direction` and `adapter`.
            direction: see `alpha`.
            adapter: see `alpha`.
            held_out: tokens of data that took no part in the choice; None measures the gain by cross-fitting.
            selected: a strength that a metric chose.
            seed: of the bootstrap and the halves.
            more: other fields.
        """
        for which, some in {"": tokens, " of held_out": held_out}.items():
            if some is not None and some.coverage == 0:
                raise ValueError(
                    f"no gold token{which} is inside the kept set at alpha={alpha}: calibrate with a smaller alpha"
                )
        estimates = {name: function(tokens) for name, function in ESTIMATORS.items()}
        if selected is not None:
            estimates[SELECTED], estimator = selected, SELECTED
        mu = estimates[estimator]
        num_sequences = len(tokens.sequence.unique())
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
        quantiles = torch.quantile(tokens.mu_star.double(), levels).tolist()
        return cls(
            mu=mu,
            estimator=estimator,
            estimates=estimates,
            alpha=alpha,
            direction=direction,
            coverage=tokens.coverage,
            num_tokens=len(tokens),
            mean_kl=tokens.kl.double().mean().item(),
            kept=tokens.num_kept.double().mean().item(),
            mu_star_quantiles={str(level): value for level, value in zip(QUANTILES, quantiles, strict=True)},
            adapter=adapter,
            num_sequences=num_sequences,
            intervals=intervals,
            gains=gains,
            bytes_per_token=tokens.bytes / len(tokens),
            tokens=tokens,
            held_out_tokens=held_out,
            **more,
        )

    def curve(self, mus: Iterable[float], *, held_out: bool = False) -> Tensor:
        """(M,) float64: mean NLL of the covered gold tokens at each strength, of the calibration or the held-out data."""
        tokens = self.held_out_tokens if held_out else self.tokens
        if tokens is None:
            which = "held-out tokens" if held_out else f"its tokens ({TOKENS_NAME} is missing, or another's)"
            raise ValueError(f"this calibration was loaded without {which}: calibrate again")
        return torch.tensor([tokens.derivatives(float(mu))[0] for mu in mus], dtype=torch.float64)

    def plot(self, path: str | Path) -> None:
        """Write a PNG: NLL over mu with every estimate and its interval, and the histogram of the tokens' own strengths."""
        from svdecode.plots import plot_calibration

        plot_calibration(self, path)

    def check(self, model: object, alpha: float, direction: str, penalty: float) -> None:
        """Raise ValueError unless this calibration was made for the model's adapter and these settings."""
        from svdecode.adapters import adapter_fingerprint

        if (self.alpha, self.direction) != (alpha, direction):
            raise ValueError(
                f"mu was calibrated with alpha={self.alpha} and direction={self.direction!r}, "
                f"not with alpha={alpha} and direction={direction!r}: pass the same, or a number"
            )
        if self.penalty is not None and self.penalty != penalty:
            raise ValueError(f"mu was selected with penalty={self.penalty}, not {penalty}: pass the same, or a number")
        fingerprint = adapter_fingerprint(model) if self.adapter is not None else None
        if fingerprint not in (None, self.adapter):
            raise ValueError(
                f"mu was calibrated for another adapter (weights {self.adapter[:12]}, the model's are {fingerprint[:12]}): "
                "calibrate this one, or pass a number"
            )

    def to_dict(self) -> dict[str, object]:
        """Every field but the tokens, fit for JSON: infinite numbers as "inf" and "-inf"."""
        return calibration_file.plain({name: value for name, value in vars(self).items() if name not in _PARTS})

    def save_pretrained(self, folder: str | Path) -> None:
        """Write svdecode.json (and the token statistics as safetensors) into the adapter's folder, each atomically."""
        parts = {part: getattr(self, part) for part in _PARTS if getattr(self, part) is not None}
        calibration_file.save(Path(folder), self.to_dict(), parts)
        self._remember()

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Calibration:
        """Read what `save_pretrained` wrote; ValueError says what is missing or wrong."""
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            raise ValueError(f"no calibration in {folder}: {FILE_NAME} is missing (svdecode calibrate writes it)")
        try:
            values, parts = calibration_file.load(path.parent, _PARTS)
            calibration = cls(**values, **parts)
            calibration._validate()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is not a calibration: {error}") from None
        calibration._remember()
        return calibration

    def _validate(self) -> None:
        self.mean_kl = float(self.mean_kl)
        self.penalty = None if self.penalty is None else float(self.penalty)
        sound = self.direction in DIRECTIONS and math.isfinite(self.mu) and self.estimates[self.estimator] == self.mu
        sound &= 0 <= self.alpha <= 1 and 0 < self.coverage <= 1 and self.num_tokens > 0
        sound &= self.penalty is None or self.penalty <= 0
        if not sound or not all(len(pair) == 2 for pair in self.intervals.values()):
            raise ValueError("values contradict each other")

    def _remember(self) -> None:
        if self.adapter is not None:
            _SAVED[self.adapter] = self


def saved_calibration(model: object) -> Calibration:
    """The calibration that was saved or loaded for the model's adapter in this process; ValueError where there is none."""
    from svdecode.adapters import adapter_fingerprint

    fingerprint = adapter_fingerprint(model)
    if fingerprint not in _SAVED:
        raise ValueError(
            "mu is missing and no calibration is known for this adapter: pass mu=, or "
            "mu=svdecode.Calibration.from_pretrained(ADAPTER_FOLDER)"
        )
    return _SAVED[fingerprint]


def calibrate(
    model: object,
    data: object,
    *,
    pretrained: object | None = None,
    tokenizer: object | None = None,
    estimator: str = "exact",
    alpha: float = ALPHA,
    direction: str = KL,
    batch_size: int = 8,
    progress: bool = True,
    held_out: object | None = None,
    select: str | None = None,
    max_length: int | None = None,
    seed: int = 0,
) -> Calibration:
    """Estimate the steering strength from gold tokens, with one forward of both models over the data.

    Processes started by accelerate or torchrun share the batches, and each gets the same result as one process alone would.

    Args:
        model: a PeftModel, or any causal LM together with `pretrained`; left as it was.
        data: examples as {"prompt", "completion"}: a list, a Dataset or any iterable of them, however long; or an iterable of
            batches with input_ids, attention_mask and labels (-100 ignored), each row of which is a sequence.
        pretrained: the pre-trained model, where it is not the one under the adapter.
        tokenizer: for texts; an end-of-sequence token is appended to each completion.
        estimator: which of `svdecode.estimators.ESTIMATORS` becomes `mu`; all are reported.
        alpha: confidence threshold in [0, 1]. Memory grows with the kept tokens, 8 bytes each, and 44 bytes a gold token.
        direction: "kl" or "log_ratio".
        batch_size: of texts.
        progress: show a bar on stderr.
        held_out: data of the same kinds that shows whether the strength helps; None judges each half of `data` by the other's.
        select: a metric of `svdecode.selection.METRICS` that chooses mu, alpha, penalty and direction, in place of `estimator`,
            `alpha` and `direction`; `data` must then be a list or a Dataset.
        max_length: longer texts are cut after so many tokens.
        seed: of the bootstrap and of the halves.

    Raises:
        ValueError: no data, no labelled token, no gold token inside the kept set, or what `steer` raises.
    """
    from svdecode.adapters import adapter_fingerprint

    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}")
    validation.check_settings(alpha, direction)
    models = dict(pretrained=pretrained, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)
    chosen = {}
    if select is not None:
        from svdecode.selection import select_settings

        found = select_settings(model, data, select, seed=seed, progress=progress, **models)
        best = found["best"]
        alpha, direction = best["alpha"], best["direction"]
        chosen = {"selected": best["mu"], "penalty": best["penalty"], "selection": found}
    settings = dict(alpha=alpha, direction=direction, **models)
    seen = collect(model, data, progress="calibrate" if progress else None, **settings)
    other = None
    if held_out is not None:
        other = collect(model, held_out, progress="held out" if progress else None, name="held_out", **settings)
        chosen |= {"held_out": other.tokens, "held_out_data": other.sha256}
    return Calibration.from_tokens(
        seen.tokens,
        estimator=estimator,
        alpha=alpha,
        direction=direction,
        adapter=adapter_fingerprint(model),
        data=seen.sha256,
        seed=seed,
        **chosen,
    )
