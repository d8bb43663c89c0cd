"""The LM Evaluation Harness on a steered model: `--model svdecode`, started by `svdecode lm-eval`.

lm-eval 0.4 loads no plugins. Importing this file registers the model, and makes lm-eval save its results under a name of their
own: lm-eval itself would take the name of the base model.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

try:
    from lm_eval.api.registry import register_model
    from lm_eval.loggers.evaluation_tracker import GeneralConfigTracker
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import sanitize_model_name, simple_parse_args_string
except ImportError as error:
    raise ImportError(f"svdecode.lm_eval needs {error.name}: pip install 'svdecode[lm-eval]'") from None

from svdecode.common.files import plain
from svdecode.models.loading import has_tokenizer, load_adapter
from svdecode.models.steer import steer
from svdecode.strength.calibration import Calibration

SCORING_PENALTY = 0.0
"""Penalty where given answers are scored: with -inf an answer with one token outside the kept set has no likelihood."""

NAME = "svdecode"


@register_model(NAME)
class SteeredLM(HFLM):
    """lm-eval's Hugging Face model, steered; loglikelihood, rolling loglikelihood and generate_until.

    `--model_args` takes what lm-eval's own `hf` model takes, and:

    adapter: folder of a PEFT adapter with its calibration (svdecode.json), or `steer_from`, never both left out.
    tokenizer: left out, the one that was saved beside the adapter, else the model's.
    steer_from: folder or name of a second model, the pre-trained one of the pair.
    mu: strength; left out, the calibration beside the adapter.
    alpha, direction: as in `svdecode.steer`; left out, the calibration's.
    penalty: for generation; left out, the calibration's, else -inf.
    scoring_penalty: for likelihoods, 0 (see `SCORING_PENALTY`).
    mode: as in `svdecode.steer`.
    """

    def __init__(
        self,
        pretrained: object,
        adapter: str | None = None,
        steer_from: str | None = None,
        mu: float | None = None,
        alpha: float | None = None,
        direction: str | None = None,
        penalty: float | None = None,
        scoring_penalty: float = SCORING_PENALTY,
        mode: str = "auto",
        **options: object,
    ) -> None:
        """Load and steer; ValueError for what `svdecode.steer` refuses, and where both or none of two models are named."""
        if "peft" in options:
            raise ValueError(f"model_args has no peft=: write adapter={options['peft']} for a PEFT adapter")
        if (adapter is None) == (steer_from is None):
            raise ValueError("model_args needs adapter=FOLDER or steer_from=MODEL, one of them")
        if mu is None and adapter is None:
            raise ValueError("model_args needs mu=NUMBER: there is no adapter with a calibration")
        strength = Calibration.from_pretrained(adapter) if mu is None else float(mu)
        if adapter is not None and has_tokenizer(adapter):
            options.setdefault("tokenizer", adapter)
        super().__init__(pretrained, **options)
        other = None
        if adapter is not None:
            model = load_adapter(self._model, adapter)
        else:
            from transformers import AutoModelForCausalLM

            model = self._model
            other = AutoModelForCausalLM.from_pretrained(steer_from, dtype=model.dtype).to(model.device)
        self._model = steer(
            model,
            pretrained=other,
            mu=strength,
            alpha=None if alpha is None else float(alpha),
            direction=direction,
            penalty=None if penalty is None else float(penalty),
            mode=mode,
        )
        self._source = {"adapter": adapter, "steer_from": steer_from}
        self._generation = self._model.settings
        self._scoring = self._generation._replace(penalty=float(scoring_penalty)).check()

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        self.model.settings = self._scoring
        return super()._model_call(inps, attn_mask, labels)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation: object) -> Tensor:
        self.model.settings = self._generation
        with torch.no_grad():
            return super()._model_generate(context, max_length, stop, **generation)

    def get_model_info(self) -> dict[str, object]:
        """What lm-eval writes of the model into "config" of its results, and how it was steered.

        mu, alpha, penalty (of generation), scoring_penalty, direction, mode, adapter and steer_from; fit for strict JSON.
        """
        scoring = {"scoring_penalty": self._scoring.penalty, "mode": self._model.mode}
        return super().get_model_info() | plain({**self._generation._asdict(), **scoring, **self._source})


def result_name(model_args: str | Mapping[str, object]) -> str:
    """The name under which lm-eval saves results: the base model, how it is steered, and mu where it is given."""
    given = simple_parse_args_string(model_args) if isinstance(model_args, str) else model_args
    by = Path(str(given.get("adapter") or given.get("steer_from"))).name
    mu = f"-mu{given['mu']}" if given.get("mu") is not None else ""
    return f"{given.get('pretrained')}-{NAME}-{by}{mu}"


def _name_results() -> None:
    """Let lm-eval's tracker name the results of this model by `result_name`."""
    original = GeneralConfigTracker.log_experiment_args

    @functools.wraps(original)
    def log_experiment_args(self, model_source, model_args, *rest, **named) -> None:
        original(self, model_source, model_args, *rest, **named)
        if model_source == NAME and model_args:
            self.model_name = result_name(model_args)
            self.model_name_sanitized = sanitize_model_name(self.model_name)

    GeneralConfigTracker.log_experiment_args = log_experiment_args


_name_results()
