"""lm-eval on a steered model, offline, on tasks and data of our own: the likelihoods are the steered ones."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from test_demo import WORDS
from tiny import tiny_llama, tiny_lora
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import svdecode

lm_eval = pytest.importorskip("lm_eval")

MU = 1.3
TASKS = {
    "choices": """
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list: [{{metric: acc}}]
""",
    "rolling": """
task: rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: word_perplexity}}]
""",
    "answers": """
task: answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[gold]}}}}"
generation_kwargs: {{until: ["?"], max_gen_toks: 5}}
metric_list: [{{metric: exact_match}}]
""",
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm_eval")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    ).save_pretrained(folder / "model")
    tiny_llama(vocabulary=len(WORDS)).save_pretrained(folder / "model")
    model = tiny_lora(vocabulary=len(WORDS))
    model.save_pretrained(folder / "adapter")
    rows = [
        {"question": f"what is w{i} w{3 * i} ?", "choices": [f"w{i}", f"w{i + 1} w{i}", f"w{i + 2}"], "gold": i % 3}
        for i in range(12)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks").mkdir()
    for name, text in TASKS.items():
        (folder / "tasks" / f"{name}.yaml").write_text(text.format(data=folder / "data.jsonl"))
    return folder, rows, model


@pytest.fixture(scope="module")
def results(places):
    folder, _, _ = places
    from lm_eval.tasks import TaskManager

    from svdecode.evaluation.lm_eval import NAME

    return lm_eval.simple_evaluate(
        model=NAME,
        model_args={
            "pretrained": str(folder / "model"), "adapter": str(folder / "adapter"), "mu": MU, "device": "cpu",
            "dtype": "float32",
        },
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
        bootstrap_iters=0,
        batch_size=4,
    )  # fmt: skip


def ids(text):
    return [WORDS.index(word) if word in WORDS else 3 for word in text.split()]


def logprob(steered, context, continuation):
    """Steered log-prob of a continuation, one forward alone."""
    with torch.no_grad():
        logprobs = steered(torch.tensor([context + continuation])).logits[0].log_softmax(-1)
    return sum(logprobs[len(context) - 1 + i, token].item() for i, token in enumerate(continuation))


def test_choices_are_scored_by_the_steered_model(places, results):
    _, rows, model = places
    steered = svdecode.steer(model, mu=MU, penalty=0.0)
    for sample in results["samples"]["choices"]:
        row = rows[sample["doc_id"]]
        for choice, response in zip(row["choices"], sample["filtered_resps"], strict=True):
            expected = logprob(steered, ids(row["question"]), ids(choice))
            assert float(response[0]) == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_rolling_likelihoods(places, results):
    _, rows, model = places
    steered = svdecode.steer(model, mu=MU, penalty=0.0)
    for sample in results["samples"]["rolling"]:
        expected = logprob(steered, [2], ids(rows[sample["doc_id"]]["question"]))  # <bos> in front
        assert float(sample["filtered_resps"][0]) == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_generated_answers(places, results):
    _, rows, model = places
    steered = svdecode.steer(model, mu=MU)
    assert len(results["samples"]["answers"]) == len(rows)
    for sample in results["samples"]["answers"]:
        prompt = ids(rows[sample["doc_id"]]["question"])
        tokens = steered.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False)[0, len(prompt) :]
        words = [WORDS[t] for t in tokens.tolist() if t > 1]
        words = words[: words.index("?")] if "?" in words else words
        assert sample["filtered_resps"][0].split() == words


def test_a_mask_that_forbids_the_kept_set(places):
    from svdecode.evaluation.lm_eval import SteeredLM

    folder, rows, model = places
    paths = {"pretrained": str(folder / "model"), "adapter": str(folder / "adapter")}
    lm = SteeredLM(**paths, mu=MU, alpha=1.0, device="cpu", dtype="float32")
    context = torch.tensor([ids(rows[0]["question"])])
    with torch.no_grad():
        adapted = model(context).logits[0, -1]
    kept, second = adapted.topk(2).indices.tolist()
    mask = {"suppress_tokens": [kept]}
    assert lm._model_generate(context, context.shape[1] + 1, stop=[], do_sample=False, **mask)[0, -1] == second


def test_results_say_how_the_model_was_steered(places, results):
    folder, _, _ = places
    config = {name: results["config"][name] for name in (*svdecode.Setting._fields, "scoring_penalty", "mode")}
    assert config == {
        "mu": MU, "alpha": 0.1, "penalty": "-inf", "direction": "kl", "scoring_penalty": 0.0, "mode": "paired",
    }  # fmt: skip
    assert results["config"]["adapter"] == str(folder / "adapter")
    assert results["config"]["steer_from"] is None


def test_results_have_a_name_of_their_own():
    from lm_eval.loggers.evaluation_tracker import GeneralConfigTracker

    from svdecode.evaluation.lm_eval import NAME, result_name

    assert result_name("pretrained=org/base,adapter=a/lora,mu=0.5") == "org/base-svdecode-lora-mu0.5"
    assert result_name({"pretrained": "base", "steer_from": "org/small"}) == "base-svdecode-small"
    for source, name in ((NAME, "org__base-svdecode-lora"), ("hf", "org__base")):
        tracker = GeneralConfigTracker()
        tracker.log_experiment_args(source, "pretrained=org/base,adapter=a/lora", None, None, False)
        assert tracker.model_name_sanitized == name


def test_the_launcher(places, tmp_path):
    folder, _, _ = places
    command = [
        sys.executable, "-m", "svdecode", "lm-eval", "--tasks", "choices", "--include_path", folder / "tasks",
        "--model_args", f"pretrained={folder / 'model'},adapter={folder / 'adapter'},mu={MU}", "--device", "cpu",
        "--output_path", tmp_path,
    ]  # fmt: skip
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "choices" in done.stdout
    (saved,) = tmp_path.rglob("results_*.json")
    assert saved.parent.name.endswith(f"model-svdecode-adapter-mu{MU}")
    config = json.loads(saved.read_text(), parse_constant=pytest.fail)["config"]
    assert (config["mu"], config["direction"], config["adapter"]) == (MU, "kl", str(folder / "adapter"))
    words = [str(word) for word in command[:8]] + ["--model_args", "pretrained=x"]
    wrong = subprocess.run(words, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "adapter=FOLDER or steer_from=MODEL" in wrong.stderr.splitlines()[-1]


def test_what_is_refused(places):
    from svdecode.evaluation.lm_eval import SteeredLM

    folder, _, _ = places
    with pytest.raises(ValueError, match="one of them"):
        SteeredLM(str(folder / "model"), mu=1.0)
    with pytest.raises(ValueError, match="no calibration in"):
        SteeredLM(str(folder / "model"), adapter=str(folder / "adapter"))
    with pytest.raises(ValueError, match=r"model_args has no peft=: write adapter=org/lora for a PEFT adapter"):
        SteeredLM(str(folder / "model"), peft="org/lora", mu=1.0)
    with pytest.raises(ValueError, match="needs mu=NUMBER"):
        SteeredLM(str(folder / "model"), steer_from=str(folder / "model"))
