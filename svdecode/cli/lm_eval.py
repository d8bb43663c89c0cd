"""`svdecode lm-eval`."""

from __future__ import annotations

import typer


def lm_eval(context: typer.Context) -> None:
    """Run the LM Evaluation Harness on a steered model; everything behind is lm-eval's own command line.

    svdecode lm-eval --model_args pretrained=MODEL,adapter=FOLDER --tasks arc_easy
    """
    from svdecode.evaluation.lm_eval import main

    main(context.args)
