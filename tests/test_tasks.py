"""Tasks: what becomes of a row, the benchmark's own definitions, extraction, and sets that the project has never seen."""

from __future__ import annotations

import math

import pytest
from evaluation_kit import commonsense_rows, tiny_tokenizer, truthful_rows
from tiny import tiny_llama

from svdecode.data.examples import read_examples
from svdecode.data.sources import read_rows
from svdecode.evaluation.run import evaluate
from svdecode.evaluation.tasks import TASKS, exact_match, find_task
from svdecode.evaluation.tasks.commonsense import extract, grade_choices, grade_text
from svdecode.evaluation.tasks.truthfulqa_mc import grade


def row(**changes):
    base = {
        "question": "Why?",
        "best_answer": "Because it is so",
        "correct_answers": "It just is;  Because it is so; ",
        "incorrect_answers": "No reason. ; Magic",
    }
    return {**base, **changes}


def examples(count):
    return [row(question=f"E{i}?", best_answer=f"e{i}") for i in range(count)]


def test_truthfulqa_prompt_and_answers():
    (question,) = find_task("truthfulqa_mc").questions([row()], examples(2))
    assert question.prompt == "Q: E0?\nA: e0.\n\nQ: E1?\nA: e1.\n\nQ: Why?\nA:"
    assert question.answers == (" Because it is so.", " It just is.", " No reason.", " Magic.")
    assert (question.gold, question.completion) == (2, " Because it is so.")
    listed = row(correct_answers=["Because it is so", "It just is"], incorrect_answers=["Magic"])  # as on the hub
    assert find_task("truthfulqa_mc").questions([listed], examples(1))[0].answers[-1] == " Magic."
    missing = row(correct_answers="It just is")
    assert find_task("truthfulqa_mc").questions([missing], examples(1))[0].answers[:2] == (
        " Because it is so.",
        " It just is.",
    )


def test_truthfulqa_examples_are_no_test_questions():
    rows = [*examples(6), row()]
    task = find_task("truthfulqa_mc")
    assert [q.text for q in task.questions(rows, None)] == ["Why?"]
    assert [q.text for q in task.questions(rows, [row()])] == [f"E{i}?" for i in range(6)]
    assert task.questions(rows, None)[0].prompt.count("Q: ") == 7
    with pytest.raises(ValueError, match="no question left"):
        task.questions(examples(6), None)
    with pytest.raises(ValueError, match="no incorrect answer to 'Why"):
        task.questions([row(incorrect_answers=" ; ")], examples(1))
    with pytest.raises(ValueError, match=r"row 2: no 'best_answer'"):
        task.questions([row(), row(best_answer=" ")], examples(1))


def test_mc_by_the_benchmarks_definitions():
    (question,) = find_task("truthfulqa_mc").questions([row()], examples(1))
    found = grade(question, [-3.0, -1.0, -2.0, -4.0])  # best, true | false, false
    masses = [math.exp(v) for v in (-3.0, -1.0, -2.0, -4.0)]
    assert found["MC1"] == 0  # the best answer is below a false one, another true one above both
    assert found["MC2"] == pytest.approx((masses[0] + masses[1]) / sum(masses))
    assert found["MC3"] == 0.5
    assert grade(question, [-1.0, -5.0, -2.0, -4.0])["MC1"] == 1
    assert grade(question, [-2.0, -5.0, -2.0, -4.0]) == pytest.approx(
        {"MC1": 0, "MC2": sum(map(math.exp, (-2, -5))) / sum(map(math.exp, (-2, -5, -2, -4))), "MC3": 0}
    )  # a tie is no win
    far = grade(question, [-3000.0, -3001.0, -3000.5, -3002.0])  # exp of these alone is 0
    assert 0 < far["MC2"] < 1


def test_commonsense_labels_and_choices():
    rows = [
        {"instruction": "P? Answer format: true/false", "output": "the correct answer is true", "answer": "true"},
        {"instruction": "Q? Answer format: true/false", "output": "the correct answer is false", "answer": "false"},
    ]
    first, second = find_task("boolq", "choices").questions(rows, None)
    assert first.answers == ("the correct answer is false", "the correct answer is true")
    assert (first.prompt, first.completion) == ("P? Answer format: true/false\n", "the correct answer is true")
    assert grade_choices(first, [-2.0, -1.0]) == {"accuracy": 1.0}
    assert grade_choices(second, [-2.0, -1.0]) == grade_choices(second, [-1.0, -1.0]) == {"accuracy": 0.0}
    # A question with three answers in a set where others have four: what its instruction names.
    four = [
        {"instruction": f"Answer1: a Answer2: b Answer3: c{more}", "output": f"it is {a}", "answer": a}
        for more, a in (("", "answer1"), (" Answer4: d", "answer4"), ("", "answer2"), ("", "answer3"))
    ]
    assert len(find_task("arc_easy").questions(four, None)[0].answers) == 3
    assert len(find_task("arc_easy").questions(four, None)[1].answers) == 4
    with pytest.raises(ValueError, match="row 1: 'output' does not contain the answer"):
        find_task("boolq").questions([{**rows[0], "output": "yes"}, rows[1]], None)
    with pytest.raises(ValueError, match="nothing to choose from"):
        find_task("boolq").questions(rows[:1], None)


def test_extraction():
    labels = ["answer1", "answer2", "answer10"]
    assert extract("I think the correct answer is answer2, not answer1", labels) == "answer2"
    assert extract("answer10", labels) == "answer10"
    assert extract("none of them", labels) is None
    (question, _) = find_task("arc_easy").questions(
        [
            {"instruction": "?", "output": "the correct answer is answer1", "answer": "answer1"},
            {"instruction": "?", "output": "the correct answer is answer2", "answer": "answer2"},
        ],
        None,
    )
    assert grade_text(question, "the correct answer is answer1.") == {"accuracy": 1.0}
    assert grade_text(question, "answer2 or answer1") == grade_text(question, "") == {"accuracy": 0.0}


def test_prompts_are_those_of_the_warm_start(tmp_path):
    """`svdecode warmstart` reads the same files; a model must meet in the test what it was trained on."""
    import json

    path = tmp_path / "set.json"
    path.write_text(json.dumps(commonsense_rows(4)))
    trained = read_examples(path)
    tested = find_task("piqa").questions(read_rows(path), None)
    assert [(q.prompt, q.completion) for q in tested] == [(e["prompt"], e["completion"]) for e in trained]


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("Paris", 1.0),
        ("\n  paris. \nIt lies on the Seine.", 1.0),
        ("PARIS!", 1.0),
        ("Paris it is", 0.0),
        ("It is\nParis", 0.0),
        ("", 0.0),
    ],
)
def test_exact_match_takes_the_first_line_but_for_case_and_outer_punctuation(text, right):
    (question,) = find_task("exact_match").questions([{"prompt": "Capital?", "completion": " Paris"}], None)
    assert (question.prompt, question.completion) == ("Capital?", " Paris")
    assert exact_match.grade(question, text) == {"exact match": right}


def test_exact_match_reads_what_a_warm_start_reads():
    task = find_task("exact_match")
    rows = [{"instruction": "Capital?", "output": "Paris", "answer": "x"}]
    assert task.questions(rows, None)[0].prompt == "Capital?\n"
    with pytest.raises(ValueError, match="data for exact_match need prompt and completion, got text"):
        task.questions([{"text": "Paris"}], None)
    with pytest.raises(ValueError, match="data for exact_match, row 2: no 'completion'"):
        task.questions([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": " "}], None)


def test_exact_match_of_a_models_own_answers():
    """Completions made of what the model says: all are right, and none once they are changed."""
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    rows = [{"prompt": f"what is w{i} ?", "completion": "w1"} for i in range(4)]
    settings = {"max_new_tokens": 3, "progress": False}
    said = evaluate("exact_match", rows, model, tokenizer, **settings).records
    rows = [{**one, "completion": r["answers"]["pre-trained"].upper() + "."} for one, r in zip(rows, said, strict=True)]
    report = evaluate("exact_match", rows, model, tokenizer, **settings)
    assert report.results["exact match"]["pre-trained"]["mean"] == 1.0
    rows = [{**one, "completion": f"no {one['completion']}"} for one in rows]
    report = evaluate("exact_match", rows, model, tokenizer, **settings)
    assert report.results["exact match"]["pre-trained"]["mean"] == 0.0


def test_sets_that_nobody_has_seen():
    """Other labels, other columns in between, other sizes: no change of code."""
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    letters = [
        {"id": i, "instruction": f"w{i} alpha / beta", "output": f"{x} it is", "answer": x, "why": None}
        for i, x in enumerate(["alpha", "beta", "beta"])
    ]
    for score in ("generate", "choices"):
        report = evaluate("winogrande", letters, model, tokenizer, score=score, max_new_tokens=3, progress=False)
        assert report.results["accuracy"]["pre-trained"]["questions"] == 3
    truthful = [{**r, "Extra": ""} for r in truthful_rows(9, seed=4)]
    report = evaluate("truthfulqa_mc", truthful, model, tokenizer, few_shot=truthful_rows(2, seed=5), progress=False)
    assert report.questions == 9


def test_registry():
    names = (
        "truthfulqa_mc truthfulqa_gen boolq piqa social_i_qa hellaswag winogrande arc_easy arc_challenge openbookqa "
        "exact_match nll"
    )
    assert set(TASKS) == set(names.split())
    assert all(find_task(name).name == name for name in TASKS)
    with pytest.raises(ValueError, match="task must be one of"):
        find_task("mmlu")
