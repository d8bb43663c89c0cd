"""The folder that a warm start writes: when is what in it, and is it whole.

    adapter_config.json, adapter_model.safetensors   the adapter, at the end
    svdecode-warmstart.json   settings, what was trained on, the loss of each step, whether the run is complete
    svdecode-splits.json      which examples trained and which did not (svdecode/data/splits.py)
    training.png              the loss over the steps (`svdecode warmstart`)
    step-N/                   the adapter after chosen steps, complete in itself
    checkpoints/              for `resume`: trained tensors as safetensors, and Trainer's own states of optimizer, schedule
                              and random numbers, which are pickles that Trainer reads with weights_only=True

adapter_config.json is written last and removed first: a folder that has one holds a whole adapter.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from peft import PeftModel

from svdecode.common.files import read_object, write_atomically
from svdecode.models.loading import CONFIG_NAME, WEIGHTS_NAME

RECORD_NAME = "svdecode-warmstart.json"
FIGURE_NAME = "training.png"
SCHEMA = 1
CHECKPOINTS = "checkpoints"
_STATE_NAME = "trainer_state.json"


def step_folder(output: str | Path, step: int) -> Path:
    """Where the adapter after a step is saved."""
    return Path(output) / f"step-{step}"


def save_adapter(model: PeftModel, folder: str | Path) -> None:
    """Save an adapter so that the folder holds, whenever the writing stops, a whole adapter or none."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".adapter-*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".adapter-") as scratch:
        model.save_pretrained(scratch)
        (folder / CONFIG_NAME).unlink(missing_ok=True)
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            os.replace(Path(scratch) / name, folder / name)


def write_record(output: str | Path, record: Mapping[str, object]) -> None:
    """Write svdecode-warmstart.json, atomically."""
    write_atomically(Path(output) / RECORD_NAME, json.dumps({"schema": SCHEMA, **record}, indent=1).encode())


def has_record(output: str | Path) -> bool:
    """Whether a warm start began in this folder."""
    return (Path(output) / RECORD_NAME).is_file()


def read_record(output: str | Path) -> dict[str, object]:
    """What svdecode-warmstart.json says; ValueError where it is missing or damaged."""
    path = Path(output) / RECORD_NAME
    if not path.is_file():
        raise ValueError(f"no warm start in {output}: {RECORD_NAME} is missing")
    record = read_object(path, "the record of a warm start", largest=None)  # it grows with the steps
    if record.get("schema") != SCHEMA:
        raise ValueError(f"{path} is not the record of a warm start: schema {record.get('schema')} is not {SCHEMA}")
    return record


def is_complete(output: str | Path) -> bool:
    """Whether a warm start in this folder ran to its end."""
    return has_record(output) and bool(read_record(output)["complete"]) and (Path(output) / CONFIG_NAME).is_file()


def check_output(output: str | Path, *, resume: bool, overwrite: bool) -> None:
    """ValueError where `output` is no folder, or holds an adapter or checkpoints that may neither be continued nor replaced."""
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is not a folder")
    if not (resume or overwrite) and any((output / name).exists() for name in (CONFIG_NAME, CHECKPOINTS)):
        raise ValueError(f"{output} holds a warm start already: pass --resume, --overwrite or another folder")
    if resume and not overwrite and (output / CONFIG_NAME).is_file() and not has_record(output):
        raise ValueError(
            f"{output} holds an adapter that is no warm start of svdecode: pass --overwrite or another folder"
        )


def last_checkpoint(output: str | Path) -> str | None:
    """The newest whole checkpoint in an output folder."""
    found = []
    for state in Path(output).glob(f"{CHECKPOINTS}/checkpoint-*/{_STATE_NAME}"):  # which Trainer writes last
        with contextlib.suppress(ValueError, KeyError, TypeError):
            found.append((json.loads(state.read_text(encoding="utf-8"))["global_step"], str(state.parent)))
    return max(found)[1] if found else None


def clear(output: Path) -> None:
    """Remove what an earlier warm start and its calibration left, the adapter first."""
    for folder in (output, *output.glob("step-*")):
        for file in (folder / CONFIG_NAME, folder / WEIGHTS_NAME, folder / FIGURE_NAME, *folder.glob("svdecode*")):
            file.unlink(missing_ok=True)
        if folder != output:
            with contextlib.suppress(OSError):  # what is not ours stays
                folder.rmdir()
    shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)


def check_resumable(output: Path, record: Mapping[str, object]) -> None:
    """ValueError where the warm start in `output` began with other settings or other examples than `record` has."""
    earlier = read_record(output)
    try:
        then, now = (
            {"model": r["model"], **r["settings"], "examples or tokenizer": r["tokens_sha256"][:12]}
            for r in (earlier, record)
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{output / RECORD_NAME} is not the record of a warm start: {error}") from None
    for name in now:
        if then.get(name) != now[name]:
            raise ValueError(
                f"the warm start in {output} began with other {name}: {then.get(name)}, not {now[name]}; "
                "resume with the same, or overwrite it"
            )
