"""`calibrate`: one constant strength for decoding, from gold tokens, and `Calibration`, the file beside the adapter."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from svdecode import validation
from svdecode.constants import ALPHA, DIRECTIONS, IGNORE_INDEX, KL
from svdecode.data import batches
from svdecode.estimators import ESTIMATORS, TokenStatistics
from svdecode.files import write_atomically
from svdecode.ops import fused_steer, steering_vector

FILE_NAME = "svdecode.json"
TOKENS_NAME = "svdecode.safetensors"
SCHEMA = 1
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

# Calibrations that this process has saved or loaded, by the fingerprint of their adapter: peft does not record the folder
# that an adapter came from, so "beside the adapter" is found through the adapter's weights.
_SAVED: dict[str, Calibration] = {}


@dataclass
class Calibration:
    """A calibrated strength and what it rests on. NLL and KL in nats a token."""

    mu: float
    """The strength of the chosen estimator."""
    estimator: str
    """Which of `estimates` `mu` is."""
    estimates: dict[str, float]
    """Every estimator's strength (see `svdecode.estimators`)."""
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
    tokens: TokenStatistics | None = field(default=None, repr=False)
    """The statistics of each token, for `curve` and `plot`."""

    @classmethod
    def from_tokens(
        cls, tokens: TokenStatistics, *, estimator: str, alpha: float, direction: str, adapter: str | None = None
    ) -> Calibration:
        """Estimate everything from token statistics."""
        if tokens.coverage == 0:
            raise ValueError(f"no gold token is inside the kept set at alpha={alpha}: calibrate with a smaller alpha")
        estimates = {name: function(tokens) for name, function in ESTIMATORS.items()}
        levels = torch.tensor(QUANTILES, dtype=torch.float64)
        quantiles = torch.quantile(tokens.mu_star.double(), levels).tolist()
        return cls(
            mu=estimates[estimator],
            estimator=estimator,
            estimates=estimates,
            alpha=alpha,
            direction=direction,
            coverage=tokens.coverage,
            num_tokens=len(tokens.kl),
            mean_kl=tokens.kl.double().mean().item(),
            kept=tokens.num_kept.double().mean().item(),
            mu_star_quantiles={str(level): value for level, value in zip(QUANTILES, quantiles, strict=True)},
            adapter=adapter,
            tokens=tokens,
        )

    def curve(self, mus: Iterable[float]) -> Tensor:
        """(M,) float64: mean NLL of the covered gold tokens at each strength."""
        if self.tokens is None:
            raise ValueError(f"this calibration was loaded without its tokens ({TOKENS_NAME}): calibrate again")
        return torch.tensor([self.tokens.derivatives(float(mu))[0] for mu in mus], dtype=torch.float64)

    def plot(self, path: str | Path) -> None:
        """Write a PNG: NLL over mu with every estimate marked, and the histogram of the tokens' own strengths."""
        from svdecode.plots import plot_calibration

        plot_calibration(self, path)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write svdecode.json (and the token statistics as safetensors) into the adapter's folder, each atomically."""
        from safetensors.torch import save

        folder = Path(folder)
        values = {name: value for name, value in self.__dict__.items() if name != "tokens"}
        if self.tokens is not None:
            write_atomically(folder / TOKENS_NAME, save(dict(asdict(self.tokens))))
        write_atomically(folder / FILE_NAME, json.dumps({"schema": SCHEMA, **values}, indent=2).encode())
        self._remember()

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Calibration:
        """Read what `save_pretrained` wrote; ValueError says what is missing or wrong."""
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            raise ValueError(f"no calibration in {folder}: {FILE_NAME} is missing (svdecode calibrate writes it)")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            schema = values.pop("schema")
            if schema != SCHEMA:
                raise ValueError(f"schema {schema} is not {SCHEMA}")
            calibration = cls(**values)
            sound = calibration.direction in DIRECTIONS and math.isfinite(calibration.mu)
            if not sound or calibration.estimates[calibration.estimator] != calibration.mu:
                raise ValueError("values contradict each other")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is not a calibration: {error}") from None
        tokens = path.with_name(TOKENS_NAME)
        if tokens.is_file():
            from safetensors.torch import load_file

            calibration.tokens = TokenStatistics(**load_file(tokens))
        calibration._remember()
        return calibration

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
) -> Calibration:
    """Estimate the steering strength from gold tokens, with one forward of both models over the data.

    Args:
        model: a PeftModel, or any causal LM together with `pretrained`; left as it was.
        data: a list of {"prompt", "completion"}, a Dataset with those columns, or an iterable of batches with input_ids,
            attention_mask and labels (-100 ignored).
        pretrained: the pre-trained model, where it is not the one under the adapter.
        tokenizer: for texts; an end-of-sequence token is appended to each completion.
        estimator: which of `svdecode.estimators.ESTIMATORS` becomes `mu`; all are reported.
        alpha: confidence threshold in [0, 1]. Memory grows with the kept tokens, 8 bytes each, and 40 bytes a gold token.
        direction: "kl" or "log_ratio".
        batch_size: of texts.
        progress: show a bar on stderr.

    Raises:
        ValueError: no data, no labelled token, no gold token inside the kept set, or what `steer` raises.
    """
    from svdecode.adapters import adapter_fingerprint

    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}")
    tokens = collect_tokens(
        model,
        data,
        pretrained=pretrained,
        tokenizer=tokenizer,
        alpha=alpha,
        direction=direction,
        batch_size=batch_size,
        progress="calibrate" if progress else None,
    )
    fingerprint = adapter_fingerprint(model)
    return Calibration.from_tokens(tokens, estimator=estimator, alpha=alpha, direction=direction, adapter=fingerprint)


@torch.inference_mode()
def collect_tokens(
    model: object,
    data: object,
    *,
    pretrained: object | None = None,
    tokenizer: object | None = None,
    alpha: float = ALPHA,
    direction: str = KL,
    batch_size: int = 8,
    progress: str | None = None,
) -> TokenStatistics:
    """The statistics of every labelled token of `data`; arguments as in `calibrate`, `progress` names the bar."""
    from svdecode.steering import steer

    validation.check_settings(alpha, direction)
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}")
    found, count = batches(data, tokenizer, batch_size)
    steered = steer(model, pretrained=pretrained, mu=0.0, alpha=alpha, direction=direction)
    parts: list[TokenStatistics] = []
    with tqdm(found, total=count, desc=progress, unit="batch", disable=progress is None) as bar:
        for batch in bar:
            part = token_statistics(steered, batch, alpha, direction)
            if len(part.kl):
                parts.append(part)
                bar.set_postfix(tokens=sum(len(p.kl) for p in parts))
    if not parts:
        raise ValueError("data has no labelled token: it is empty, or all labels are -100")
    return TokenStatistics.concatenate(parts)


def token_statistics(steered: object, batch: dict[str, Tensor], alpha: float, direction: str) -> TokenStatistics:
    """Statistics of the labelled tokens of one batch, from both models' logits."""
    inputs = {
        name: value.to(steered.device) for name, value in batch.items() if name in ("input_ids", "attention_mask")
    }
    labels = batch["labels"][:, 1:]  # position t predicts token t + 1
    predicting = (labels != IGNORE_INDEX).to(steered.device)
    pre, ft, _ = steered.pair_logits(**inputs, use_cache=False)
    pre, ft = pre[:, :-1][predicting], ft[:, :-1][predicting]
    labels = labels.to(ft.device)[predicting]
    out = fused_steer(pre, ft, 0.0, labels=labels, alpha=alpha, direction=direction)
    kept = out.logprobs > -math.inf
    counts = kept.sum(-1)
    ends = counts.cumsum(0)
    # Where the gold token stands among the kept tokens of its row, in the order of ids.
    before = (kept.cumsum(-1) - 1).gather(-1, labels[:, None]).squeeze(-1)
    covered = kept.gather(-1, labels[:, None]).squeeze(-1)
    return TokenStatistics(
        moments=out.moments.cpu(),
        mu_star=out.mu_star.cpu(),
        kl=out.kl.cpu(),
        num_kept=out.num_kept.cpu(),
        logprobs=out.logprobs[kept].cpu(),
        deltas=steering_vector(pre, ft, alpha=alpha, direction=direction)[kept].cpu(),
        gold=torch.where(covered, ends - counts + before, -1).cpu(),
        offsets=(ends - counts).cpu(),
    )
