"""Rows of data out of every kind of file, and the built-in tasks' public data in the paper's templates."""

from __future__ import annotations

import json

import pytest
from evaluation_kit import truthful_rows, write_json, write_truthful
from test_data import named_rows

from svdecode.data.benchmarks import BENCHMARKS
from svdecode.data.examples import read_examples
from svdecode.data.sources import read_rows
from svdecode.evaluation.tasks import TASKS, find_task


def test_rows_from_every_kind_of_file(tmp_path):
    rows = truthful_rows(3)
    csv = read_rows(write_truthful(tmp_path / "t.csv", 3))
    assert csv == read_rows(write_json(tmp_path / "t.json", rows)) == read_rows(rows)
    lines = tmp_path / "t.jsonl"
    lines.write_text("\n".join(map(json.dumps, rows)))
    assert read_rows(lines) == csv
    assert csv[0]["best_answer"] == rows[0]["Best Answer"]
    (tmp_path / "quoted.csv").write_text('text,n\n"two\nlines\u2028here",1\n')
    assert read_rows(tmp_path / "quoted.csv") == [{"text": "two\nlines\u2028here", "n": "1"}]
    (tmp_path / "ragged.csv").write_text("a,b\n1,2\n1\n")
    with pytest.raises(ValueError, match=r"ragged\.csv, line 3: 1 cells under 2 columns"):
        read_rows(tmp_path / "ragged.csv")
    (tmp_path / "words.txt").write_text("some words\nand more")
    assert read_rows(tmp_path / "words.txt") == [{"text": "some words\nand more"}]
    (tmp_path / "words.txt").write_text(" ")
    with pytest.raises(ValueError, match=r"words\.txt is empty"):
        read_rows(tmp_path / "words.txt")
    with pytest.raises(ValueError, match="data, row 2: an object with columns is needed, got 7"):
        read_rows([{"text": "a"}, 7])
    with pytest.raises(TypeError, match="data must be a path, a name or rows, got int"):
        read_rows(7)


def test_tabs_and_newline_delimited_json(tmp_path):
    (tmp_path / "a.tsv").write_text('Prompt\tcompletion\nwhat, is it?\t"a\ttab"\n')
    assert read_rows(tmp_path / "a.tsv") == [{"prompt": "what, is it?", "completion": "a\ttab"}]
    (tmp_path / "a.TSV").write_text("a\tb\n1\n")
    with pytest.raises(ValueError, match=r"a\.TSV, line 2: 1 cells under 2 columns"):
        read_rows(tmp_path / "a.TSV")
    (tmp_path / "b.tsv").write_text('a\tb\n"1\t2\n')
    with pytest.raises(ValueError, match=r"b\.tsv, line 2: not TSV"):
        read_rows(tmp_path / "b.tsv")
    (tmp_path / "a.ndjson").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n')
    assert [row["prompt"] for row in read_rows(tmp_path / "a.ndjson")] == ["a", "c"]
    (tmp_path / "windows.txt").write_bytes(b"one\r\ntwo\rthree\n")
    assert read_rows(tmp_path / "windows.txt") == [{"text": "one\ntwo\nthree\n"}]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "prompt,completion\na,caf\xe9\n".encode("latin-1"),
         r"line 2 has byte 0xe9, .*not UTF-8 \(is the file Latin-1\?\): .*iconv -f ISO-8859-1 -t utf-8"),
        ("a.txt", "caf\xe9".encode("utf-16"), r"line 1 has byte 0xff, .*UTF-16\?\): .*iconv -f UTF-16 -t utf-8"),
    ],
)  # fmt: skip
def test_files_that_are_not_text_say_what_to_do(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    for read in (read_rows, read_examples):
        with pytest.raises(ValueError, match=words) as error:
            read(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["no/such.parquet", "no/such.ndjson", "no/such.tsv", "no/such.GZ"])
def test_a_missing_file_is_not_taken_for_a_data_set(name):
    with pytest.raises(ValueError, match=f"{name} is not a file$"):
        read_rows(name)


PUBLIC = {
    "boolq": (
        {"question": "is water wet", "answer": False, "passage": "x"},
        "Please answer the following question with true or false, question: is water wet?\n\nAnswer format: true/false",
        "false",
    ),
    "piqa": (
        {"goal": "Dry a cup.", "sol1": "Wipe it.", "sol2": "Fill it.", "label": 0},
        "Please choose the correct solution to the question: Dry a cup.\n\nSolution1: Wipe it.\n\nSolution2: Fill it.\n\n"
        "Answer format: solution1/solution2",
        "solution1",
    ),
    "social_i_qa": (
        {"context": "Ann ran.", "question": "Why?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3"},
        "Please choose the correct answer to the question: Ann ran. Why?\n\nAnswer1: a Answer2: b Answer3: c\n\n"
        "Answer format: answer1/answer2/answer3",
        "answer3",
    ),
    "hellaswag": (
        {"activity_label": "Rowing", "ctx": "A man sits", "endings": ["up.", "down."], "label": "1"},
        "Please choose the correct ending to complete the given sentence: Rowing: A man sits\n\nEnding1: up. Ending2: down.\n\n"
        "Answer format: ending1/ending2",
        "ending2",
    ),
    "winogrande": (
        {"sentence": "Ann saw Eve and _ smiled.", "option1": "Ann", "option2": "Eve", "answer": "1"},
        "Please choose the correct answer to fill in the blank to complete the given sentence: Ann saw Eve and _ smiled.\n\n"
        "Option1: Ann Option2: Eve Answer format: option1/option2",
        "option1",
    ),
    **{
        name: (
            {column: "What is cold?", "choices": {"text": ["ice", "fire"], "label": labels}, "answerKey": labels[1]},
            "Please choose the correct answer to the question: What is cold?\n\nAnswer1: ice Answer2: fire\n\n"
            "Answer format: answer1/answer2",
            "answer2",
        )
        for name, column, labels in (
            ("arc_easy", "question", ["A", "B"]),
            ("arc_challenge", "question", ["1", "2"]),
            ("openbookqa", "question_stem", ["A", "B"]),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("task", PUBLIC)
def test_public_rows_become_the_papers_prompts(monkeypatch, task):
    row, instruction, answer = PUBLIC[task]
    asked = named_rows(monkeypatch, [row])
    assert read_rows(task) == [
        {"instruction": instruction, "output": f"the correct answer is {answer}", "answer": answer}
    ]
    assert read_examples(task) == [{"prompt": f"{instruction}\n", "completion": f"the correct answer is {answer}"}]
    test = "test" if "choices" in row else "validation"
    read_rows(f"{task}:other")
    assert [split for *_, split in asked] == [test, "train", "other"]
    with pytest.raises(ValueError, match=f"{BENCHMARKS[task].name}, row 1: no column"):
        list(BENCHMARKS[task].rows([("row 1", {"text": "x"})]))


@pytest.mark.parametrize(
    ("task", "hidden"),
    [("hellaswag", {"label": ""}), ("winogrande", {"answer": ""}), ("piqa", {"label": -1}), ("arc_easy", {"answerKey": ""})],
)  # fmt: skip
def test_a_split_without_answers_is_an_error(monkeypatch, task, hidden):
    named_rows(monkeypatch, [PUBLIC[task][0] | hidden])
    with pytest.raises(ValueError, match=f"{BENCHMARKS[task].name}, row 1: no answer"):
        read_rows(f"{task}:test")


def test_every_task_but_those_for_any_data_has_data_of_its_own(monkeypatch):
    assert set(BENCHMARKS) == set(TASKS) - {"nll", "exact_match"} == {*PUBLIC, "truthfulqa_mc", "truthfulqa_gen"}
    for task, (row, _, answer) in PUBLIC.items():
        named_rows(monkeypatch, [row])
        rows = read_rows(task)
        other = rows[0] | {"output": "the correct answer is nothing", "answer": "nothing"}
        questions = find_task(task, "choices").questions([*rows, other], None)
        assert questions[0].gold["answer"] == answer
    public = {
        "question": "Why?",
        "best_answer": "So.",
        "correct_answers": ["So."],
        "incorrect_answers": ["No.", "Yes."],
    }
    asked = named_rows(monkeypatch, [public | {"question": f"Why {i}?"} for i in range(8)])
    assert len(find_task("truthfulqa_mc").questions(read_rows("truthfulqa_mc"), None)) == 2
    assert read_examples("truthfulqa_mc")[0] == {"prompt": "Q: Why 0?\nA:", "completion": " So."}
    assert asked == [("truthfulqa/truthful_qa", "generation", "validation")] * 2
