"""Predicted times of the operators on peaked rows: the launches of `kernel_work.py` on the multiprocessor of `processor.py`.

Every figure here is a model, not a measurement. Programs are dealt out evenly over the processors of a card; one processor is
run from its first program to its last. Launches follow one another.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace

from baselines import BASELINES, compile_baseline
from kernel_counts import Kernel, compile_triton, find_cuda, find_variant
from kernel_work import OPERATORS, Launch, constants_of
from processor import SCHEDULERS, Card, Program, Timeline, run

FIRST_LAUNCH, NEXT_LAUNCH = 2.0e-6, 1.2e-6
"""Seconds that the first and each further node of a graph costs beside its programs; assumed."""
WAVES = 8
"""Programs simulated, as a multiple of those that fit at once; longer launches go on at the rate of these."""
LINK = 64
"""Bytes per clock between a processor and the L2 cache: no processor reads faster, however idle the others are."""
LOOKUP = 1 / 3
"""Part of the L2 cache's latency that a lookup takes on average, since each brings the next ones into L1; assumed."""
LIMIT = 0.85
"""From this use on, the memory, the schedulers or a pipe limit a launch; below, waiting does ("latency")."""


@functools.cache
def kernel_of(launch: Launch, vocabulary: int, target: int) -> Kernel:
    """The compiled kernel of a launch, with the constants that follow from the vocabulary."""
    if launch.source is not None:
        return find_cuda(launch.source, launch.kernel, target)
    variant = find_variant(launch.kernel, dict(launch.constants))
    sizes = {key: value for key, value in constants_of(vocabulary).items() if key in variant.constants}
    return compile_triton(variant._replace(constants={**variant.constants, **sizes}), target)


@functools.cache
def program_of(launch: Launch, vocabulary: int, target: int, other: bool) -> Program:
    """What most programs of a launch, or the other ones, execute."""
    return kernel_of(launch, vocabulary, target).program(launch.other if other else launch.usual)


@functools.cache
def run_mixed(usual: Program, other: Program, share: float, count: int, card: Card, resident: int) -> Timeline:
    """A run of `count` programs, the other ones evenly among the usual ones."""
    programs = [other if int((i + 1) * share) > int(i * share) else usual for i in range(count)]
    return run(programs, card, resident)


def launch_seconds(launch: Launch, rows: int, vocabulary: int, card: Card) -> tuple[float, Timeline]:
    """Seconds of the programs of one launch, and the run of one processor behind them."""
    usual, other = (program_of(launch, vocabulary, card.target, kind) for kind in (False, True))
    per_row = launch.programs(rows, vocabulary)
    active = min(card.processors, rows * per_row)
    own = math.ceil(rows * per_row / card.processors)
    rate = min(LINK, card.copy / active / card.clock)
    card = replace(card, processors=active, copy=rate * active * card.clock)
    resident = min(usual.resident(card), other.resident(card))
    if own == 1:
        timeline = max((run([program], card, 1) for program in (usual, other)), key=lambda found: found.finished[-1])
        clocks = timeline.finished[-1] + launch.lookups(vocabulary) * card.cache_latency * LOOKUP
        return clocks / card.clock, timeline
    count = min(own, WAVES * resident)
    timeline = run_mixed(usual, other, launch.others / per_row, count, card, resident)
    clocks = timeline.finished[-1] + (own - count) * clocks_per_program(timeline, resident)
    return clocks / card.clock, timeline


def clocks_per_program(timeline: Timeline, resident: int) -> float:
    """Clocks from one program to the next, without the first and the last of a processor; 0 where all ran at once."""
    middle = len(timeline.finished) - 2 * resident
    return (timeline.finished[-resident] - timeline.finished[resident]) / middle if middle > 0 else 0.0


def limit(timeline: Timeline) -> str:
    """What limits a run: the memory, issuing instructions, a pipe; "latency" where none is used by 85%."""
    clocks = timeline.in_use["clocks"]
    shared = {name: timeline.in_use[name] / clocks for name in ("memory", "load/store")}
    each = {
        name: timeline.in_use[name] / clocks / SCHEDULERS for name in ("issue", "alu", "xu", "heavy", "light", "lsu")
    }
    most, use = max((shared | each).items(), key=lambda item: item[1])
    return most if use >= LIMIT else "latency"


def predict(name: str, card: Card, vocabulary: int = 128_256, rows: int = 512) -> dict[str, object]:
    """Share of the copy bandwidth and microseconds of an operator on `rows` peaked rows, and what limits its first launch."""
    operator = OPERATORS[name]
    found = [launch_seconds(launch, rows, vocabulary, card) for launch in operator.launches]
    seconds = [time for time, _ in found]
    nodes = len(found) + operator.memsets
    total = sum(seconds) + FIRST_LAUNCH + NEXT_LAUNCH * (nodes - 1)
    least = operator.bytes_per_token * rows * vocabulary / card.copy
    return {
        "operator": name,
        "card": card.name,
        "rows": rows,
        "vocabulary": vocabulary,
        "share": least / (total - FIRST_LAUNCH),
        "us": 1e6 * total,
        "launches_us": [1e6 * time for time in seconds],
        "after_first_us": 1e6 * sum(seconds[1:]),
        "limit": limit(found[0][1]),
    }


def check_model(card: Card) -> dict[str, float]:
    """Share of the copy bandwidth that the model gives the kernels of `baselines.py`; real ones come to 0.9 and more."""
    shares = {}
    for name, baseline in BASELINES.items():
        program = compile_baseline(baseline, card.target).program(baseline.work)
        resident = program.resident(card)
        clocks = clocks_per_program(run([program] * (WAVES * resident), card, resident), resident)
        shares[name] = program.bytes_moved / card.bytes_per_clock / clocks
    return shares
