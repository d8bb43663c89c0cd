"""What ptxas makes of a product and a sum: one fma, unless it is run with --fmad=false.

PTX leaves it open for mul, add and sub without a rounding modifier; with `.rn` they stay apart. ptxas contracts where the
product has no other use. Triton's option `enable_fp_fusion` decides both: whether its own compiler writes fma, and the flag.
"""

from __future__ import annotations

from collections import Counter

from ptx.program import Instruction

TYPES = ("f32", "f64", "f32x2")


def contracted(block: list[Instruction], reads: Counter, writes: Counter) -> list[Instruction]:
    """A basic block with its products contracted; `reads` and `writes` count each register in the whole kernel."""
    result: list[Instruction | None] = []
    products: dict[str, int] = {}  # register to where its product is in `result`
    for i in block:
        fused = _fused(i, result, products)
        if fused is not None:
            i, taken = fused
            result[taken] = None
        for register in _registers_of(i.operands[:1]):
            stale = [p for p, at in products.items() if p == register or register in _registers_of(result[at].operands)]
            for product in stale:
                del products[product]
        if _contractible(i, "mul") and reads[i.operands[0]] == 1 and writes[i.operands[0]] == 1:
            products[i.operands[0]] = len(result)
        result.append(i)
    return [i for i in result if i is not None]


def count_registers(instructions: list[Instruction]) -> tuple[Counter, Counter]:
    """(reads, writes) of each register; a store's operands are all read."""
    reads, writes = Counter(), Counter()
    for i in instructions:
        outputs = 0 if i.name in ("st", "red", "bra", "bar", "barrier", "stmatrix") else 1
        writes.update(_registers_of(i.operands[:outputs]))
        reads.update(_registers_of(i.operands[outputs:]))
        if i.guard:
            reads[i.guard] += 1
    return reads, writes


def _registers_of(operands: tuple[str, ...]) -> list[str]:
    return [word for text in operands for word in text.strip("{}[]!- ").replace(",", " ").replace("|", " ").split()
            if word.startswith("%")]  # fmt: skip


def _contractible(i: Instruction, *names: str) -> bool:
    return i.name in names and i.modifiers[-1] in TYPES and set(i.modifiers) <= {*TYPES, "ftz"}


def _fused(i: Instruction, result: list, products: dict[str, int]) -> tuple[Instruction, int] | None:
    """(the fma, the place of the product that it takes in), for a sum with a product."""
    if not _contractible(i, "add", "sub"):
        return None
    for place in (1, 2):
        at = products.get(i.operands[place])
        if at is None:
            continue
        product, other = result[at], i.operands[3 - place]
        if (product.modifiers, product.guard, product.guard_negated) != (i.modifiers, i.guard, i.guard_negated):
            continue
        x, y = product.operands[1:]
        if i.name == "sub" and place == 1:
            other = _negated(other)
        elif i.name == "sub":
            x, y = (_negated(x), y) if x.startswith("%") else (x, _negated(y))
        text = f"{product.text} and {i.text}, contracted to one fma"
        operands = (i.operands[0], x, y, other)
        del products[i.operands[place]]
        return Instruction("fma", ("rn", *i.modifiers), operands, i.guard, i.guard_negated, text), at
    return None


def _negated(operand: str) -> str:
    return operand[1:] if operand.startswith("-") else f"-{operand}"
