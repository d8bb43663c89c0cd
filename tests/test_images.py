"""Models with images: each of the two models sees them with its own tower and projector, in every mode."""

from __future__ import annotations

import functools

import pytest
import torch
from architectures_images import ARCHITECTURES, image_model, image_row, one_more, together
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny import randomise, steered_logprobs, tiny_llama, two_model_forwards

import svdecode
from svdecode.models.image_inputs import PAIRED

MODES = ["paired", "lazy", "two_pass"]
MU, ALPHA, STEPS = 1.7, 0.02, 5
TARGETS = {
    "text": {"target_modules": r".*(language_model|text_model)\.layers.*\.(q_proj|v_proj|down_proj)"},
    "all": {"target_modules": "all-linear"},
    "vision": {"target_modules": r".*(vision|visual).*\.(q_proj|k_proj|qkv|fc1|fc2)"},
    "projector": {
        "target_modules": r".*(projector\.linear.*|connector.*proj|merger\.(mlp\.[02]|linear_fc\d))",
    },
    "saved projector": {
        "target_modules": ["v_proj"],
        "modules_to_save": ["multi_modal_projector", "modality_projection", "merger"],
    },
}  # fmt: skip


@functools.lru_cache(maxsize=2)
def adapted(name, where):
    if (name, where) == ("gemma3", "projector"):
        pytest.skip("its projector is a matrix, which modules_to_save trains")
    model = get_peft_model(image_model(name), LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **TARGETS[where]))
    torch.manual_seed(3)
    randomise(model)
    return model.eval()


def rows_of(name, counts=(1, 2)):
    return [image_row(name, 16 - 2 * i, count, seed=i) for i, count in enumerate(counts)]


def recompute(name, model, rows):
    """Greedy tokens of each row, alone and without a cache, from two separate models."""
    found = []
    for row in rows:
        for _ in range(STEPS):
            pre, ft = two_model_forwards(model, **row)
            row = one_more(name, row, steered_logprobs(pre[:, -1], ft[:, -1], MU, alpha=ALPHA).argmax(-1)[:, None])
        found.append(row["input_ids"][0, -STEPS:].tolist())
    return found


OPTIONS = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.mark.parametrize("where", TARGETS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_both_models_see_the_images(name, where):
    model, rows = adapted(name, where), rows_of(name)
    expected = recompute(name, model, rows)
    batch = together(rows)
    assert svdecode.steer(model, mu=MU).mode == "paired"
    for mode in MODES:
        steered = svdecode.steer(model, mu=MU, alpha=ALPHA, mode=mode)
        for row in rows:
            with torch.no_grad():
                got = steered.pair_logits(**row)[:2]
            for ours, own in zip(got, two_model_forwards(model, **row), strict=True):
                torch.testing.assert_close(ours, own, rtol=1e-3, atol=1e-3)
        assert steered.generate(**batch, **OPTIONS)[:, -STEPS:].tolist() == expected
        if where == "all":
            assert steered.generate(**batch, **OPTIONS, use_cache=False)[:, -STEPS:].tolist() == expected


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_beams_keep_their_images(name, mode):
    model, batch = adapted(name, "all"), together(rows_of(name, (1, 1)))
    steered = svdecode.steer(model, mu=MU, alpha=ALPHA, mode=mode)
    alone = [steered.generate(**row, **OPTIONS, num_beams=3, use_cache=False) for row in rows_of(name, (1, 1))]
    got = steered.generate(**batch, **OPTIONS, num_beams=3)
    assert got[:, -STEPS:].tolist() == [row[0, -STEPS:].tolist() for row in alone]


@pytest.mark.parametrize("mode", ["lazy", "two_pass"])
def test_two_models_with_images(mode):
    """Each encodes the images itself, also where generate() encodes them before the first forward."""
    expert, amateur = image_model("llava"), image_model("llava")
    torch.manual_seed(9)
    for parameter in amateur.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    settings = {"alpha": 0.0, "direction": "log_ratio"}
    steered = svdecode.steer(expert, pretrained=amateur, mu=0.5, mode=mode, **settings)
    row = image_row("llava", 12, 1)
    with torch.no_grad():
        pre, ft = (model(**row).logits[:, -1] for model in (amateur, expert))
    got = steered.generate(**row, **OPTIONS, output_logits=True, return_dict_in_generate=True).logits[0]
    torch.testing.assert_close(got, steered_logprobs(pre, ft, 0.5, **settings), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava"])
def test_text_alone(name, mode):
    model = adapted(name, "text")
    steered = svdecode.steer(model, mu=MU, alpha=ALPHA, mode=mode)
    rows = [{"input_ids": torch.randint(3, 90, (1, n))} for n in (8, 5)]
    rows = [{**row, "attention_mask": torch.ones_like(row["input_ids"])} for row in rows]
    expected = []
    for row in rows:
        ids = row["input_ids"]
        for _ in range(STEPS):
            pre, ft = two_model_forwards(model, input_ids=ids)
            ids = torch.cat([ids, steered_logprobs(pre[:, -1], ft[:, -1], MU, alpha=ALPHA).argmax(-1)[:, None]], 1)
        expected.append(ids[0, -STEPS:].tolist())
    padded = {key: torch.cat([rows[0][key], torch.nn.functional.pad(rows[1][key], (3, 0))]) for key in rows[0]}
    assert steered.generate(**padded, **OPTIONS)[:, -STEPS:].tolist() == expected
    assert svdecode.generate(steered, **padded, max_new_tokens=STEPS, eos_token_id=[])[:, -STEPS:].tolist() == expected
    with torch.no_grad():
        steered(input_ids=rows[0]["input_ids"])  # nothing says use_cache, and the configuration has none of its own


@pytest.mark.parametrize("mode", MODES)
def test_steps_after_images_that_count_their_positions_themselves(mode):
    """Qwen2-VL keeps in the model how far positions behind images are from the number of tokens."""
    model = adapted("qwen2_vl", "text")
    steered = svdecode.steer(model, mu=MU, alpha=ALPHA, mode=mode)
    row = image_row("qwen2_vl", 14, 2)
    pair = {key: torch.cat([value, value]) for key, value in row.items()}
    pair["input_ids"][1, 8:] += 1
    whole = two_model_forwards(model, **pair)
    short = {"input_ids", "attention_mask", "mm_token_type_ids"}
    steered.generate(**row, **OPTIONS)  # leaves the offsets of another batch behind
    with torch.no_grad():
        first = {key: value[:, :-1] if key in short else value for key, value in pair.items()}
        cache = steered(**first, use_cache=True).past_key_values
        got = steered.pair_logits(input_ids=pair["input_ids"][:, -1:], past_key_values=cache)[:2]
    for ours, own in zip(got, whole, strict=True):
        torch.testing.assert_close(ours, own[:, -1:], rtol=1e-3, atol=1e-3)


def test_what_cannot_be_shared_is_refused():
    model, row = adapted("llava", "text"), image_row("llava", 12, 1)
    steered = svdecode.steer(model, mu=MU)
    with torch.no_grad():
        features = {"image": model.get_base_model().model.get_image_features(row["pixel_values"], return_dict=True)}
    with pytest.raises(ValueError, match="mm_encoder_outputs are of one model"):
        steered(input_ids=row["input_ids"], mm_encoder_outputs=features)
    with pytest.raises(ValueError, match="assistant_model="):
        steered.generate(**row, assistant_model=tiny_llama())
    prompted = get_peft_model(image_model("llava"), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="prompt-learning adapter cannot be steered with pixel_values"):
        svdecode.steer(prompted, mu=MU)(**row)
    base = image_model("llava")
    guided = svdecode.steer(base, pretrained=base, mu=0.5, alpha=0.0, direction="log_ratio")
    with pytest.raises(ValueError, match="pretrained_input_ids cannot have pixel_values"):
        guided(**row, pretrained_input_ids=row["input_ids"])
    blind = svdecode.steer(base, pretrained=tiny_llama(), mu=MU)
    for call in (blind, blind.generate):
        with pytest.raises(ValueError, match="LlamaForCausalLM, which takes no"):
            call(**row)


def test_other_types_do_not_share_a_forward(monkeypatch):
    model = adapted("llava", "text")
    monkeypatch.setattr("svdecode.models.image_inputs.PAIRED", ())
    assert svdecode.steer(model, mu=MU).mode == "lazy"
    with pytest.raises(ValueError, match="tower for images"):
        svdecode.steer(model, mu=MU, mode="paired")
    assert set(ARCHITECTURES) == set(PAIRED)


def test_calibrate_sees_the_images():
    model = adapted("llava", "all")
    row = image_row("llava", 12, 1)
    labels = row["input_ids"].clone()
    labels[:, :8] = -100
    other = {**row, "pixel_values": row["pixel_values"].flip(-1)}
    mu = [svdecode.calibrate(model, [{**r, "labels": labels}], alpha=0.0, progress=False).mu for r in (row, other)]
    assert mu[0] != pytest.approx(mu[1], rel=1e-2)
