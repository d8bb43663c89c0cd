"""Every type of model, kind of adapter, mode and cache: each cell is right or refused.

A cell is right where its tokens are those of two separate models that keep nothing, each row alone. `python tests/matrix.py
NAME...` prints the cells of some types, or of all; with `--write` it also writes the refusals into docs/decoding.md.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from architectures import BUILT, causal_types, tiny_causal
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tiny import EOS, left_padded, randomise, separate, steered_logprobs, tiny_llama, two_model_logits
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.pytorch_utils import Conv1D

import svdecode
from svdecode.decoding import state
from svdecode.models.adapters import is_prompt_learning

PAGE = Path(__file__).parents[1] / "docs" / "decoding.md"
BEGIN, END = "<!-- refusals: python tests/matrix.py --write -->", "<!-- end of refusals -->"
RUN = "Types that were run:"
MU, ALPHA, STEPS = 1.7, 0.02, 4
OPTIONS = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": EOS, "pad_token_id": 0}


class Recompute(LlamaForCausalLM):
    """Logits of the last position from separate models, each row alone, nothing kept."""

    def forward(self, input_ids, attention_mask=None, **_):
        pre, ft = (logits[:, -1:] for logits in two_model_logits(self.pair, input_ids, attention_mask))
        if self.alone is not None:
            return CausalLMOutputWithPast(logits=(pre, ft)[self.alone])
        return CausalLMOutputWithPast(logits=steered_logprobs(pre, ft, MU, alpha=ALPHA))

    @classmethod
    def of(cls, pair: PeftModel, alone: int | None) -> Recompute:
        """Of both models, or of one of them alone: 0 is the pre-trained one, 1 the adapted one."""
        model = tiny_llama()
        model.__class__ = cls
        model.__dict__["pair"], model.alone = pair, alone
        return model


def _linear(model: nn.Module) -> list[str]:
    """The last parts of the names of the linear layers, without the head and what peft does not adapt."""
    head = model.get_output_embeddings()
    found = {n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head}
    refused = {"out_proj"} if any(n.endswith("conv1d") for n, _ in model.named_modules()) else set()
    return sorted(name for name in found - refused if not name.isdigit() and name not in ("router", "lm_head"))


ADAPTERS: dict[str, Callable[[nn.Module], object]] = {
    "LoRA": lambda model: LoraConfig(r=4, lora_alpha=6, target_modules=_linear(model), task_type="CAUSAL_LM"),
    "IA3": lambda model: IA3Config(target_modules=_linear(model), feedforward_modules=[], task_type="CAUSAL_LM"),
    "prompt tuning": lambda model: PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix tuning": lambda model: PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


@functools.lru_cache(maxsize=1)
def adapted(name: str, adapter: str) -> PeftModel:
    base = tiny_causal(name)
    model = get_peft_model(base, ADAPTERS[adapter](base))
    torch.manual_seed(3)
    randomise(model, scale=0.3)
    return model.eval()


@contextlib.contextmanager
def _static_preferred() -> Iterator[None]:
    with mock.patch.object(state, "_prefers_static", lambda steered: steered.mode != "lazy"):
        yield


def _thin(model: nn.Module, ids: Tensor, mask: Tensor, **options: object) -> Tensor:
    return svdecode.generate(model, ids, mask, max_new_tokens=STEPS, eos_token_id=EOS, **options)


def _generate(model: nn.Module, ids: Tensor, mask: Tensor, **options: object) -> Tensor:
    return model.generate(input_ids=ids, attention_mask=mask, **OPTIONS, **options)


WAYS: dict[str, tuple[Callable[..., Tensor], dict, int]] = {
    "greedy": (_generate, {}, 1),
    "beams": (_generate, {"num_beams": 2}, 2),
    "static": (_generate, {"cache_implementation": "static"}, 1),
    "thin greedy": (_thin, {}, 1),
    "thin beams": (_thin, {"num_beams": 2}, 2),
    "thin static": (_thin, {}, 1),
}


# In lazy and two_pass an adapter inside layers is a model like any other, with a cache of its own: one kind stands for all.
MODES = {
    "LoRA": ("paired", "lazy", "two_pass"),
    "IA3": ("paired",),
    "prompt tuning": ("paired", "two_pass"),
    "prefix tuning": ("paired",),
}
FEWER_WAYS = ("greedy", "beams", "thin greedy")


def ways_of(mode: str) -> tuple[str, ...]:
    """The ways that a mode is tried in."""
    return tuple(WAYS) if mode == "paired" else FEWER_WAYS


@functools.lru_cache(maxsize=8)
def _expected(model: PeftModel, beams: int, alone: int | None = None) -> list:
    ids, mask = left_padded((7, 4))
    return _ended(_generate(Recompute.of(model, alone), ids, mask, num_beams=beams, use_cache=False))


def _ended(tokens: Tensor) -> list[list[int]]:
    """Rows up to where they end: what fills them up is not the same in all loops."""
    rows = [row[7:] for row in tokens.tolist()]
    return [row[: row.index(EOS)] if EOS in row else row for row in rows]


def cell(name: str, adapter: str, mode: str) -> dict[str, str]:
    """What each way gives: "right", "refused: SENTENCE", "transformers" where a plain model is wrong too, or "wrong: ..."."""
    ways = ways_of(mode)
    try:
        model = adapted(name, adapter)
    except (ValueError, TypeError, AttributeError, NotImplementedError, KeyError) as error:
        return dict.fromkeys(ways, f"no adapter: {type(error).__name__}")
    ids, mask = left_padded((7, 4))
    try:
        steered = svdecode.steer(model, mu=MU, alpha=ALPHA, mode=mode)
    except (ValueError, TypeError) as error:
        return dict.fromkeys(ways, f"refused: {error}")
    found = {}
    for way in ways:
        run, options, beams = WAYS[way]
        try:
            expected = _expected(model, beams)
        except Exception as error:  # the plain models cannot be compared: peft or transformers fail on them
            found[way] = f"transformers: {type(error).__name__}"
            continue
        try:
            with _static_preferred() if way == "thin static" else contextlib.nullcontext():
                got = _ended(run(steered, ids, mask, **options))
            found[way] = (
                "right" if got == expected else _whose(model, options, beams, f"wrong: {got} and not {expected}")
            )
        except (ValueError, RuntimeError) as error:
            refused = isinstance(error, ValueError) or "mode='two_pass'" in str(error)
            found[way] = f"refused: {error}" if refused else _whose(model, options, beams, f"wrong: {error}")
        except Exception as error:
            found[way] = _whose(model, options, beams, f"wrong: {type(error).__name__} {error}")
    return found


def _whose(model: PeftModel, options: dict, beams: int, fault: str) -> str:
    """The fault, or "transformers" where a model alone has it, with this cache and this padding.

    The adapted model alone is no witness where it has virtual tokens: peft's own forward drops the positions of padded rows.
    """
    ids, mask = left_padded((7, 4))
    pre, ft, _off = separate(model)
    models = [pre.get_base_model()] if is_prompt_learning(model) else [pre.get_base_model(), ft]
    for alone, one in enumerate(models):
        try:
            if _padding_shows(one, two_model_logits(model, ids, mask)[alone], ids, mask):
                return "transformers: other logits where rows are padded"
            same = _ended(_generate(one, ids, mask, **options)) == _expected(model, beams, alone)
        except Exception as error:
            return f"transformers: {type(error).__name__}"
        if not same:
            return "transformers: other tokens with a cache"
    return fault


@torch.no_grad()
def _padding_shows(model: nn.Module, expected: Tensor, ids: Tensor, mask: Tensor) -> bool:
    """Whether a forward of padded rows has other logits than each row alone."""
    found = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return bool((found - expected)[mask.bool()].abs().max() > 1e-3)


def cells(
    names: list[str], adapters: list[str] | None = None, modes: list[str] | None = None
) -> Iterator[tuple[str, str, str, dict[str, str]]]:
    for name in names:
        for adapter in adapters or ADAPTERS:
            for mode in modes or MODES[adapter]:
                yield name, adapter, mode, cell(name, adapter, mode)


def sentence_of(outcome: str) -> str:
    """An outcome without what differs from type to type."""
    sentence = re.sub(r"model is an? \w+", "model is of this type", outcome.split("\n")[0])
    sentence = re.sub(r"\bSteered\w+", "this class", sentence)
    return re.sub(r"\([\w.]+ has one\)|cross-\w+ \d+|\d+ tokens", "...", sentence).strip()


def table(rows: list[tuple[str, str, str, dict[str, str]]]) -> str:
    """What is not right, by its sentence, as lines of Markdown."""
    by_sentence: dict[str, dict[tuple[str, str, str], list[str]]] = {}
    for name, adapter, mode, found in rows:
        for outcome in sorted(set(found.values()) - {"right"}):
            ways = ", ".join(way for way in WAYS if found.get(way) == outcome)
            ways = "all ways" if ways == ", ".join(ways_of(mode)) else ways
            by_sentence.setdefault(sentence_of(outcome), {}).setdefault((adapter, mode, ways), []).append(name)
    lines = [f"{RUN} {' '.join(sorted({name for name, *_ in rows}))}", ""]
    for sentence, places in sorted(by_sentence.items()):
        lines.append(f"- {sentence}")
        lines += [
            f"    - {a} | {m} | {ways} | {' '.join(sorted(names))}" for (a, m, ways), names in sorted(places.items())
        ]
    return "\n".join(lines)


@functools.cache
def listed() -> tuple[set[str], dict[tuple[str, str, str, str], set[str]]]:
    """Out of the documentation: the types that were run, and (type, adapter, mode, way) to its sentence."""
    text = PAGE.read_text()
    run: set[str] = set()
    found: dict[tuple[str, str, str, str], set[str]] = {}
    for line in text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip().splitlines():
        if line.startswith(RUN):
            run |= set(line.removeprefix(RUN).split())
        elif line.startswith("- "):
            sentence = line[2:]
        elif line.strip():
            adapter, mode, ways, names = line.strip().removeprefix("- ").split(" | ")
            for way in ways_of(mode) if ways == "all ways" else ways.split(", "):
                for name in names.split():
                    found.setdefault((name, adapter, mode, way), set()).add(sentence)
    return run, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="types of models; all where left out")
    parser.add_argument("--write", action="store_true", help="write the refusals into docs/decoding.md")
    parser.add_argument("--adapter", choices=ADAPTERS, action="append", help="kinds of adapters; all where left out")
    parser.add_argument("--mode", choices=MODES["LoRA"], action="append", help="modes; all where left out")
    arguments = parser.parse_args()
    rows = []
    for row in cells(arguments.names or sorted(BUILT & set(causal_types())), arguments.adapter, arguments.mode):
        rows.append(row)
        print(*row[:3], {way: outcome for way, outcome in row[3].items() if outcome != "right"} or "right", flush=True)
    if arguments.write:
        text = PAGE.read_text()
        new = f"{text[: text.index(BEGIN) + len(BEGIN)]}\n\n{table(rows)}\n\n{text[text.index(END) :]}"
        PAGE.write_text(new)


if __name__ == "__main__":
    main()
