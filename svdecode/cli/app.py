"""The command line: results on stdout, progress on stderr, exit status 2 with one line for what was wrong."""

from __future__ import annotations

import sys

try:
    import typer

    from svdecode.cli.bench import bench
    from svdecode.cli.calibrate import calibrate
    from svdecode.cli.demo import demo
    from svdecode.cli.evaluate import evaluate
    from svdecode.cli.generate import generate
    from svdecode.cli.info import info
    from svdecode.cli.lm_eval import lm_eval
    from svdecode.cli.warmstart import warmstart
except ImportError as error:  # pragma: no cover
    raise SystemExit(f"svdecode: the command line needs {error.name}: pip install 'svdecode[cli]'") from None

app = typer.Typer(
    help="Steering Vector Decoding: combine a pre-trained model with its warm start at every decoding step.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (info, demo, warmstart, calibrate, generate, bench):
    app.command()(command)
app.command("eval")(evaluate)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})(
    lm_eval
)


def main() -> None:
    """Entry point: what the user got wrong is one line and exit status 2; what we got wrong is a traceback."""
    try:
        app()
    except (ValueError, ImportError) as error:
        print(f"svdecode: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
