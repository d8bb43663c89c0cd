"""The command line: its start, its help, its tables, its warnings, a full disk, JSON, and `generate`."""

from __future__ import annotations

import io
import json
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import typer
from test_demo import WORDS, examples, tiny_model  # noqa: F401  (fixtures)
from tiny import tiny_lora

import svdecode
from svdecode.cli import app
from svdecode.cli.lm_eval import with_model
from svdecode.cli.options import only_our_warnings
from svdecode.cli.terminal import print_table
from svdecode.common.files import check_writable
from svdecode.evaluation.report import Report

COMMANDS = typer.main.get_command(app.app).commands


@pytest.fixture
def cli(monkeypatch, capsys):
    """Runs a command in this process: (status, stdout, stderr)."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # restored after the test

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["svdecode", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            app.main()
        return (ended.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def adapter(tmp_path) -> Path:
    tiny_lora(vocabulary=len(WORDS)).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def strict(text: str) -> dict:
    """JSON without NaN and Infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


HELP = """
import sys
from svdecode.cli.app import main
for words in [[], *([name] for name in sys.argv[1:])]:
    sys.argv = ["svdecode", *words, "--help"]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, words
heavy = {"torch", "transformers", "peft", "matplotlib", "datasets"} & set(sys.modules)
assert not heavy, heavy
"""


def test_help_of_every_command_imports_no_torch():
    pytest.importorskip("lm_eval")
    done = subprocess.run([sys.executable, "-c", HELP, *COMMANDS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for words in ("svdecode generate", "steer_from=MODEL", "lm-eval"):
        assert words in done.stdout


def test_version_and_the_module(cli):
    assert cli("--version") == (0, f"svdecode {svdecode.__version__}\n", "")
    assert cli("-h")[1] == cli("--help")[1]
    module = subprocess.run([sys.executable, "-m", "svdecode", "--version"], capture_output=True, text=True, check=True)
    assert module.stdout == f"svdecode {svdecode.__version__}\n"


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "lm-eval"])
def test_help_fits_80_columns_and_cuts_no_name(cli, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = cli(name, "-h")
    assert status == 0
    assert max(map(len, out.splitlines())) <= 80
    for parameter in COMMANDS[name].params:
        for option in (*parameter.opts, *parameter.secondary_opts):
            assert option in out
    first = COMMANDS[name].help.split("\n\n")[0].rstrip(".")
    assert first in cli("--help")[1]  # the list of commands does not cut it


def test_the_widest_tables_fit_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    names = ["pre-trained", "warm start", "SVDecode (trimmed)", "no logit-space projection"]
    metrics = ("MC1", "MC2", "MC3")
    values = {name: {"mean": 0.158, "interval": [0.104, 0.234]} for name in names}
    one = {"difference": -0.158, "interval": [-0.204, -0.134], "verdict": "no gain is shown", "mcnemar_p": 0.5}
    report = Report(
        "truthfulqa_mc", "m", 9, {name: {"mu": 12.34567} for name in names}, dict.fromkeys(metrics, values),
        dict.fromkeys(metrics, dict.fromkeys(names, one)), "warm start",
    )  # fmt: skip
    print_table("figures", *report.figures())
    print_table("differences", *report.differences(), words=("", "metric", "verdict"))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    for number in ("12.35", "0.158", "[0.104, 0.234]", "-0.158", "[-0.204, -0.134]", "0.500"):
        assert number in out
    monkeypatch.setenv("COLUMNS", "200")
    print_table("figures", *report.figures())
    assert "0.158 [0.104, 0.234]" in capsys.readouterr().out


def test_our_warnings_are_one_line_and_others_are_silent(monkeypatch, capsys):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr(sys, "warnoptions", [])
    with warnings.catch_warnings():
        # Not pytest's recorder, which would take the place of stderr.
        monkeypatch.setattr(warnings, "showwarning", lambda *w, **_: sys.stderr.write(warnings.formatwarning(*w[:4])))
        only_our_warnings()
        for module in ("peft.tuners", "transformers.modeling_utils", "svdecode.models.steer", "svdecode2"):
            warnings.warn_explicit(f"of {module}", FutureWarning, "file.py", 1, module=module)
        assert capsys.readouterr().err == "svdecode: of svdecode.models.steer\n"
        monkeypatch.setattr(sys, "warnoptions", ["default"])
        warnings.simplefilter("default")
        only_our_warnings()  # the user's -W goes first
        warnings.warn_explicit("of peft", FutureWarning, "file.py", 1, module="peft")
        assert "of peft" in capsys.readouterr().err


def test_a_run_prints_its_result_alone(tiny_model, adapter):  # noqa: F811
    command = [sys.executable, "-m", "svdecode", "generate", "-", "--model", tiny_model, "--adapter", adapter]
    done = subprocess.run(
        [*map(str, command), "--mu", "0.5", "--max-new-tokens", "3", "--json"],
        input="what is w3 ?\n", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no FutureWarning of peft or transformers
    found = strict(done.stdout)
    assert found["prompt"] == "what is w3 ?"
    assert (found["mu"], found["penalty"], found["temperature"], found["prompt_tokens"]) == (0.5, "-inf", 0.0, 4)
    assert 1 <= found["new_tokens"] <= 3


def test_sampling_is_never_silently_greedy(cli, tiny_model, adapter, monkeypatch):  # noqa: F811
    shared = ("generate", "what is w3 ?", "--model", tiny_model, "--adapter", adapter, "--mu", "0.5", "--json")
    for option in ("--top-k", "--top-p"):
        found = [strict(cli(*shared, option, "1", "--max-new-tokens", "3", "--seed", seed)[1]) for seed in range(2)]
        assert [one["temperature"] for one in found] == [1.0, 1.0]
        status, out, err = cli(*shared, option, "1", "--temperature", "0")
        assert (status, out) == (2, "")
        assert "--temperature 0 is greedy" in err
    answers = {cli(*shared, "--top-k", "40", "--max-new-tokens", "8", "--seed", seed)[1] for seed in range(4)}
    assert len({strict(answer)["answer"] for answer in answers}) > 1
    status, out, err = cli(*shared, "--max-new-tokens", "125")
    assert (status, out) == (2, "")
    assert err == (
        "svdecode: --max-new-tokens 125 after a prompt of length 4 is more than the model's 128 positions: "
        "shorten the prompt or lower --max-new-tokens\n"
    )
    assert cli(*shared, "--max-new-tokens", "124")[0] == 0
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    status, _, err = cli("generate", "-", *shared[2:])
    assert (status, err.count("\n")) == (2, 1)
    assert "the prompt on stdin is not UTF-8 text" in err


def test_json_is_strict_and_max_length_is_named(cli, tiny_model, adapter, examples):  # noqa: F811
    shared = ("calibrate", "--model", tiny_model, "--adapter", adapter, "--data", examples)
    status, out, err = cli(*shared, "--max-length", "3")
    assert (status, out) == (2, "")
    assert "no example of data has a token of its completion within max_length=3: use a larger max_length" in err
    assert strict(cli(*shared, "--json")[1])["estimator"] == "exact"
    assert strict(cli("info", "--json")[1])["svdecode"] == svdecode.__version__
    bench = strict(cli("bench", "--rows", "1", "--vocabulary", "64", "--rounds", "1", "--json")[1])
    assert bench["results"][0]["rows"] == 1
    nll = ("eval", "--task", "nll", "--data", examples, "--model", tiny_model, "--adapter", adapter, "--json")
    assert isinstance(strict(cli(*nll, "--limit", "2")[1])["systems"]["SVDecode (exact)"]["mu"], float)


@pytest.fixture
def small_disk():
    """Files may have so many bytes from now on: what a full disk does to a process, for root too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_folder_is_tested_before_the_work(tmp_path, small_disk):
    check_writable(tmp_path / "not" / "there")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file cannot be written: Not a directory"):
        check_writable(tmp_path / "file")
    with pytest.raises(ValueError, match="/proc/x cannot be written: "):
        check_writable("/proc/x")
    small_disk(100)
    with pytest.raises(ValueError, match="cannot be written: File too large"):
        check_writable(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("command", ["calibrate", "warmstart", "eval", "demo"])
def test_a_full_disk_stops_a_command_before_a_model_is_loaded(
    cli, tiny_model, adapter, examples, tmp_path, small_disk, monkeypatch, command  # noqa: F811
):  # fmt: skip
    arguments = {
        "calibrate": ("--adapter", adapter),
        "warmstart": ("--output", tmp_path / "out"),
        "eval": ("--task", "nll", "--output", tmp_path / "out"),
        "demo": ("--output", tmp_path / "out"),
    }[command]
    before = files_of(tmp_path)
    monkeypatch.setattr("svdecode.models.loading.load_model", lambda *_: pytest.fail("a model was loaded"))
    small_disk(100)
    status, out, err = cli(command, "--model", tiny_model, "--data", examples, *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert "cannot be written: File too large" in err
    assert files_of(tmp_path) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("as_json", [False, True])
def test_a_disk_that_fills_up_does_not_lose_a_calibration(
    cli, tiny_model, adapter, examples, tmp_path, small_disk, as_json  # noqa: F811
):  # fmt: skip
    before = files_of(tmp_path)
    small_disk(4096)
    more = ["--json"] * as_json
    status, out, err = cli("calibrate", "--model", tiny_model, "--adapter", adapter, "--data", examples, *more)
    assert status == 2
    assert err.splitlines()[-1] == "svdecode: [Errno 27] File too large"
    assert strict(out)["mu"] if as_json else "mu = " in out
    assert files_of(tmp_path) == before  # nothing half-written, no hidden file


def test_a_disk_that_fills_up_does_not_lose_an_evaluation(
    cli, tiny_model, adapter, tmp_path, small_disk  # noqa: F811
):  # fmt: skip
    (tmp_path / "text.txt").write_text("what is w1 ? answer w2 w3")
    arguments = ("eval", "--task", "nll", "--data", tmp_path / "text.txt", "--model", tiny_model, "--adapter", adapter)
    small_disk(8000)  # the records fit, the figure does not
    status, out, err = cli(*arguments, "--mu", "0.5", "--output", tmp_path / "out", "--json")
    assert status == 2
    assert err.splitlines()[-1] == "svdecode: [Errno 27] File too large"
    assert strict(out)["questions"] == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["records.jsonl", "results.json", "results.md"]


@pytest.mark.parametrize(
    "size", [4096, 30_000]
)  # the weights of a checkpoint do not fit; they do, its optimizer does not
def test_a_disk_that_fills_up_leaves_no_adapter(cli, tiny_model, examples, tmp_path, small_disk, size):  # noqa: F811
    small_disk(size)
    status, out, err = cli("warmstart", "--model", tiny_model, "--data", examples, "--output", tmp_path / "out")
    assert (status, out) == (2, "")
    assert err.splitlines()[-1].startswith(f"svdecode: {tmp_path / 'out'} cannot be written: ")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name.startswith((".", "adapter"))]


def test_names_of_data_and_tokenizers_and_models_steered_twice(examples):  # noqa: F811
    model = tiny_lora(vocabulary=len(WORDS))
    with pytest.raises(
        TypeError, match=r"got str: svdecode\.data\.examples\.read_examples\('file\.jsonl'\) reads a file"
    ):
        svdecode.calibrate(model, "file.jsonl")
    rows = [{"prompt": "what", "completion": "w1"}]
    with pytest.raises(TypeError, match=r"got a name: AutoTokenizer\.from_pretrained\('name'\) makes one"):
        svdecode.calibrate(model, rows, tokenizer="name", progress=False)
    with pytest.raises(ValueError, match="steered already: assign to its settings"):
        svdecode.steer(svdecode.steer(model, mu=0.5), mu=0.5)


def test_a_calibration_says_who_it_is_and_draws_what_the_ending_says(tmp_path):
    ids = torch.arange(3, 43).reshape(4, 10)
    found = svdecode.calibrate(tiny_lora(), [{"input_ids": ids, "labels": ids}], progress=False)
    assert repr(found).startswith(f"Calibration(mu={found.mu:.4g} (exact), alpha=0.1, direction='kl'")
    assert len(repr(found)) < 120
    for ending, start in (("svg", b"<?xml"), ("pdf", b"%PDF"), ("png", b"\x89PNG")):
        found.plot(tmp_path / f"figure.{ending}")
        assert (tmp_path / f"figure.{ending}").read_bytes().startswith(start)
    with pytest.raises(ValueError, match=r"a figure ends in one of .*, not in \.docx"):
        found.plot(tmp_path / "figure.docx")


def test_lm_evals_arguments():
    assert with_model([]) == ["--model", "svdecode"]
    assert with_model(["--tasks", "x"]) == ["--model", "svdecode", "--tasks", "x"]
    assert with_model(["run", "--tasks", "x"]) == ["run", "--model", "svdecode", "--tasks", "x"]
    for unchanged in (["ls", "tasks"], ["validate"], ["--model=hf"], ["run", "--model", "hf"]):
        assert with_model(unchanged) == unchanged
