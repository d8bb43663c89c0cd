"""Examples out of files of every layout, each mistake with its place; splits that share no prompt and are the same anywhere."""

from __future__ import annotations

import csv
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svdecode.data.examples import question_prompt, read_examples
from svdecode.data.sources import read_rows
from svdecode.data.splits import NAMES, Splits, data_hash, example_hash, parse_fractions

PAIRS = [{"prompt": f"what is {i}?", "completion": f" it is {i}, \u2028 or so"} for i in range(4)]
QUESTIONS = [["Adversarial", "Who, me?", " You. ", "Nobody"], ["Adversarial", 'A "quoted"\nquestion?', "Yes", "No"]]
HEADER = ["Type", "Question", "Best Answer", "Incorrect Answers"]
ADAPTERS = [
    {"instruction": "true or false?", "input": "", "output": "the correct answer is true", "answer": "true"},
    {"instruction": "add them", "input": "1 and 2", "output": "3", "answer": "3"},
]


def lines(rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def table(path, rows) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def test_each_layout_is_found_by_its_columns(tmp_path):
    (tmp_path / "pairs.jsonl").write_text(lines(PAIRS) + "\n", encoding="utf-8")
    assert read_examples(tmp_path / "pairs.jsonl") == PAIRS
    (tmp_path / "pairs.json").write_text(json.dumps(PAIRS, indent=2))
    assert read_examples(str(tmp_path / "pairs.json")) == PAIRS
    table(
        tmp_path / "pairs.csv",
        [["id", "completion", "prompt"], *([i, r["completion"], r["prompt"]] for i, r in enumerate(PAIRS))],
    )
    assert read_examples(tmp_path / "pairs.csv") == PAIRS
    (tmp_path / "boolq.json").write_text(json.dumps(ADAPTERS))
    assert read_examples(tmp_path / "boolq.json") == [
        {"prompt": "true or false?\n", "completion": "the correct answer is true"},
        {"prompt": "add them\n1 and 2\n", "completion": "3"},
    ]
    table(tmp_path / "truthful.csv", [HEADER, *QUESTIONS])
    assert read_examples(tmp_path / "truthful.csv") == [
        {"prompt": "Q: Who, me?\nA:", "completion": " You."},
        {"prompt": 'Q: A "quoted"\nquestion?\nA:', "completion": " Yes"},
    ]
    assert question_prompt("Why?") == "Q: Why?\nA:"


def test_a_byte_order_mark_and_windows_line_ends(tmp_path):
    (tmp_path / "a.csv").write_bytes("\ufeffprompt,completion\r\na,b\r\n".encode())
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a", "completion": "b"}\r\n')
    assert (
        read_examples(tmp_path / "a.csv") == read_examples(tmp_path / "a.jsonl") == [{"prompt": "a", "completion": "b"}]
    )


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", "", "a.jsonl: data is empty"),
        ("a.json", "[]", "a.json: data is empty"),
        ("a.csv", "prompt,completion\n", "a.csv: data is empty"),
        ("a.csv", "", "a.csv: data is empty"),
        ("a.jsonl", '{"prompt": "a", "completion": "b"}\n\n{"prompt": "c", "compl', "a.jsonl, line 3: not JSON"),
        ("a.json", '[\n {"prompt": "a",\n', "a.json, line 3, column 1: not JSON"),
        ("a.csv", 'prompt,completion\na,b\n"c,d\n', "a.csv, line 3: not CSV"),
        ("a.csv", "prompt,completion\na,b\nc\n", "a.csv, line 3: 1 cells under 2 columns"),
        ("a.csv", 'prompt,completion\n"a\nb",c\nd,e,f\n', "a.csv, line 4: 3 cells under 2 columns"),
        ("a.csv", "text,label\na,b\n", "a.csv, line 2: data needs the columns prompt and completion.*got text, label"),
        ("a.jsonl", '{"text": "a"}\n', "a.jsonl, line 1: data needs the columns.*got text"),
        ("a.jsonl", "3\n", "a.jsonl, line 1: data needs the columns.*got none"),
        ("a.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', "a.jsonl, line 2: completion must be a text"),
        ("a.json", '[{"prompt": "a", "completion": "b"}, 7]', "a.json, item 2: an object with prompt and completion"),
        ("a.json", '[{"instruction": "a", "output": 1}]', "a.json, item 1: output must be a text, got 1"),
        ("a.jsonl", b"\xff\xfe", "a.jsonl cannot be read: .*utf-8"),
    ],
)  # fmt: skip
def test_mistakes_name_the_file_and_the_place(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=words) as error:
        read_examples(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["missing.jsonl", "folder/missing.csv", "no such", ".", "json", "squad"])
def test_what_is_no_file_and_no_data_set(source):
    with pytest.raises(ValueError, match=f"{source} is not a file$"):
        read_examples(source)


def test_a_data_set_without_network_is_one_line(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match="owner/none:x:test is not a file, and no data set of this name can be"
    ) as error:
        read_examples("owner/none:x:test")
    assert "\n" not in str(error.value)


def named_rows(monkeypatch, rows, splits=("train", "validation")):
    """load_dataset that gives these rows for any name, and what it was asked for."""
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, config, split=None):
        asked.append((name, config, split))
        found = datasets.Dataset.from_list(rows)
        return found if split else datasets.DatasetDict(dict.fromkeys(splits, found))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_a_data_set_by_name(monkeypatch):
    asked = named_rows(monkeypatch, [{"question": "Why?", "best_answer": "So.", "category": "x"}])
    for source in ("some/name", "some/name:generation", "some/name::validation[:10%]"):
        assert read_examples(source) == [{"prompt": "Q: Why?\nA:", "completion": " So."}]
    assert asked == [
        ("some/name", None, None),
        ("some/name", "generation", None),
        ("some/name", None, "validation[:10%]"),
    ]


def test_the_split_of_a_named_data_set(monkeypatch):
    datasets = pytest.importorskip("datasets")
    parts = {name: datasets.Dataset.from_list([{"text": name}]) for name in ("validation", "other", "train")}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(parts))
    assert read_rows("some/name", "train") == [{"text": "train"}]
    assert read_rows("some/name") == [{"text": "validation"}]
    parts["test"] = datasets.Dataset.from_list([{"text": "test"}])
    assert read_rows("some/name") == [{"text": "test"}]
    del parts["train"]
    with pytest.raises(
        ValueError, match=r"some/name: which split\? Write some/name::SPLIT with one of validation, other"
    ):
        read_rows("some/name", "train")


def examples_with_repeats(count: int = 100) -> list[dict[str, str]]:
    rows = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(count)]
    rows += [{"prompt": f"  Question\n{i} ", "completion": "another answer"} for i in range(0, count, 5)]
    return rows + rows[:3]


@given(seed=st.integers(0, 10**6), cut=st.integers(5, 90), shuffle=st.randoms())
def test_splits_share_no_prompt_and_lose_nothing(seed, cut, shuffle):
    rows = examples_with_repeats()
    fractions = (cut / 100, (95 - cut) / 100, 0.05)
    splits = Splits.make(rows, seed=seed, fractions=fractions)
    parts = {name: splits.select(rows, name) for name in NAMES}
    assert sum(map(len, parts.values())) == sum(splits.sizes.values()) == len(rows)
    prompts = [{" ".join(row["prompt"].split()).lower() for row in part} for part in parts.values()]
    assert sum(map(len, prompts)) == len(set().union(*prompts)) == 100
    for name, fraction in zip(NAMES, fractions, strict=True):
        assert len(parts[name]) == pytest.approx(fraction * len(rows), abs=3)
    shuffled = list(rows)
    shuffle.shuffle(shuffled)
    again = Splits.make(shuffled, seed=seed, fractions=fractions)
    assert again.data_sha256 == splits.data_sha256
    assert {n: sorted(p) for n, p in again.parts.items()} == {n: sorted(p) for n, p in splits.parts.items()}


def test_another_seed_gives_other_parts():
    rows = examples_with_repeats()
    assert Splits.make(rows, seed=0).parts["test"] != Splits.make(rows, seed=1).parts["test"]


def test_saved_loaded_and_only_for_the_same_data(tmp_path):
    rows = examples_with_repeats()
    splits = Splits.make(rows, data="q.jsonl", seed=4)
    assert splits.save(tmp_path).name == "svdecode-splits.json"
    loaded = Splits.load(tmp_path)
    assert loaded == splits
    assert loaded.select(random.sample(rows, len(rows)), "test")
    for other in (rows[1:], [{**rows[0], "completion": "changed"}, *rows[1:]], rows + rows[:1]):
        assert data_hash(other) != data_hash(rows)
        with pytest.raises(ValueError, match=r"not the data that were split: the record is of q\.jsonl \(sha256"):
            loaded.select(other, "calibration")
    with pytest.raises(ValueError, match="must be one of train, calibration, test, got 'dev'"):
        loaded.select(rows, "dev")
    trained = loaded.select(rows, "train")
    assert loaded.seen_in_training(trained) == len(trained)
    assert loaded.seen_in_training(loaded.select(rows, "test")) == 0
    assert loaded.seen_in_training([{"prompt": trained[0]["prompt"].upper(), "completion": "new"}]) == 1


def test_without_a_split_everything_trains(tmp_path):
    rows = examples_with_repeats(10)
    Splits.everything(rows, data="all.csv").save(tmp_path)
    loaded = Splits.load(tmp_path)
    assert loaded.fractions == (1.0, 0.0, 0.0)
    assert loaded.select(rows, "train") == rows
    with pytest.raises(
        ValueError, match=r"nothing of all\.csv was set aside for calibration: the warm start trained on all"
    ):
        loaded.select(rows, "calibration")


def test_what_splits_refuse(tmp_path):
    rows = [{"prompt": "the same", "completion": str(i)} for i in range(50)]
    with pytest.raises(
        ValueError, match=r"d has 1 different prompts: too few for splits of 0\.6/0\.2/0\.2, .* would be empty"
    ):
        Splits.make(rows, data="d")
    for fractions in ("0.5/0.5", "1/0/0.1", "0/0.5/0.5", "a/b/c", "0.6/-0.2/0.6", "nan/0/1"):
        with pytest.raises(ValueError, match="fractions must be three numbers of sum 1"):
            parse_fractions(fractions)
    assert parse_fractions("0.8,0.1,0.1") == (0.8, 0.1, 0.1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v.pop("schema"), "schema"),
        (lambda v: v.update(schema=9), "schema 9 is not 1"),
        (lambda v: v.pop("parts"), "parts"),
        (lambda v: v["parts"].pop("test"), "its parts are train, calibration"),
        (lambda v: v["parts"]["test"].append(v["parts"]["train"][0]), "its parts overlap"),
        (lambda v: v.update(fractions=[1, 2]), "fractions must be"),
        (lambda v: v.update(more=1), "more"),
    ],
)
def test_damaged_records_are_refused(tmp_path, change, words):
    with pytest.raises(ValueError, match=r"svdecode-splits\.json is missing"):
        Splits.load(tmp_path)
    path = Splits.make(examples_with_repeats()).save(tmp_path)
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"is not a record of splits: .*{words}"):
        Splits.load(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not a record of splits"):
        Splits.load(tmp_path)


def test_the_hash_of_an_example_is_pinned():
    """Records must be readable by later versions."""
    assert example_hash({"prompt": "A  b", "completion": "c"}) == "c8687a08aa5d6ed2-3c5f62548b935779"
