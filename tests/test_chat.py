"""Chat data: the labelled tokens are the assistant's turns and nothing else, as the chat template renders them."""

from __future__ import annotations

import json

import pytest
from chat_kit import CHATML, END, TALK, TEMPLATES, chat_tokenizer, message
from torch import tensor

from svdecode.constants import IGNORE_INDEX
from svdecode.data.batches import encode, numbered_batches
from svdecode.data.chat import check_template, end_of_turn, labelled_tokens, prompt_tokens
from svdecode.data.conversations import conversation
from svdecode.data.examples import check_examples, examples_of, read_examples
from svdecode.data.sources import read_rows
from svdecode.data.splits import Splits, data_hash, example_hash
from svdecode.evaluation.items import gold_rows
from svdecode.evaluation.tasks import find_task

THINKING = (  # as Qwen 3: only the last answer of a conversation keeps its thoughts
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% if loop.last %}{{ 'hm. ' }}{% endif %}BEGIN{{ m['content'] + '<|im_end|>' }}END{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = THINKING.replace("BEGIN", "{% generation %}").replace("END", "{% endgeneration %}")
UNMARKED = THINKING.replace("BEGIN", "").replace("END", "")


def labelled(encoded, tokenizer) -> str:
    """The text of the labelled tokens, which stand where they do among the ids."""
    assert all(
        label in (IGNORE_INDEX, token) for label, token in zip(encoded["labels"], encoded["input_ids"], strict=True)
    )
    return tokenizer.decode([label for label in encoded["labels"] if label != IGNORE_INDEX])


def said(family: str, messages) -> str:
    """What the assistant's turns are in the rendering: the three templates but ChatML strip the contents."""
    texts = [m["content"] if family == "chatml" else m["content"].strip() for m in messages if m["role"] == "assistant"]
    return "".join(text + END[family] for text in texts)


@pytest.mark.parametrize("family", TEMPLATES)
def test_the_labelled_tokens_decode_to_exactly_the_assistants_turns(family):
    tokenizer = chat_tokenizer(family)
    system = [] if family == "gemma" else [message("system", "the fox says 4!")]
    talks = [TALK[:2], TALK, [*system, *TALK], [*TALK, message("user", "and?")], [*TALK[:2], *TALK[:2], *TALK]]
    if family != "gemma":
        talks.append([message("user", "a"), message("assistant", "naïve 🙂, 2 + 2 = 4\u2028!")])
    for messages in talks:
        encoded = encode({"messages": messages}, tokenizer)
        assert labelled(encoded, tokenizer) == said(family, messages)
        last = encode(conversation({"messages": messages}, "last"), tokenizer)
        *_, spoken = (m for m in messages if m["role"] == "assistant")
        assert labelled(last, tokenizer) == said(family, [spoken])
        # The ids are those of the rendering as it is: one <bos> where the template has it, and no <eos>.
        assert last["input_ids"] == encoded["input_ids"]
        until = messages[: 1 + max(i for i, m in enumerate(messages) if m["role"] == "assistant")]
        rendered = tokenizer.apply_chat_template(until, tokenize=False)
        assert tokenizer.decode(encoded["input_ids"]) == rendered
        assert encoded["input_ids"].count(tokenizer.bos_token_id) == (family != "chatml")
        assert tokenizer.eos_token_id not in encoded["input_ids"]
        # A model that generates begins where the labels begin.
        prompt = prompt_tokens(tokenizer, until[:-1])[1]
        assert last["input_ids"][: len(prompt)] == prompt
        assert last["labels"][len(prompt)] != IGNORE_INDEX
        assert set(last["labels"][: len(prompt)]) == {IGNORE_INDEX}
    assert end_of_turn(tokenizer) == [tokenizer.convert_tokens_to_ids(END[family])]


@pytest.mark.parametrize("family", TEMPLATES)
def test_prompt_and_completion_as_messages(family):
    tokenizer = chat_tokenizer(family)
    encoded = encode({"prompt": TALK[:3], "completion": TALK[3:]}, tokenizer)
    assert labelled(encoded, tokenizer) == said(family, TALK[3:])
    assert encoded["input_ids"] == encode({"messages": TALK}, tokenizer)["input_ids"]
    both = encode({"prompt": TALK[:1], "completion": TALK[1:]}, tokenizer)
    assert both == encode({"messages": TALK}, tokenizer)
    assert encode({"messages": TALK}, tokenizer, max_length=9) == {name: ids[:9] for name, ids in both.items()}


def test_share_gpt_and_tools():
    tokenizer = chat_tokenizer("chatml")
    shared = [{"from": "human", "value": "hello there"}, {"from": "gpt", "value": "I am well."}]
    same = [message("user", "hello there"), message("assistant", "I am well.")]
    assert encode({"conversations": shared}, tokenizer) == encode({"messages": same}, tokenizer)
    tokenizer.chat_template = "{% if tools %}{{ tools[0]['name'] }}{% endif %}" + CHATML
    encoded = encode({"messages": same, "tools": [{"name": "fox"}]}, tokenizer)
    assert tokenizer.decode(encoded["input_ids"]).startswith("fox<|im_start|>")
    assert labelled(encoded, tokenizer) == said("chatml", same)


def test_a_token_over_the_border_of_a_turn():
    """The generation prompt ends with a space, which " hello" takes up where the text is tokenised as a whole."""
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tokenizer = chat_tokenizer("chatml", template)
    messages = [message("user", "hello"), message("assistant", "there, how"), *TALK[:2]]
    whole = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False)).input_ids
    ids, turns = labelled_tokens({"messages": messages}, tokenizer)
    assert ids != whole
    assert [tokenizer.decode(ids[begin:end]) for begin, end in turns] == ["there, how", TALK[1]["content"]]
    assert tokenizer.decode(ids) == tokenizer.decode(whole)
    assert end_of_turn(tokenizer) == []


def test_a_template_that_changes_earlier_turns_needs_marks_or_the_last_turn():
    tokenizer = chat_tokenizer("chatml", MARKED)
    ends = [m["content"] + END["chatml"] for m in TALK if m["role"] == "assistant"]
    assert labelled(encode({"messages": TALK}, tokenizer), tokenizer) == "".join(ends)
    tokenizer.chat_template = UNMARKED
    with pytest.raises(ValueError, match=r"conversation that begins 'user.*does not show where.*--turns last, or mark"):
        encode({"messages": TALK}, tokenizer)
    last = encode(conversation({"messages": TALK}, "last"), tokenizer)
    assert labelled(last, tokenizer) == "hm. " + ends[-1]
    tokenizer.chat_template = MARKED.replace("{{ m['content'] +", "{{ 'x' +")
    with pytest.raises(ValueError, match="what the chat template marks is not the text of the assistant's turns"):
        encode({"messages": TALK}, tokenizer)


def test_tokens_that_lose_the_text_are_refused():
    tokenizer = chat_tokenizer("gemma")
    with pytest.raises(ValueError, match="do not decode to its text"):
        encode({"messages": [message("user", "a"), message("assistant", "naïve")]}, tokenizer)


def test_batches_take_conversations_and_texts():
    tokenizer = chat_tokenizer("llama3")
    data = [{"messages": TALK}, {"prompt": "hello", "completion": "there"}]
    ((batch,), count) = (
        list(found) if i == 0 else found for i, found in enumerate(numbered_batches(data, tokenizer, 2))
    )
    assert count == 1
    for number, ids, mask in zip(batch["sequence"], batch["input_ids"], batch["attention_mask"], strict=True):
        assert (ids[mask.bool()] == tensor(encode(data[number], tokenizer)["input_ids"])).all()
    datasets = pytest.importorskip("datasets")
    found = next(numbered_batches(datasets.Dataset.from_list([{"messages": TALK}]), tokenizer, 1)[0])
    assert found["labels"][0].tolist() == encode(data[0], tokenizer)["labels"]
    assert check_examples(datasets.Dataset.from_list([{"messages": TALK}])) == check_examples(data[:1])


def test_each_turn_is_an_item_of_the_nll():
    tokenizer = chat_tokenizer("llama3")
    (question,) = find_task("nll").questions([{"messages": TALK, "text": "x"}], None)
    encoded = encode({"messages": TALK}, tokenizer)
    rows = gold_rows(question, tokenizer)
    assert [tokenizer.decode(answer) for _, answer in rows] == [said("llama3", TALK[1:2]), said("llama3", TALK[3:])]
    for prompt, answer in rows:
        assert prompt + answer == encoded["input_ids"][: len(prompt) + len(answer)]
    with pytest.raises(ValueError, match=r"data for exact_match need texts.*got conversations"):
        find_task("exact_match").questions([{"messages": TALK}], None)


def test_splits_of_conversations(tmp_path):
    talks = [[message("user", f"hello {i // 2}"), message("assistant", f"{i}"), *TALK] for i in range(20)]
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    examples = read_examples(path)
    splits = Splits.make(examples, fractions=(0.5, 0.3, 0.2))
    assert splits.sizes == {"train": 10, "calibration": 6, "test": 4}
    # The same conversations, whatever turns count and from whatever layout they come.
    for same in (
        read_examples(path, turns="last"),
        examples_of(read_rows(path)),
        [{"messages": talk} for talk in talks],
    ):
        assert data_hash(same) == splits.data_sha256
        assert {example_hash(row) for row in splits.select(same, "test")} == set(splits.parts["test"])
    prompts = [{key.split("-")[0] for key in part} for part in splits.parts.values()]
    assert sum(map(len, prompts)) == len(set().union(*prompts)) == 10
    assert data_hash([{"messages": talks[0]}]) != data_hash([{"messages": talks[1]}])


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": TALK[:1]}, "a.jsonl, line 2: messages has no assistant turn"),
        ({"messages": []}, "a.jsonl, line 2: messages has no assistant turn"),
        ({"messages": "hi"}, "a.jsonl, line 2: messages must be a list of messages with role and content, got 'hi'"),
        ({"messages": [7]}, "a.jsonl, line 2: messages, message 1: role and content are needed, got 7"),
        ({"messages": [{"role": "user", "content": [1]}]}, r"line 2: messages, message 1: content must be a text, got \[1"),
        ({"prompt": TALK, "completion": TALK[:1]}, "a.jsonl, line 2: completion has no assistant turn"),
        ({"prompt": TALK, "completion": "hi"}, "a.jsonl, line 2: completion must be a list of messages"),
        ({"prompt": "hi", "completion": TALK}, "a.jsonl, line 2: prompt must be a list of messages"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "a.jsonl, line 2: conversations has no assistant turn"),
    ],
)  # fmt: skip
def test_bad_rows_name_the_file_and_the_line(tmp_path, row, words):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": TALK}) + "\n" + json.dumps(row) + "\n")
    for read in (read_examples, lambda path: find_task("nll").questions(read_rows(path), None)):
        with pytest.raises(ValueError, match=words) as error:
            read(path)
        assert "\n" not in str(error.value)


def test_bad_templates_name_the_tokenizer_or_the_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": [message("system", "x"), *TALK]}))
    (example,) = read_examples(path)
    with pytest.raises(ValueError, match=r"a.jsonl, line 1: the chat template refuses it: System role not supported"):
        encode(example, chat_tokenizer("gemma"))
    with pytest.raises(ValueError, match="has no chat template"):
        check_template(chat_tokenizer("chatml", ""))
    with pytest.raises(ValueError, match="turns must be one of all, last, got 'first'"):
        conversation(example, "first")


def test_named_columns_and_questions_with_answers(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("Question,Answer,My Prompt,reply\nWhy?, So. ,a,b\n")
    assert read_examples(path) == [{"prompt": "Q: Why?\nA:", "completion": " So."}]
    (named,) = read_examples(path, columns=("my prompt", "Reply"))
    assert (named["prompt"], named["completion"]) == ("a", "b")
    with pytest.raises(
        ValueError, match=r"a.csv, line 2: no column 'none' \(columns: question, answer, my_prompt, reply"
    ):
        read_examples(path, columns=("none", "reply"))
    path = tmp_path / "b.json"
    path.write_text(json.dumps([{"ask": TALK[:1], "tell": TALK[1:2]}]))
    assert read_examples(path, columns=("ask", "tell")) == [{"prompt": TALK[:1], "completion": TALK[1:2]}]
