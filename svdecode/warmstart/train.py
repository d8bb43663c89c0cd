"""A short parameter-efficient fine-tuning run with transformers' Trainer, the loss on completions only."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import math
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback, TrainerState

from svdecode.common.distributed import is_main, rank_and_size, wait
from svdecode.constants import IGNORE_INDEX
from svdecode.data.batches import collate, encode, pad_token_id
from svdecode.data.examples import check_examples
from svdecode.data.splits import Splits
from svdecode.models.adapters import adapter_fingerprint
from svdecode.models.loading import load_adapter
from svdecode.models.reach import most_positions
from svdecode.warmstart.folder import (
    CHECKPOINTS,
    check_output,
    check_resumable,
    clear,
    has_record,
    is_complete,
    last_checkpoint,
    save_adapter,
    step_folder,
    write_record,
)
from svdecode.warmstart.presets import Preset, preset

_TRAINED_NAME = "trained.safetensors"


class _Progress(TrainerCallback):
    """A bar on stderr with the loss and the speed, and the adapter saved after chosen steps."""

    def __init__(self, output: Path, save_steps: Sequence[int], splits: Splits, show: bool) -> None:
        self.output, self.save_steps, self.splits, self.show = output, set(save_steps), splits, show
        self.bar: Any = None

    def on_train_begin(self, args, state, control, **_) -> None:
        self.start, self.tokens_before = time.perf_counter(), state.num_input_tokens_seen
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="warm start",
            unit="step",
            disable=not (self.show and state.is_world_process_zero),
        )

    def on_step_end(self, args, state, control, model: Any = None, **_) -> None:
        self.bar.update()
        if state.global_step in self.save_steps and state.is_world_process_zero:
            folder = step_folder(self.output, state.global_step)
            save_adapter(model, folder)
            self.splits.save(folder)

    def on_log(self, args, state, control, logs=None, **_) -> None:
        if logs is None or "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise ValueError(
                f"the loss is {logs['loss']} at step {state.global_step}: the warm start has diverged, "
                f"try a learning_rate below {args.learning_rate:g}"
            )
        speed = (state.num_input_tokens_seen - self.tokens_before) / (time.perf_counter() - self.start)
        self.bar.set_postfix_str(f"loss={logs['loss']:.3f}, {speed:.0f} tok/s", refresh=False)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self.bar is not None:
            self.bar.close()


class _AdapterTrainer(Trainer):
    """Checkpoints hold the trained tensors as they are: peft's format drops the encoder of P-Tuning v2."""

    def _save(self, output_dir: Any = None, state_dict=None) -> None:
        if self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            tensors = {name: p.detach().cpu().contiguous() for name, p in _trained(self.model).items()}
            save_file(tensors, Path(output_dir) / _TRAINED_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: Any, model=None) -> None:
        saved, trained = load_file(Path(resume_from_checkpoint) / _TRAINED_NAME), _trained(self.model)
        if {n: t.shape for n, t in saved.items()} != {n: p.shape for n, p in trained.items()}:
            raise ValueError(f"the checkpoint {resume_from_checkpoint} is of another model or another adapter")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(saved[name])


def _trained(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _check_steps(save_steps: Sequence[int], checkpoint_steps: int) -> None:
    if not isinstance(checkpoint_steps, int) or checkpoint_steps < 0:
        raise ValueError(f"checkpoint_steps must be an integer of at least 0, got {checkpoint_steps!r}")
    if any(not isinstance(step, int) or step < 1 for step in save_steps):
        raise ValueError(f"save_steps must be integers above 0, got {list(save_steps)}")


def warmstart(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: object,
    output: str | Path,
    *,
    method: str = "lora",
    splits: Splits | None = None,
    save_steps: Sequence[int] = (),
    checkpoint_steps: int = 0,
    resume: bool = False,
    overwrite: bool = True,
    progress: bool = True,
    **overrides: object,
) -> PeftModel:
    """Train an adapter on prompt / completion pairs and save it to `output`.

    The forward runs in the model's dtype (`load_model` takes bfloat16 where the machine is fast at it); the adapter and the
    optimizer's states are float32. On several processes each takes its share of every batch, as Trainer does.

    Args:
        model: the pre-trained model; adapter layers are put into it, as peft does.
        tokenizer: its tokenizer.
        examples: a list of {"prompt", "completion"} or a Dataset with those columns.
        output: folder for adapter_config.json, adapter_model.safetensors and the records.
        method: a name in `svdecode.warmstart.presets.PRESETS`: lora, ia3, prompt-tuning or p-tuning-v2, with the settings of
            the paper.
        splits: train on its "train" part of `examples` only. None trains on all, and the record says so.
        save_steps: the adapter is also saved after these steps, in `step_folder`.
        checkpoint_steps: steps between checkpoints for `resume` (the last two are kept); 0 for none.
        resume: go on from the last checkpoint in `output`, from the start where there is none; the result is that of an
            uninterrupted run. A complete run is loaded.
        overwrite: whether another run's adapter in `output` may be replaced. It is removed before the training starts.
        progress: show a bar on stderr.
        **overrides: settings of `svdecode.warmstart.presets.Preset` that differ from the preset, such as `learning_rate`.

    Raises:
        ValueError: a setting out of range or of another method, no example with a token to learn, an `output` that is taken,
            a `resume` with other settings or data, or a loss that is not finite.
        ImportError: accelerate is missing.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise ImportError("a warm start needs accelerate: pip install 'svdecode[train]'")
    settings, output = preset(method, **overrides), Path(output)
    _check_steps(save_steps, checkpoint_steps)
    check_output(output, resume=resume, overwrite=overwrite)
    examples = check_examples(examples)
    splits = splits or Splits.everything(examples)
    chosen = splits.select(examples, "train")
    rows = _encoded(chosen, tokenizer, settings, model)
    total = settings.total_steps(len(rows), rank_and_size()[1])
    if max(save_steps, default=0) > total:
        raise ValueError(f"save_steps has {max(save_steps)}, but the warm start has {total} steps")
    record = {
        "complete": False,
        "model": model.config.name_or_path,
        "settings": json.loads(json.dumps(dataclasses.asdict(settings))),  # as they will be read back
        "examples": len(rows),
        "cut_away": len(chosen) - len(rows),
        "tokens_sha256": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
    }
    resume = resume and has_record(output)
    if resume:
        check_resumable(output, record)
        if is_complete(output):
            return load_adapter(model, output)
    set_seed(settings.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads a name of transformers that has been replaced
        adapted = get_peft_model(model, settings.peft_config(model))
    if is_main() and not resume:
        clear(output)
        splits.save(output)
        write_record(output, record)
    wait()
    bar = _Progress(output, save_steps, splits, progress)
    start = time.perf_counter()
    state = _train(adapted, rows, settings, pad_token_id(tokenizer), output, checkpoint_steps, resume, bar)
    if is_main():
        save_adapter(adapted, output)
        done = {"complete": True, "adapter": adapter_fingerprint(adapted), "seconds": time.perf_counter() - start}
        write_record(output, record | done | _history(state))
    wait()
    return adapted


def _train(
    adapted: PeftModel,
    rows: Any,
    settings: Preset,
    pad: int,
    output: Path,
    checkpoint_steps: int,
    resume: bool,
    bar: _Progress,
) -> TrainerState:
    """Run Trainer to the end, from the last checkpoint with `resume`; the model is left in eval mode."""
    with contextlib.ExitStack() as stack:
        stack.callback(bar.close)
        folder = output / CHECKPOINTS if checkpoint_steps else stack.enter_context(tempfile.TemporaryDirectory())
        trainer = _AdapterTrainer(
            model=adapted,
            args=settings.training_arguments(folder, checkpoint_steps),
            train_dataset=rows,
            data_collator=lambda chosen: collate(chosen, pad),
            callbacks=[bar],
        )
        trainer.remove_callback(PrinterCallback)  # it prints to stdout
        trainer.train(resume_from_checkpoint=last_checkpoint(output) if resume else None)
    adapted.eval()
    return trainer.state


def _history(state: TrainerState) -> dict[str, object]:
    """Steps, tokens of prompts and completions, and the loss of each step in nats per completion token."""
    losses = [
        {name: entry[name] for name in ("step", "loss", "learning_rate")}
        for entry in state.log_history
        if "loss" in entry
    ]
    return {"steps": state.global_step, "tokens": state.num_input_tokens_seen, "loss": losses}


def _encoded(
    examples: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase, settings: Preset, model: PreTrainedModel
) -> list[dict[str, list[int]]]:
    """Token ids and labels of the examples that have something to learn within `max_length`."""
    rows = [encode(example, tokenizer, settings.max_length) for example in examples]
    rows = [row for row in rows if any(label != IGNORE_INDEX for label in row["labels"][1:])]
    if not rows:
        raise ValueError(f"no example has a token of its completion within max_length={settings.max_length}")
    longest = max(len(row["input_ids"]) for row in rows) + (settings.virtual_tokens or 0)
    limit = most_positions(model) or longest
    if longest > limit:
        raise ValueError(
            f"max_length={settings.max_length} lets through {longest} positions (virtual tokens included), "
            f"and the model has {limit}"
        )
    return rows
