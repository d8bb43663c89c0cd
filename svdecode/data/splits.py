"""Train, calibration and test parts of one data set that share no prompt, and their record beside an adapter.

The parts depend on the examples and the seed alone, not on their order in the file: prompts are ranked by a hash, and the
ranking is cut where the fractions say. Examples with one prompt (but for case and white space) stay together.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from svdecode.common import distributed
from svdecode.common.files import read_object, write_atomically
from svdecode.data.conversations import texts_of
from svdecode.data.examples import examples_of

FILE_NAME = "svdecode-splits.json"
SCHEMA = 1
NAMES = ("train", "calibration", "test")
FRACTIONS = (0.6, 0.2, 0.2)
ALL = "all"
"""Every row, whatever part it is of."""
_DIGITS = 16  # of a hash kept for an example's prompt, and for its completion


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def prompt_key(example: Mapping[str, str]) -> str:
    """A hash of an example's prompt; case and white space do not count."""
    return _sha256(" ".join(texts_of(example)[0].split()).casefold())[:_DIGITS]


def example_hash(example: Mapping[str, str]) -> str:
    """Names an example: a hash of its prompt (case and white space folded), a dash, a hash of both texts as they are."""
    return f"{prompt_key(example)}-{_sha256(json.dumps(texts_of(example)))[:_DIGITS]}"


def data_hash(examples: Sequence[Mapping[str, str]]) -> str:
    """SHA-256 of a data set's texts; the same in any order and in any file format."""
    return _sha256("\n".join(sorted(_sha256(json.dumps(texts_of(example))) for example in examples)))


@dataclass(frozen=True)
class Splits:
    """Which examples of a data set are for training, calibration and test. `fractions` is (1, 0, 0) where all of them train."""

    data: str
    """Path or name that the examples came from, for messages."""
    data_sha256: str
    """`data_hash` of all examples."""
    seed: int
    fractions: tuple[float, float, float]
    """Shares of the examples for train, calibration and test; met as far as equal prompts allow."""
    parts: dict[str, list[str]]
    """`example_hash` of each example, by part."""

    @classmethod
    def make(
        cls,
        examples: Sequence[Mapping[str, str]],
        *,
        data: str | Path = "",
        seed: int = 0,
        fractions: Sequence[float] = FRACTIONS,
    ) -> Splits:
        """Split examples.

        Args:
            examples: a list of {"prompt", "completion"}.
            data: where they came from, for messages.
            seed: another one gives other parts.
            fractions: train, calibration, test; sum 1.

        Raises:
            ValueError: fractions that are none, or a part with a fraction above 0 that would be empty.
        """
        fractions = check_fractions(fractions)
        groups: dict[str, list[str]] = {}
        for example in examples:
            groups.setdefault(prompt_key(example), []).append(example_hash(example))
        parts: dict[str, list[str]] = {name: [] for name in NAMES}
        edges = [sum(fractions[: i + 1]) * len(examples) for i in range(len(NAMES))]
        wanted = [i for i, fraction in enumerate(fractions) if fraction > 0]
        placed = 0
        for key in sorted(groups, key=lambda key: _sha256(f"{seed}:{key}")):
            middle = placed + len(groups[key]) / 2  # a group goes where its middle lies
            index = next((i for i in wanted if middle <= edges[i] + 1e-9), wanted[-1])
            parts[NAMES[index]] += groups[key]
            placed += len(groups[key])
        empty = [NAMES[i] for i in wanted if not parts[NAMES[i]]]
        if empty:
            raise ValueError(
                f"{data or 'data'} has {len(groups)} different prompts: too few for splits of "
                f"{'/'.join(f'{f:g}' for f in fractions)}, {' and '.join(empty)} would be empty"
            )
        return cls(str(data), data_hash(examples), seed, fractions, parts)

    @classmethod
    def everything(cls, examples: Sequence[Mapping[str, str]], *, data: str | Path = "") -> Splits:
        """The record of a run that trained on all examples."""
        return cls.make(examples, data=data, fractions=(1.0, 0.0, 0.0))

    @property
    def sizes(self) -> dict[str, int]:
        """Examples in each part."""
        return {name: len(self.parts[name]) for name in NAMES}

    def save(self, folder: str | Path) -> Path:
        """Write svdecode-splits.json into the adapter's folder, atomically; returns its path."""
        path = Path(folder) / FILE_NAME
        write_atomically(path, json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1).encode())
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Splits:
        """Read what `save` wrote; ValueError says what is missing or wrong."""
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            raise ValueError(f"no splits in {folder}: {FILE_NAME} is missing (svdecode warmstart writes it)")
        values = read_object(path, "a record of splits", largest=None)  # it grows with the data
        try:
            schema = values.pop("schema")
            if schema != SCHEMA:
                raise ValueError(f"schema {schema} is not {SCHEMA}")
            values["fractions"] = check_fractions(values["fractions"])
            splits = cls(**values)
            splits._check()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a record of splits: {error}") from None
        return splits

    def _check(self) -> None:
        if set(self.parts) != set(NAMES):
            raise ValueError(f"its parts are {', '.join(self.parts)}, not {', '.join(NAMES)}")
        if not isinstance(self.data_sha256, str) or not all(
            isinstance(item, str) for part in self.parts.values() for item in part
        ):
            raise ValueError("its hashes are not texts")
        prompts = [self._prompts(name) for name in NAMES]
        if sum(map(len, prompts)) != len(set().union(*prompts)):
            raise ValueError("its parts overlap")

    def _prompts(self, name: str) -> set[str]:
        return {item.split("-")[0] for item in self.parts[name]}

    def select(self, examples: Sequence[Mapping[str, str]], name: str) -> list[Mapping[str, str]]:
        """The examples of one part, in their order.

        Args:
            examples: all examples of the data set that was split.
            name: "train", "calibration" or "test".

        Raises:
            ValueError: other data than were split, or an empty part.
        """
        if name not in NAMES:
            raise ValueError(f"the part of a data set must be one of {', '.join(NAMES)}, got {name!r}")
        found = data_hash(examples)
        if found != self.data_sha256:
            raise ValueError(
                f"these are not the data that were split: the record is of {self.data or 'other data'} "
                f"(sha256 {self.data_sha256[:12]}), these have sha256 {found[:12]}"
            )
        if not self.parts[name]:
            why = "the warm start trained on all of them" if name != "train" else "none was for training"
            raise ValueError(f"nothing of {self.data or 'the data'} was set aside for {name}: {why}")
        chosen = set(self.parts[name])
        return [example for example in examples if example_hash(example) in chosen]

    def seen_in_training(self, examples: Sequence[Mapping[str, str]]) -> int:
        """How many of these examples, of any data set, have a prompt that was trained on."""
        trained = self._prompts("train")
        return sum(prompt_key(example) in trained for example in examples)


def check_fractions(fractions: Sequence[float]) -> tuple[float, float, float]:
    """Three fractions of at least 0 that sum to 1, the first above 0; ValueError otherwise."""
    numbers = [isinstance(f, int | float) and not isinstance(f, bool) and 0 <= f <= 1 for f in fractions]
    if len(numbers) != len(NAMES) or not all(numbers) or abs(sum(fractions) - 1) > 1e-6 or fractions[0] == 0:
        raise ValueError(f"fractions must be three numbers of sum 1, the first above 0, got {list(fractions)}")
    first, second, third = (float(f) for f in fractions)
    return first, second, third


def parse_fractions(text: str) -> tuple[float, float, float]:
    """Fractions from "0.6/0.2/0.2" (or with commas); ValueError otherwise."""
    try:
        return check_fractions([float(part) for part in text.replace(",", "/").split("/")])
    except ValueError:
        raise ValueError(f"fractions must be three numbers of sum 1, like 0.6/0.2/0.2, got {text!r}") from None


def part_of(rows: list[dict], folder: Path | None, part: str, wanted: str | None = None) -> list[dict]:
    """The rows of one part of data that were split before the warm start; all of other data.

    Args:
        rows: with normalised column names (`svdecode.data.sources.read_rows`).
        folder: of the adapter, where its splits are recorded; None for no adapter.
        part: "calibration" or "test", taken where the data are those that were split and the part is not empty.
        wanted: a part that must be taken (ValueError where it cannot be), or "all" for every row.

    A word on stderr says how many rows the warm start was trained on, if any.
    """
    if wanted == ALL or folder is None or (wanted is None and not (folder / FILE_NAME).is_file()):
        return rows
    splits, examples = Splits.load(folder), examples_of(rows)
    if wanted is None and (examples is None or data_hash(examples) != splits.data_sha256 or not splits.parts.get(part)):
        seen = 0 if examples is None else splits.seen_in_training(examples)
        if seen and distributed.is_main():
            print(
                f"svdecode: the warm start was trained on {seen} of these {len(rows)} rows: "
                "what they show says little about others",
                file=sys.stderr,
            )
        return rows
    if examples is None:
        raise ValueError(f"--split {wanted} needs rows with the columns of a warm start")
    chosen = {example_hash(example) for example in splits.select(examples, wanted or part)}
    return [row for row, example in zip(rows, examples, strict=True) if example_hash(example) in chosen]
