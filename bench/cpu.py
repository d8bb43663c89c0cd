"""Time the C++ operators on a CPU against eager PyTorch, torch.compile and the memory, in one process.

    python bench/cpu.py --threads 1 [--rows ...] [--vocabularies ...] [--output FILE]

For each shape all variants take turns, on inputs that rotate through more memory than the caches hold; medians over the rounds.
Each variant is timed in two ways: its log-probs go into a buffer that is reused (svdecode's out=, `out.copy_` in the compiled
function, log_softmax(out=) in eager), and into a fresh tensor per call. The rivals are the method's formulas without the
handling of infinities and NaN.

    all        log-probs, KL and the moments of a label             greedy    the most probable steered token
    logprobs   log-probs alone (return_kl=False, no labels)         bound     torch.add of both inputs into the output's memory

One process times one number of threads: torch.compile fixes it when it compiles.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from inputs import gold_labels, rotation
from rivals import MU, all_into, logprobs_into, rival_all, rival_greedy, rival_logprobs

import svdecode
from svdecode.common.tables import markdown_table
from svdecode.common.timing import in_turns, microseconds, processor_name
from svdecode.constants import ALPHA, EPS

RIVALS = ("compiled", "eager")
WAYS = {"reused": "into a buffer that is reused", "fresh": "fresh output"}


def variants(rows: int, vocabulary: int) -> dict[str, dict[str, Callable]]:
    """What is timed, by output; the names end in the way where there are two."""
    torch._dynamo.reset()
    out, labels = torch.empty(rows, vocabulary), gold_labels(rows, vocabulary)
    functions = (rival_all, all_into, rival_logprobs, logprobs_into, rival_greedy)
    compiled = {function.__name__: torch.compile(function) for function in functions}
    return {
        "all": {
            "svdecode reused": lambda a, z: svdecode.fused_steer(a, z, MU, labels=labels, out=out),
            "eager reused": lambda a, z: rival_all(a, z, labels, out),
            "compiled reused": lambda a, z: compiled["all_into"](a, z, labels, out),
            "svdecode fresh": lambda a, z: svdecode.fused_steer(a, z, MU, labels=labels),
            "eager fresh": lambda a, z: rival_all(a, z, labels),
            "compiled fresh": lambda a, z: compiled["rival_all"](a, z, labels),
        },
        "logprobs": {
            "svdecode reused": lambda a, z: svdecode.fused_steer(a, z, MU, return_kl=False, out=out),
            "eager reused": lambda a, z: rival_logprobs(a, z, out),
            "compiled reused": lambda a, z: compiled["logprobs_into"](a, z, out),
            "bound reused": lambda a, z: torch.add(a, z, out=out),
            "svdecode fresh": lambda a, z: svdecode.fused_steer(a, z, MU, return_kl=False),
            "eager fresh": rival_logprobs,
            "compiled fresh": compiled["rival_logprobs"],
            "bound fresh": lambda a, z: torch.add(a, z, out=torch.empty(rows, vocabulary)),
        },
        "greedy": {
            "svdecode": lambda a, z: svdecode.steer_sample(a, z, MU, temperature=0.0),
            "eager": rival_greedy,
            "compiled": compiled["rival_greedy"],
        },
    }


def measure(rows: int, vocabulary: int, dtype: torch.dtype, rivals: list[str], seconds: float) -> list[dict]:
    """All outputs at one shape."""
    pairs = rotation(rows, vocabulary, dtype)
    results = []
    for output, calls in variants(rows, vocabulary).items():
        timed = {name: call for name, call in calls.items() if name.split()[0] in ("svdecode", "bound", *rivals)}
        times = in_turns(timed, pairs, seconds=seconds)
        shape = {"output": output, "rows": rows, "vocabulary": vocabulary, "dtype": str(dtype).removeprefix("torch.")}
        results.append({**shape, "rounds": len(next(iter(times.values()))), **microseconds(times)})
    return results


def call_overhead() -> dict[str, float]:
    """Microseconds of one call at V = 64, the best of many: through the Python wrapper, and torch.ops directly."""
    from svdecode.ops import compiled

    a, z = torch.randn(1, 64), torch.randn(1, 64)
    numbers = compiled._numbers(ALPHA, -math.inf, EPS, "kl", MU, compiled.DENSE | compiled.RETURN_KL)
    direct = torch.ops.svdecode_compiled.fused_steer.default
    calls = {
        "wrapper": lambda: svdecode.fused_steer(a, z, MU),
        "torch.ops": lambda: direct(a, z, numbers),
        "torch.empty(1)": lambda: torch.empty(1),
    }
    best = dict.fromkeys(calls, math.inf)
    for _ in range(150):  # short bursts: other processes leave some of them alone
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(200):
                call()
            best[name] = min(best[name], 5e3 * (time.perf_counter() - start))
    return best


def shapes_of(report: dict) -> dict[tuple, dict[str, dict]]:
    """The results by (rows, vocabulary, dtype) and output."""
    found: dict[tuple, dict[str, dict]] = {}
    for row in report["results"]:
        found.setdefault((row["rows"], row["vocabulary"], row["dtype"]), {})[row["output"]] = row
    return found


def cells(row: dict, way: str = "") -> list[str]:
    """svdecode's microseconds with their quartiles, and how often the rivals' times contain it."""
    us, ours = row["us"], f"svdecode{way}"
    low, high = row["quartiles_us"][ours]
    rivals = (us.get(f"{rival}{way}") for rival in RIVALS)
    return [
        f"{us[ours]:.0f} ({low:.0f}-{high:.0f})",
        *("" if them is None else f"{them / us[ours]:.1f}" for them in rivals),
    ]


def tables(report: dict) -> str:
    """Markdown: a table for each way, and one for the token alone, which needs no (rows, V) output."""
    threads = "1 thread" if report["threads"] == 1 else f"{report['threads']} threads"
    head = ["rows x V", "dtype"]
    rivals = ["x compile", "x eager"]
    text = f"{report['cpu']}, {report['instruction_set']}, {threads}, torch {report['torch']}, {report['date']}\n"
    shapes = shapes_of(report)
    for way, title in WAYS.items():
        rows = []
        for (count, vocabulary, dtype), found in shapes.items():
            us = found["logprobs"]["us"]
            bound = f"{us[f'bound {way}'] / us[f'svdecode {way}']:.0%}"
            parts = [cells(found[output], f" {way}") for output in ("all", "logprobs")]
            rows.append([f"{count} x {vocabulary:,}", dtype, *parts[0], *parts[1], bound])
        columns = [*head, "all us (quartiles)", *rivals, "logprobs us (quartiles)", *rivals, "of bound"]
        text += f"\n{threads}, {title}:\n\n{markdown_table(columns, rows)}"
    rows = [[f"{count} x {v:,}", dtype, *cells(found["greedy"])] for (count, v, dtype), found in shapes.items()]
    text += f"\n{threads}, the most probable token alone:\n\n"
    text += markdown_table([*head, "greedy us (quartiles)", *rivals], rows)
    overhead = ", ".join(f"{name} {us:.1f} us" for name, us in report["call_overhead_us"].items())
    return f"{text}\nOne call at V = 64: {overhead}."


def main() -> None:
    """Measure, print the tables, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8, 64])
    parser.add_argument("--vocabularies", type=int, nargs="*", default=[49_152, 151_936])
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--rivals", nargs="*", choices=RIVALS, default=RIVALS)
    parser.add_argument("--seconds", type=float, default=1.0, help="per variant, shape and output")
    parser.add_argument("--output", type=Path, help="JSON goes here")
    arguments = parser.parse_args()
    found = svdecode.backends()["cpu"]
    if not found:
        parser.error(f"the C++ operators are not here: {found.reason}")
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    report = {
        "cpu": processor_name(),
        "instruction_set": found.reason,
        "threads": arguments.threads,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "call_overhead_us": call_overhead(),
        "results": [],
    }
    for vocabulary in arguments.vocabularies:
        for rows in arguments.rows:
            for dtype in arguments.dtypes:
                found = measure(rows, vocabulary, getattr(torch, dtype), arguments.rivals, arguments.seconds)
                report["results"] += found
                print(f"{rows} x {vocabulary} {dtype} done", file=sys.stderr)
                if arguments.output:  # a run that is stopped keeps what it has
                    arguments.output.parent.mkdir(parents=True, exist_ok=True)
                    arguments.output.write_text(json.dumps(report, indent=1))
    print(tables(report))


if __name__ == "__main__":
    main()
