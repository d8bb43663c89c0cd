"""The warm start: four methods that learn, a resume that changes nothing, folders with a whole adapter or none."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_demo import run, tiny_model  # noqa: F401 (a fixture: a model folder with a tokenizer of words)
from tiny import tiny_model as tiny_architecture

import svdecode
from svdecode.data.splits import Splits
from svdecode.models.adapters import adapter_fingerprint
from svdecode.models.loading import load_adapter, load_model
from svdecode.warmstart import train as module
from svdecode.warmstart.folder import is_complete, last_checkpoint, read_record, save_adapter
from svdecode.warmstart.presets import PRESETS, preset
from svdecode.warmstart.train import step_folder, warmstart

METHODS = tuple(PRESETS)
PAIRS = [{"prompt": f"what is w{i} ?", "completion": f"w{(7 * i) % 40} w{i}"} for i in range(12)]
RATES = {"lora": 1e-2, "ia3": 3e-2, "prompt-tuning": 3e-2, "p-tuning-v2": 1e-2}


def train(folder: Path, output: Path, examples=PAIRS, **options):
    model, tokenizer = load_model(str(folder))
    return warmstart(model, tokenizer, examples, output, **{"progress": False, **options})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def equal(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_each_method_learns_and_is_loaded_as_it_was_saved(tiny_model, tmp_path, method, dtype):  # noqa: F811
    model, tokenizer = load_model(str(tiny_model))
    frozen = {name: tensor.clone() for name, tensor in model.to(dtype).state_dict().items()}
    options = dict(learning_rate=RATES[method], epochs=12, batch_size=4, save_steps=(5,), progress=False)
    trained = warmstart(model, tokenizer, PAIRS, tmp_path, method=method, **options)
    record = read_record(tmp_path)
    losses = [entry["loss"] for entry in record["loss"]]
    assert [entry["step"] for entry in record["loss"]] == list(range(1, 37))
    assert sum(losses[-6:]) < 0.85 * sum(losses[:6])
    assert record["tokens"] == 12 * sum(len(p["prompt"].split()) + len(p["completion"].split()) + 1 for p in PAIRS)
    assert is_complete(tmp_path)
    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path).values())
    assert not equal(tmp_path, step_folder(tmp_path, 5))

    ids = tokenizer(PAIRS[3]["prompt"], return_tensors="pt").input_ids
    base = load_model(str(tiny_model))[0].to(dtype)
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in base.state_dict().items())
    loaded = load_adapter(base, tmp_path)
    assert adapter_fingerprint(loaded) == record["adapter"]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, trained(ids).logits)
    load_adapter(load_model(str(tiny_model))[0], step_folder(tmp_path, 5))
    assert svdecode.generate(svdecode.steer(loaded, mu=0.5), ids, max_new_tokens=2).shape == (1, ids.shape[1] + 2)


def test_accumulated_batches_are_one_larger_batch(tiny_model, tmp_path):  # noqa: F811
    options = dict(dropout=0.0, learning_rate=1e-3, epochs=2)
    train(tiny_model, tmp_path / "whole", batch_size=4, **options)
    train(tiny_model, tmp_path / "parts", batch_size=2, gradient_accumulation=2, **options)
    assert read_record(tmp_path / "parts")["steps"] == 6
    for name, tensor in weights(tmp_path / "whole").items():
        torch.testing.assert_close(weights(tmp_path / "parts")[name], tensor, rtol=1e-3, atol=1e-5)


def test_the_seed_decides(tiny_model, tmp_path):  # noqa: F811
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(tiny_model, tmp_path / name, seed=seed)
    assert equal(tmp_path / "a", tmp_path / "b")
    assert not equal(tmp_path / "a", tmp_path / "c")


def interrupt_after(monkeypatch, step: int) -> list[int]:
    """Stop training after a step; the list fills with the steps that were made."""
    original, steps = module._Progress.on_step_end, []

    def on_step_end(self, args, state, control, **more):
        original(self, args, state, control, **more)
        steps.append(state.global_step)
        if state.global_step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(module._Progress, "on_step_end", on_step_end)
    return steps


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("checkpoint_steps", [3, 0])
def test_a_resumed_run_equals_an_uninterrupted_one(tiny_model, tmp_path, monkeypatch, method, checkpoint_steps):  # noqa: F811
    options = dict(
        method=method,
        learning_rate=1e-2,
        epochs=2,
        gradient_accumulation=2,
        checkpoint_steps=checkpoint_steps,
        save_steps=(8, 12),
    )
    whole, output = tmp_path / "whole", tmp_path / "resumed"
    train(tiny_model, whole, **options)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 8)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_model, output, **options)
    assert not is_complete(output)
    with pytest.raises(ValueError, match=r"adapter_config\.json is missing"):
        load_adapter(load_model(str(tiny_model))[0], output)
    assert (last_checkpoint(output) or "none").endswith("checkpoint-6" if checkpoint_steps else "none")
    assert not list(output.rglob("*.bin"))

    with monkeypatch.context() as patch:
        steps = interrupt_after(patch, 0)
        train(tiny_model, output, resume=True, **options)
    assert steps == list(range(7 if checkpoint_steps else 1, 13))
    for folder in ("", "step-8", "step-12"):
        assert equal(whole / folder, output / folder), folder
    one, other = read_record(whole), read_record(output)
    assert len(one["loss"]) == 12
    for name in ("loss", "steps", "tokens", "adapter", "complete"):
        assert one[name] == other[name], name


def test_a_resume_is_of_the_same_run(tiny_model, tmp_path):  # noqa: F811
    train(tiny_model, tmp_path, resume=True, checkpoint_steps=6)  # nothing there: from the start
    before = weights(tmp_path)
    with pytest.raises(ValueError, match=r"began with other learning_rate: 5e-05, not 0\.1"):
        train(tiny_model, tmp_path, resume=True, learning_rate=0.1)
    with pytest.raises(ValueError, match="began with other method: lora, not ia3"):
        train(tiny_model, tmp_path, resume=True, method="ia3")
    with pytest.raises(ValueError, match="began with other examples or tokenizer"):
        train(tiny_model, tmp_path, PAIRS[1:], resume=True)
    loaded = train(tiny_model, tmp_path, resume=True)  # complete: nothing is trained
    assert adapter_fingerprint(loaded) == read_record(tmp_path)["adapter"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(tmp_path).items())
    (tmp_path / "checkpoints" / "checkpoint-12" / "trainer_state.json").write_text(
        '{"global_step": 12'
    )  # a half-written one
    assert last_checkpoint(tmp_path).endswith("checkpoint-6")
    (tmp_path / "svdecode-warmstart.json").write_text("{}")
    with pytest.raises(ValueError, match=r"svdecode-warmstart\.json is not the record of a warm start"):
        train(tiny_model, tmp_path, resume=True)


def test_another_runs_adapter_is_kept_or_wholly_replaced(tiny_model, tmp_path, monkeypatch):  # noqa: F811
    train(tiny_model, tmp_path, save_steps=(4,))
    (tmp_path / "svdecode.json").write_text("a calibration of the old adapter")
    (tmp_path / "mine.txt").write_text("the user's")
    before = weights(tmp_path)
    with pytest.raises(ValueError, match="holds a warm start already: pass --resume, --overwrite or another folder"):
        train(tiny_model, tmp_path, seed=1, overwrite=False)
    for mistake in ({"target_modules": ["nowhere"]}, {"save_steps": [99]}, {"max_length": 4}):
        with pytest.raises(ValueError, match=r"nowhere|save_steps has 99, but|no example has a token"):
            train(tiny_model, tmp_path, **mistake)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(tmp_path).items())
    interrupt_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model, tmp_path, seed=1, overwrite=True)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"mine.txt", "svdecode-splits.json", "svdecode-warmstart.json"}


def test_an_adapter_is_saved_whole_or_not_at_all(tiny_model, tmp_path, monkeypatch):  # noqa: F811
    model = train(tiny_model, tmp_path)
    original = type(model).save_pretrained

    def half(self, folder, **more):
        original(self, folder, **more)
        raise OSError("no space left on device")

    monkeypatch.setattr(type(model), "save_pretrained", half)
    before = weights(tmp_path)
    with pytest.raises(OSError, match="no space left"):
        save_adapter(model, tmp_path)
    with pytest.raises(OSError, match="no space left"):
        save_adapter(model, tmp_path / "new")
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(tmp_path).items())
    assert not list((tmp_path / "new").iterdir())


def test_only_the_training_split_trains(tiny_model, tmp_path):  # noqa: F811
    splits = Splits.make(PAIRS, data="pairs.jsonl", seed=2)
    train(tiny_model, tmp_path / "split", splits=splits, save_steps=(2,))
    train(tiny_model, tmp_path / "part", splits.select(PAIRS, "train"))
    assert equal(tmp_path / "split", tmp_path / "part")
    assert read_record(tmp_path / "split")["examples"] == splits.sizes["train"] < len(PAIRS)
    for folder in (tmp_path / "split", step_folder(tmp_path / "split", 2)):
        assert Splits.load(folder) == splits
    assert Splits.load(tmp_path / "part").fractions == (1.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="not the data that were split"):
        train(tiny_model, tmp_path / "other", PAIRS[1:], splits=splits)


def test_what_cannot_be_learnt(tiny_model, tmp_path):  # noqa: F811
    long = {"prompt": "what " * 30, "completion": "w1"}
    train(tiny_model, tmp_path / "a", [*PAIRS, long], max_length=10)
    record = read_record(tmp_path / "a")
    assert (record["examples"], record["cut_away"]) == (len(PAIRS), 1)
    with pytest.raises(ValueError, match="no example has a token of its completion within max_length=10"):
        train(tiny_model, tmp_path / "b", [long], max_length=10)
    with pytest.raises(ValueError, match=r"max_length=512 lets through 130 positions .*, and the model has 128"):
        train(tiny_model, tmp_path / "b", [{"prompt": "what " * 108, "completion": "w1"}], method="prompt-tuning")
    unknown = tiny_architecture("gpt2")
    unknown.config.model_type = "new"
    with pytest.raises(ValueError, match="ia3 has no default layers for a new model: pass target_modules"):
        preset("ia3").peft_config(unknown)
    assert not (tmp_path / "b").exists()
    with pytest.raises(ValueError, match=r"the loss is nan at step .*: the warm start has diverged"):
        train(tiny_model, tmp_path / "c", learning_rate=1e38, epochs=5, dropout=0.0)
    assert not (tmp_path / "c" / "adapter_config.json").exists()


def test_prompt_tuning_may_start_from_the_vocabulary(tiny_model, tmp_path):  # noqa: F811
    rows = load_model(str(tiny_model))[0].get_input_embeddings().weight.detach().float()
    for init, known in (("vocabulary", True), ("random", False)):
        train(tiny_model, tmp_path / init, method="prompt-tuning", prompt_init=init, learning_rate=1e-30)
        distances = (weights(tmp_path / init)["prompt_embeddings"][:, None] - rows).norm(dim=-1).amin(-1)
        assert ((distances < 1e-6) == known).all(), init


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return path


def test_the_command(tiny_model, pairs, tmp_path):  # noqa: F811
    arguments = ("warmstart", "--model", tiny_model, "--data", pairs, "--output", tmp_path / "o", "--split", "--json")
    done = run(
        *arguments, "--method", "p-tuning-v2", "--learning-rate", "1e-2", "--save-steps", "2,4", "--virtual-tokens", "3"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["settings"]["method"], report["settings"]["virtual_tokens"], report["complete"]) == (
        "p-tuning-v2",
        3,
        True,
    )
    assert sum(report["splits"].values()) == len(PAIRS)
    assert report["steps"] == report["splits"]["train"]
    assert "tok/s" in done.stderr
    assert Path(report["figure"]).read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "o" / "step-4" / "adapter_config.json").is_file()
    again = run(*arguments)
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1
    assert "holds a warm start already" in again.stderr
    assert is_complete(tmp_path / "o")


def test_a_killed_command_goes_on(tiny_model, pairs, tmp_path):  # noqa: F811
    def command(output, *more):
        run_options = ["--epochs", "25", "--learning-rate", "1e-3", "--checkpoint-steps", "20"]
        shared = ["--model", tiny_model, "--data", pairs, *run_options]
        return [sys.executable, "-m", "svdecode", "warmstart", *map(str, shared), "--output", str(output), *more]

    output = tmp_path / "killed"
    process = subprocess.Popen(command(output), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while last_checkpoint(output) is None and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert last_checkpoint(output) is not None
    assert not (output / "adapter_config.json").exists()
    resumed = subprocess.run(command(output, "--resume"), capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    train(tiny_model, tmp_path / "whole", epochs=25.0, learning_rate=1e-3)
    assert equal(output, tmp_path / "whole")
    assert read_record(output)["loss"] == read_record(tmp_path / "whole")["loss"]
