"""Tokens per second of a steered vLLM engine over plain ones, in turns, in one run: medians of rounds.

    make test-serving                                   # once, for the environment
    .venv-serving/bin/python bench/serving.py           # SmolLM2-135M, float32 and bfloat16, batches 1, 8 and 32
    .venv-serving/bin/python bench/serving.py --dtype bfloat16 --eager --rounds 5 --json serving.json

Each engine has a process of its own, and only the one that is asked works:

    merged      the adapted model alone, its LoRA merged into the weights: the price of one model
    steered     both models in one engine
    pretrained  the pre-trained model alone. Its time and that of `merged` together are those of two servers asked in turn

The LoRA is random, r 8, on all linear layers. The same script runs on a GPU.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

for name, value in {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # bound, the engines share a core with whatever else runs on it
    "VLLM_LOGGING_LEVEL": "ERROR",
}.items():
    os.environ.setdefault(name, value)
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in the process that times it

from svdecode.common.files import to_json, write_atomically  # noqa: E402  (torch reads the environment)
from svdecode.common.timing import processor_name  # noqa: E402

KINDS = ("merged", "steered", "pretrained")
PROMPT, NEW, MU = 64, 24, 0.5
LONGEST = 512


def prepare(folder: Path, model: Path) -> None:
    """Write a random LoRA for the model, and the model with it merged in."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(base, lora)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    adapted.save_pretrained(folder / "lora")
    adapted.merge_and_unload().save_pretrained(folder / "merged")
    AutoTokenizer.from_pretrained(model).save_pretrained(folder / "merged")


def serve_bench(kind: str, model: Path, folder: Path, dtype: str, eager: bool, batches: list[int]) -> None:
    """One engine: it reads a batch from each line of stdin, and writes what it took to stdout."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever vLLM prints
    from vllm import LLM, SamplingParams

    import svdecode.serving.model as steered_model
    from svdecode.serving import engine_args

    spent = [0.0]

    def timed(function):
        @functools.wraps(function)
        def run(*arguments):
            start = time.perf_counter()
            result = function(*arguments)
            spent[0] += time.perf_counter() - start
            return result

        return run

    steered_model.steered_scores = timed(steered_model.steered_scores)
    options = {
        "dtype": dtype, "max_model_len": LONGEST, "enforce_eager": eager, "max_num_seqs": max(batches),
        "max_num_batched_tokens": max(2048, LONGEST), "enable_prefix_caching": False, "skip_tokenizer_init": True,
    }  # fmt: skip
    if kind == "steered":
        llm = LLM(**engine_args(model, folder / "lora", mu=MU, **options))
    else:
        llm = LLM(str(folder / "merged" if kind == "merged" else model), **options)
    core = llm.llm_engine.engine_core.engine_core
    cache = core.scheduler.kv_cache_config
    tokens = cache.num_blocks * cache.kv_cache_groups[0].kv_cache_spec.block_size
    numbers = random.Random(0)

    def ask(batch: int, new: int) -> float:
        inputs = [{"prompt_token_ids": [numbers.randrange(3, 49000) for _ in range(PROMPT)]} for _ in range(batch)]
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        llm.generate(inputs, params, use_tqdm=False)
        return time.perf_counter() - start

    for batch in batches:
        ask(batch, 2)
    print(json.dumps({"tokens in the cache": tokens}), file=out, flush=True)
    for line in sys.stdin:
        batch = int(line)
        prompt = ask(batch, 1)
        spent[0] = 0.0
        whole = ask(batch, 1 + NEW)
        found = {"prompt": prompt, "decode": whole - prompt, "steering": spent[0] * NEW / (NEW + 1)}
        print(json.dumps(found), file=out, flush=True)


class Engine:
    """A process with one engine."""

    def __init__(self, kind: str, options: list[str]) -> None:
        """Start it, and wait until it has answered once.

        Args:
            kind: one of `KINDS`.
            options: what its process is given.
        """
        command = [sys.executable, __file__, "--engine", kind, *options]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.capacity = json.loads(self._line())["tokens in the cache"]

    def _line(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the engine ended with status {self._process.wait()}")
        return line

    def ask(self, batch: int) -> dict[str, float]:
        """Seconds of a batch's prompts, of its decoding, and of steering within it."""
        print(batch, file=self._process.stdin, flush=True)
        return json.loads(self._line())

    def close(self) -> None:
        """End it."""
        self._process.stdin.close()
        self._process.wait()


def compare(dtype: str, batches: list[int], rounds: int, options: list[str]) -> list[dict[str, object]]:
    """A row per batch: tokens per second, and what they are over one model and over two servers."""
    engines = {kind: Engine(kind, [*options, "--dtype", dtype]) for kind in KINDS}
    rows = []
    for batch in batches:
        taken: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
        for turn in range(rounds):
            for kind in KINDS if turn % 2 == 0 else reversed(KINDS):
                taken[kind].append(engines[kind].ask(batch))
        median = {
            kind: {part: statistics.median(one[part] for one in ones) for part in ones[0]}
            for kind, ones in taken.items()
        }
        decode = {kind: median[kind]["decode"] for kind in KINDS}
        prompt = {kind: median[kind]["prompt"] for kind in KINDS}
        rates = sorted(batch * NEW / one["decode"] for one in taken["steered"])
        row = {
            "dtype": dtype, "batch": batch, "load": os.getloadavg()[0],
            "merged, tokens/s": batch * NEW / decode["merged"],
            "steered, tokens/s": batch * NEW / decode["steered"], "steered, range": [rates[0], rates[-1]],
            "decode, over one model": decode["merged"] / decode["steered"],
            "decode, over two servers": (decode["merged"] + decode["pretrained"]) / decode["steered"],
            "prompt, over one model": prompt["merged"] / prompt["steered"],
            "prompt, over two servers": (prompt["merged"] + prompt["pretrained"]) / prompt["steered"],
            "share of the steering operator": median["steered"]["steering"] / decode["steered"],
            "tokens in the cache": {kind: engine.capacity for kind, engine in engines.items()},
        }  # fmt: skip
        rows.append(row)
        print(to_json(row), flush=True)
    for engine in engines.values():
        engine.close()
    return rows


def main() -> None:
    """The arguments; with --engine, one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a model; left out: the bundled SmolLM2-135M-Instruct")
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--engine", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    batches = [int(word) for word in given.batches.split(",")]
    if given.engine:
        serve_bench(given.engine, given.model, given.folder, given.dtype[0], given.eager, batches)
        return
    from svdecode.serving.bundled import bundled_folder

    model = given.model or bundled_folder()
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), model)
        options = ["--model", str(model), "--folder", folder, "--batches", given.batches]
        options += ["--eager"] if given.eager else []
        rows = [
            row
            for dtype in given.dtype or ["float32", "bfloat16"]
            for row in compare(dtype, batches, given.rounds, options)
        ]
    report = {"processor": processor_name(), "threads": os.environ.get("OMP_NUM_THREADS"), "rows": rows}
    if given.json:
        write_atomically(given.json, to_json(report, indent=2).encode())


if __name__ == "__main__":
    main()
