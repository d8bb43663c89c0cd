"""The paper's four warm starts by name, with its hyper-parameters (section 4.1 and appendix E), and the peft config of each.

Where peft differs from the paper:

- `p-tuning-v2` is peft's prefix tuning with `prefix_projection`: key and value prefixes in every layer, made by an encoder.
  peft's encoder always is two linear layers with a tanh between them, `encoder_hidden_size` wide (the paper's 128 x 2); its
  depth can't be set, and there is no LSTM as in P-Tuning v1. What is saved is the prefix, not its encoder.
- `ia3` has no number to set; its layers are peft's choice for the architecture (keys, values and the feed-forward output).
- The paper says nothing of weight decay, warm-up or clipping: 0, 0, and transformers' gradient norm of 1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peft import IA3Config, LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
from transformers import PreTrainedModel, TrainingArguments

ATTENTION_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
IA3_PROJECTIONS = ["k_proj", "v_proj", "down_proj"]
FEED_FORWARD_OUTPUTS = (
    "down_proj",
    "fc2",
    "fc_out",
    "w2",
    "c_proj",
    "mlp.c_proj",
    "dense_4h_to_h",
    "mlp.dense_4h_to_h",
)
AUTO = "auto"
KEPT_CHECKPOINTS = 2
PROMPT_INITS = {"random": "RANDOM", "vocabulary": "SAMPLE_VOCAB"}


@dataclass(frozen=True)
class Preset:
    """How to train one adapter. None where a setting has no meaning for the method."""

    method: str
    """One of `PRESETS`."""
    learning_rate: float = 5e-5
    """Peak, with linear decay to 0."""
    epochs: float = 1.0
    """Passes over the examples."""
    batch_size: int = 1
    """Examples per forward, on each device."""
    gradient_accumulation: int = 1
    """Forwards per step."""
    max_length: int = 512
    """Tokens of prompt and completion together; longer examples are cut at the end."""
    warmup: float = 0.0
    """Steps until the peak learning rate; below 1 a share of all steps."""
    weight_decay: float = 0.0
    """AdamW's."""
    seed: int = 0
    """Of the data order, the dropout and the initial weights."""
    rank: int | None = None
    """LoRA rank."""
    lora_alpha: float | None = None
    """LoRA scale times rank."""
    dropout: float | None = None
    """On the LoRA input."""
    target_modules: str | tuple[str, ...] | None = None
    """Names of layers, "all-linear", or "auto": LoRA takes the attention projections where the model has q_proj, k_proj,
    v_proj and o_proj, else all linear layers; IA3 takes peft's layers for the architecture."""
    virtual_tokens: int | None = None
    """Length of the learnt prompt or prefix."""
    prompt_init: str | None = None
    """Prompt tuning starts from "random" vectors (peft's default) or from embeddings of the "vocabulary"."""
    encoder_hidden_size: int | None = None
    """Width of P-Tuning v2's encoder."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "gradient_accumulation", "rank", "virtual_tokens", "encoder_hidden_size"):
            _check(name, getattr(self, name), whole=True, low=1)
        _check("max_length", self.max_length, whole=True, low=2)
        _check("seed", self.seed, whole=True, low=0)
        for name in ("learning_rate", "epochs", "lora_alpha"):
            _check(name, getattr(self, name), low=0, open_end=True)
        _check("warmup", self.warmup, low=0)
        _check("weight_decay", self.weight_decay, low=0)
        _check("dropout", self.dropout, low=0, below=1)
        if self.prompt_init is not None and self.prompt_init not in PROMPT_INITS:
            raise ValueError(f"prompt_init must be one of {', '.join(PROMPT_INITS)}, got {self.prompt_init!r}")
        if self.target_modules is not None and not self.target_modules:
            raise ValueError("target_modules is empty")

    def peft_config(self, model: PreTrainedModel) -> PeftConfig:
        """The peft config of this adapter for `model`; ValueError where it has no layers for the method."""
        return _CONFIGS[self.method](self, model)

    def total_steps(self, examples: int, processes: int = 1) -> int:
        """Steps that Trainer makes of so many examples."""
        forwards = -(-examples // (self.batch_size * processes))
        return math.ceil(self.epochs * -(-forwards // self.gradient_accumulation))

    def training_arguments(self, folder: str | Path, checkpoint_steps: int) -> TrainingArguments:
        """Trainer's arguments: checkpoints in `folder` after every so many steps (0: none), nothing printed, a log per step."""
        arguments = TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=self.batch_size,
            gradient_accumulation_steps=self.gradient_accumulation,
            num_train_epochs=self.epochs,
            learning_rate=self.learning_rate,
            warmup_steps=self.warmup,
            weight_decay=self.weight_decay,
            logging_steps=1,
            logging_nan_inf_filter=False,
            include_num_input_tokens_seen="non_padding",
            save_strategy="steps" if checkpoint_steps else "no",
            save_steps=checkpoint_steps or 1,
            save_total_limit=KEPT_CHECKPOINTS,
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            ddp_find_unused_parameters=False,  # each adapter weight takes part in every forward
            seed=self.seed,
        )
        # Several GPUs without a launcher would become DataParallel, and a batch of 1 a batch of 8.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        return arguments


def _check(
    name: str,
    value: object,
    *,
    low: float,
    below: float = math.inf,
    whole: bool = False,
    open_end: bool = False,
) -> None:
    if value is None:
        return
    number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not number or not (low < value if open_end else low <= value) or not value < below:
        bound = "above" if open_end else "of at least"
        kind = "an integer" if whole else "a number"
        upper = f" and below {below:g}" if below < math.inf else ""
        raise ValueError(f"{name} must be {kind} {bound} {low:g}{upper}, got {value!r}")


PRESETS: dict[str, Preset] = {
    "lora": Preset("lora", rank=8, lora_alpha=16, dropout=0.1, target_modules=AUTO),
    "ia3": Preset("ia3", target_modules=AUTO),
    "prompt-tuning": Preset("prompt-tuning", virtual_tokens=20, prompt_init="random"),
    "p-tuning-v2": Preset("p-tuning-v2", virtual_tokens=20, encoder_hidden_size=128),
}
"""The paper's settings: learning rate 5e-5, one epoch, batches of 1, length 512, and each method's own."""


def preset(method: str = "lora", **overrides: object) -> Preset:
    """A preset with some settings replaced; None leaves one as it is.

    Raises:
        ValueError: no such method or setting, a setting of another method, or a value out of range.
    """
    if method not in PRESETS:
        raise ValueError(f"method must be one of {', '.join(PRESETS)}, got {method!r}")
    chosen, given = PRESETS[method], {name: value for name, value in overrides.items() if value is not None}
    known = {field.name for field in dataclasses.fields(Preset)} - {"method"}
    for name in given:
        if name not in known:
            raise ValueError(f"{name} is not a setting of a warm start: {', '.join(sorted(known))}")
        if getattr(chosen, name) is None:
            owners = [other for other, values in PRESETS.items() if getattr(values, name) is not None]
            raise ValueError(f"{name} is a setting of {' and '.join(owners)}, not of {method}")
    modules = given.get("target_modules")
    if modules is not None and not isinstance(modules, str):
        given["target_modules"] = tuple(modules)
    return dataclasses.replace(chosen, **given)


def layer_names(model: PreTrainedModel) -> set[str]:
    """The last parts of the names of the model's modules."""
    return {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}


def _chosen(target_modules: str | Sequence[str]) -> str | list[str]:
    return target_modules if isinstance(target_modules, str) else list(target_modules)


def _lora(settings: Preset, model: PreTrainedModel) -> PeftConfig:
    targets = settings.target_modules
    if targets == AUTO:
        targets = ATTENTION_PROJECTIONS if set(ATTENTION_PROJECTIONS) <= layer_names(model) else "all-linear"
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.dropout,
        target_modules=_chosen(targets),
        task_type="CAUSAL_LM",
    )


def _ia3(settings: Preset, model: PreTrainedModel) -> PeftConfig:
    targets = settings.target_modules
    if targets == AUTO and model.config.model_type in TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING:
        return IA3Config(task_type="CAUSAL_LM")  # peft knows the layers
    names = layer_names(model)
    if targets == AUTO:
        if not set(IA3_PROJECTIONS) <= names:
            raise ValueError(f"ia3 has no default layers for a {model.config.model_type} model: pass target_modules")
        targets = IA3_PROJECTIONS
    outputs = [name for name in FEED_FORWARD_OUTPUTS if name in (names if isinstance(targets, str) else targets)]
    # A feed-forward layer is scaled on its input, every other one on its output.
    return IA3Config(target_modules=_chosen(targets), feedforward_modules=outputs, task_type="CAUSAL_LM")


def _prompt_tuning(settings: Preset, model: PreTrainedModel) -> PeftConfig:
    return PromptTuningConfig(
        num_virtual_tokens=settings.virtual_tokens,
        prompt_tuning_init=PROMPT_INITS[settings.prompt_init],
        task_type="CAUSAL_LM",
    )


def _p_tuning_v2(settings: Preset, model: PreTrainedModel) -> PeftConfig:
    return PrefixTuningConfig(
        num_virtual_tokens=settings.virtual_tokens,
        prefix_projection=True,
        encoder_hidden_size=settings.encoder_hidden_size,
        task_type="CAUSAL_LM",
    )


_CONFIGS = {"lora": _lora, "ia3": _ia3, "prompt-tuning": _prompt_tuning, "p-tuning-v2": _p_tuning_v2}
