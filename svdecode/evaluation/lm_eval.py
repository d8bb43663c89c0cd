"""The LM Evaluation Harness on a steered model: `--model svdecode`, started by `svdecode lm-eval`.

lm-eval 0.4 loads no plugins, hence the launcher: it registers the model and hands over to lm-eval's own command line.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError(f"svdecode.lm_eval needs {error.name}: pip install 'svdecode[lm-eval]'") from None

from svdecode.models.loading import load_adapter
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
        if (adapter is None) == (steer_from is None):
            raise ValueError("model_args needs adapter=FOLDER or steer_from=MODEL, one of them")
        if mu is None and adapter is None:
            raise ValueError("model_args needs mu=NUMBER: there is no adapter with a calibration")
        strength = Calibration.from_pretrained(adapter) if mu is None else float(mu)
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
        self._generation = self._model.settings
        self._scoring = self._generation._replace(penalty=float(scoring_penalty)).check()

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        self.model.settings = self._scoring
        return super()._model_call(inps, attn_mask, labels)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation: object) -> Tensor:
        self.model.settings = self._generation
        with torch.no_grad():
            return super()._model_generate(context, max_length, stop, **generation)


def main(arguments: list[str]) -> None:
    """lm-eval's command line with `arguments`; `--model svdecode` unless they name a model."""
    from lm_eval.__main__ import cli_evaluate

    if not any(word == "--model" or word.startswith("--model=") for word in arguments):
        commands = ("run", "ls", "validate")
        at = 1 if arguments and arguments[0] in commands else 0
        if not arguments or arguments[0] not in commands[1:]:
            arguments = [*arguments[:at], "--model", NAME, *arguments[at:]]
    sys.argv = ["svdecode lm-eval", *arguments]
    cli_evaluate()
