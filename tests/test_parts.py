"""An evaluation takes the part of the data that the warm start set aside."""

from __future__ import annotations

import csv

import pytest

from svdecode.data.examples import read_examples
from svdecode.data.sources import read_rows
from svdecode.data.splits import Splits, part_of


@pytest.fixture
def places(tmp_path):
    with open(tmp_path / "qa.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Type", "Question", "Best Answer", "Correct Answers", "Incorrect Answers"])
        writer.writerows(["x", f"Is {i} odd?", "Yes " if i % 2 else "No", "Yes; No", "Maybe"] for i in range(20))
    splits = Splits.make(read_examples(tmp_path / "qa.csv"), fractions=(0.5, 0.2, 0.3))
    splits.save(tmp_path / "adapter")
    return tmp_path, splits


def test_parts_are_disjoint_and_are_those_of_the_record(places):
    folder, splits = places
    rows = read_rows(folder / "qa.csv")
    found = {part: part_of(rows, folder / "adapter", part) for part in ("calibration", "test")}
    assert [len(found[part]) for part in found] == [splits.sizes["calibration"], splits.sizes["test"]] == [4, 6]
    questions = [{row["question"] for row in part} for part in found.values()]
    assert not questions[0] & questions[1]
    trained = {example["prompt"] for example in splits.select(read_examples(folder / "qa.csv"), "train")}
    assert not {f"Q: {question}\nA:" for question in questions[1]} & trained
    assert part_of(rows, folder / "adapter", "test", "all") == rows
    assert len(part_of(rows, folder / "adapter", "test", "train")) == 10


def test_other_data_are_taken_whole_with_a_word(places, capsys):
    folder, _ = places
    rows = read_rows(folder / "qa.csv")[:-1]
    assert part_of(rows, folder / "adapter", "test") == rows
    assert "was trained on" in capsys.readouterr().err
    with pytest.raises(ValueError, match="not the data that were split"):
        part_of(rows, folder / "adapter", "test", "test")
    texts = [{"text": "some words"}]
    assert part_of(texts, folder / "adapter", "test") == texts
    assert part_of(rows, None, "test") == rows
    assert part_of(rows, folder, "test") == rows  # no record there
