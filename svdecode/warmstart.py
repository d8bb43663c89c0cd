"""A short parameter-efficient fine-tuning run: LoRA with transformers' Trainer, the loss on completions only."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from svdecode.data import check_examples, collate, encode, pad_token_id

ATTENTION_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]


class _Progress(TrainerCallback):
    """A bar on stderr with the loss, and the adapter saved after chosen steps."""

    def __init__(self, output: Path, save_steps: Sequence[int], show: bool) -> None:
        self.output, self.save_steps, self.show = output, set(save_steps), show

    def on_train_begin(self, args, state, control, **_) -> None:
        self.bar = tqdm(total=state.max_steps, desc="warm start", unit="step", disable=not self.show)

    def on_step_end(self, args, state, control, model=None, **_) -> None:
        self.bar.update()
        if state.global_step in self.save_steps:
            model.save_pretrained(step_folder(self.output, state.global_step))

    def on_log(self, args, state, control, logs=None, **_) -> None:
        if "loss" in (logs or {}):
            self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

    def on_train_end(self, args, state, control, **_) -> None:
        self.bar.close()


def step_folder(output: str | Path, step: int) -> Path:
    """Where the adapter after a step is saved."""
    return Path(output) / f"step-{step}"


def warmstart(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: object,
    output: str | Path,
    *,
    learning_rate: float = 3e-4,
    batch_size: int = 4,
    epochs: float = 1.0,
    rank: int = 8,
    lora_alpha: int = 16,
    lora_dropout: float = 0.1,
    target_modules: str | Sequence[str] | None = None,
    max_length: int = 512,
    save_steps: Sequence[int] = (),
    seed: int = 0,
    progress: bool = True,
) -> PeftModel:
    """Train a LoRA on prompt / completion pairs and save it to `output`.

    Args:
        model: the pre-trained model; adapter layers are put into it, as peft does.
        tokenizer: its tokenizer.
        examples: a list of {"prompt", "completion"} or a Dataset with those columns.
        output: folder for adapter_config.json and adapter_model.safetensors.
        learning_rate: peak, with linear decay.
        batch_size: examples a step.
        epochs: passes over the examples.
        rank: LoRA rank (paper: 8).
        lora_alpha: LoRA scale times rank (paper: 16).
        lora_dropout: on the LoRA input (paper: 0.1).
        target_modules: names of layers, or "all-linear"; None takes the attention projections where the model has
            q_proj, k_proj, v_proj and o_proj, else all linear layers.
        max_length: longer examples are cut.
        save_steps: the adapter is also saved after these steps, in `step_folder`.
        seed: of the data order, the dropout and the initial weights.
        progress: show a bar on stderr.
    """
    rows = [encode(example, tokenizer, max_length) for example in check_examples(examples)]
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    set_seed(seed)
    if target_modules is None:
        names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
        target_modules = ATTENTION_PROJECTIONS if set(ATTENTION_PROJECTIONS) <= names else "all-linear"
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=rank,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
            task_type="CAUSAL_LM",
        ),
    )
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=adapted,
            args=TrainingArguments(
                output_dir=scratch,
                per_device_train_batch_size=batch_size,
                num_train_epochs=epochs,
                learning_rate=learning_rate,
                logging_steps=5,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                remove_unused_columns=False,
                dataloader_pin_memory=False,
                seed=seed,
            ),
            train_dataset=rows,
            data_collator=lambda chosen: collate(chosen, pad_token_id(tokenizer)),
            callbacks=[_Progress(output, save_steps, progress)],
        )
        trainer.remove_callback(PrinterCallback)  # it prints to stdout
        trainer.train()
    adapted.eval()
    adapted.save_pretrained(output)
    return adapted
