"""`svdecode lm-eval`: lm-eval's own command line, with the model `svdecode`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

NAME = "svdecode"
_COMMANDS = ("run", "ls", "validate")
_HELP = """\
svdecode lm-eval runs the LM Evaluation Harness on a steered model:

  svdecode lm-eval --model_args pretrained=MODEL,adapter=FOLDER --tasks arc_easy

--model is svdecode. Its --model_args, beside those of the model hf:
  adapter=FOLDER        PEFT adapter with its calibration (svdecode.json), or
  tokenizer=FOLDER      default: the one beside the adapter, else the model's
  steer_from=MODEL      second model, the pre-trained one of the pair; needs mu
  mu=NUMBER             steering strength; default: the calibration
  alpha=, direction=    default: those of the calibration
  penalty=              for generation; default: the calibration's, else -inf
  scoring_penalty=      for likelihoods; default: 0
  mode=                 auto, paired, lazy or two_pass
All other options are lm-eval's own:
"""


def lm_eval(context: typer.Context) -> None:
    """Run the LM Evaluation Harness on a steered model. Every option is lm-eval's own.

    svdecode lm-eval --model_args pretrained=MODEL,adapter=FOLDER --tasks arc_easy
    """
    arguments = context.args
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise ImportError(f"svdecode lm-eval needs {error.name}: pip install 'svdecode[lm-eval]'") from None
    if not {"-h", "--help"}.isdisjoint(arguments):
        print(_HELP, flush=True)
    else:
        import svdecode.evaluation.lm_eval  # noqa: F401  (registers the model)
    sys.argv = ["svdecode lm-eval", *with_model(arguments)]
    cli_evaluate()


def with_model(arguments: Sequence[str]) -> list[str]:
    """lm-eval's arguments, with `--model svdecode` unless they name a model or run nothing."""
    arguments = list(arguments)
    if any(word == "--model" or word.startswith("--model=") for word in arguments):
        return arguments
    at = 1 if arguments and arguments[0] in _COMMANDS else 0
    if at and arguments[0] != "run":
        return arguments
    return [*arguments[:at], "--model", NAME, *arguments[at:]]
