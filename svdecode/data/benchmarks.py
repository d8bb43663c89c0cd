"""The built-in tasks' public data on the Hugging Face hub, and their rows in the paper's templates (its Table 8).

The commonsense sets become what LLM-Adapters publishes: {"instruction", "output", "answer"}, its test sets being the public
splits that have answers. TruthfulQA has one split, whose rows stay as they are; a warm start with splits sets a part aside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

TRAIN, TEST = "train", "test"
"""The purposes of data."""

Row = Mapping[str, object]


def _labelled(
    question: str, word: str, choices: Sequence[str], right: int, between: str = " ", end: str = "\n\n"
) -> dict:
    """A question with numbered choices; `right` counts from 0."""
    labels = [f"{word}{number}" for number in range(1, len(choices) + 1)]
    if not 0 <= right < len(labels):
        raise ValueError("no answer")
    listed = between.join(f"{label.capitalize()}: {choice}" for label, choice in zip(labels, choices, strict=True))
    return _answered(f"{question}\n\n{listed}{end}Answer format: {'/'.join(labels)}", labels[right])


def _answered(instruction: str, answer: str) -> dict[str, str]:
    return {"instruction": instruction, "output": f"the correct answer is {answer}", "answer": answer}


def _boolq(row: Row) -> dict[str, str]:
    question = f"Please answer the following question with true or false, question: {row['question']}?"
    return _answered(f"{question}\n\nAnswer format: true/false", "true" if row["answer"] else "false")


def _piqa(row: Row) -> dict[str, str]:
    question = f"Please choose the correct solution to the question: {row['goal']}"
    return _labelled(question, "solution", [row["sol1"], row["sol2"]], int(row["label"]), between="\n\n")


def _social_i_qa(row: Row) -> dict[str, str]:
    question = f"Please choose the correct answer to the question: {row['context']} {row['question']}"
    return _labelled(question, "answer", [row[f"answer{c}"] for c in "ABC"], int(row["label"]) - 1)


def _hellaswag(row: Row) -> dict[str, str]:
    start = "Please choose the correct ending to complete the given sentence"
    return _labelled(f"{start}: {row['activity_label']}: {row['ctx']}", "ending", row["endings"], int(row["label"]))


def _winogrande(row: Row) -> dict[str, str]:
    start = "Please choose the correct answer to fill in the blank to complete the given sentence"
    choices = [row["option1"], row["option2"]]
    return _labelled(f"{start}: {row['sentence']}", "option", choices, int(row["answer"]) - 1, end=" ")


def _science(column: str) -> Callable[[Row], dict[str, str]]:
    def convert(row: Row) -> dict[str, str]:
        question = f"Please choose the correct answer to the question: {row[column]}"
        choices = row["choices"]
        return _labelled(question, "answer", choices["text"], list(choices["label"]).index(row["answerKey"]))

    return convert


@dataclass(frozen=True)
class Benchmark:
    """A data set on the hub."""

    name: str
    config: str | None = None
    train: str = "train"
    test: str = "validation"
    convert: Callable[[Row], Row] = dict

    def split(self, purpose: str) -> str:
        """The name of the split for TRAIN or TEST."""
        return {TRAIN: self.train, TEST: self.test}[purpose]

    def rows(self, numbered: Iterable[tuple[str, Row]]) -> Iterator[tuple[str, Row]]:
        """Rows as the task reads them; ValueError for one without the expected columns or without an answer."""
        for place, row in numbered:
            try:
                yield place, self.convert(row)
            except KeyError as error:
                raise ValueError(f"{self.name}, {place}: no column {error}") from None
            except ValueError:
                raise ValueError(f"{self.name}, {place}: no answer; is it a split whose answers are hidden?") from None


_TRUTHFULQA = Benchmark("truthfulqa/truthful_qa", "generation", train="validation")

BENCHMARKS = {
    "truthfulqa_mc": _TRUTHFULQA,
    "truthfulqa_gen": _TRUTHFULQA,
    "boolq": Benchmark("google/boolq", convert=_boolq),
    "piqa": Benchmark("baber/piqa", convert=_piqa),
    "social_i_qa": Benchmark("lighteval/siqa", convert=_social_i_qa),
    "hellaswag": Benchmark("Rowan/hellaswag", convert=_hellaswag),
    "winogrande": Benchmark("allenai/winogrande", "winogrande_xl", convert=_winogrande),
    "arc_easy": Benchmark("allenai/ai2_arc", "ARC-Easy", test="test", convert=_science("question")),
    "arc_challenge": Benchmark("allenai/ai2_arc", "ARC-Challenge", test="test", convert=_science("question")),
    "openbookqa": Benchmark("allenai/openbookqa", "main", test="test", convert=_science("question_stem")),
}
"""By task name."""
