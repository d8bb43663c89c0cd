"""The command line: results on stdout, progress on stderr, exit status 2 with one line for what was wrong.

This file and the commands import neither torch nor transformers before a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
from typing import Annotated

try:
    import typer

    from svdecode.cli.bench import bench
    from svdecode.cli.calibrate import calibrate
    from svdecode.cli.demo import demo
    from svdecode.cli.evaluate import evaluate
    from svdecode.cli.explain import explain
    from svdecode.cli.generate import generate
    from svdecode.cli.info import info
    from svdecode.cli.lm_eval import lm_eval
    from svdecode.cli.options import only_our_warnings
    from svdecode.cli.serve import serve
    from svdecode.cli.warmstart import warmstart
except ImportError as error:  # pragma: no cover
    raise SystemExit(f"svdecode: the command line needs {error.name}: pip install 'svdecode[cli]'") from None

from svdecode.constants import VERSION

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: it never cuts the name of an option, and it starts faster
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (info, demo, warmstart, calibrate, generate, explain, bench):
    app.command()(command)
app.command("eval")(evaluate)
_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command(context_settings=_PASSED_ON)(serve)
app.command(context_settings={**_PASSED_ON, "help_option_names": []})(lm_eval)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"svdecode {VERSION}")
        raise typer.Exit


@app.callback()
def _start(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Steering Vector Decoding: combine a pre-trained model with its warm start at every decoding step."""


def main() -> None:
    """Entry point: what the user or the disk got wrong is one line and exit status 2; what we got wrong is a traceback."""
    only_our_warnings()
    try:
        app()
    except (ValueError, ImportError, OSError) as error:
        print(f"svdecode: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
