"""Every argument of a forward reaches both models, in every mode, or is refused."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import left_padded, randomise, steered_logprobs, tiny_llama, tiny_lora, tiny_model, two_model_forwards

import svdecode

MODES = ["paired", "lazy", "two_pass"]
MU, ALPHA = 1.7, 0.02
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])


def lora_on(architecture):
    model = get_peft_model(tiny_model(architecture), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(3)
    randomise(model, scale=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def gpt2():
    return lora_on("gpt2")


@torch.no_grad()
def assert_both(steered, model, **inputs):
    """Both models' logits are those of plain forwards of two separate models."""
    got = steered.pair_logits(**inputs, use_cache=False)[:2]
    for ours, own in zip(got, two_model_forwards(model, **inputs), strict=True):
        torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_types_of_tokens(gpt2, mode):
    types = torch.tensor([[3, 3, 4, 4, 5, 5], [5, 5, 5, 4, 4, 4]])
    steered = svdecode.steer(gpt2, mu=MU, alpha=ALPHA, mode=mode)
    assert_both(steered, gpt2, input_ids=IDS, token_type_ids=types)
    got = steered.generate(IDS, token_type_ids=types, max_new_tokens=6, do_sample=False, eos_token_id=None)
    ids = IDS
    for _ in range(6):  # generate() gives a new token the type of the last one
        longer = torch.cat([types, types[:, -1:].expand(-1, ids.shape[1] - 6)], 1)
        pre, ft = two_model_forwards(gpt2, input_ids=ids, token_type_ids=longer)
        ids = torch.cat([ids, steered_logprobs(pre[:, -1:], ft[:, -1:], MU, alpha=ALPHA).argmax(-1)], 1)
    assert got.tolist() == ids.tolist()


@pytest.mark.parametrize("mode", MODES)
def test_sequences_that_are_packed_by_their_positions(mode):
    lora = tiny_lora()
    packed, positions = IDS.reshape(1, -1), torch.arange(6).repeat(2)[None]
    steered = svdecode.steer(lora, mu=MU, alpha=ALPHA, mode=mode)
    assert_both(steered, lora, input_ids=packed, position_ids=positions)
    with torch.no_grad():
        alone = steered.pair_logits(input_ids=IDS[1:], use_cache=False)
        together = steered.pair_logits(input_ids=packed, position_ids=positions, use_cache=False)
    for one, both in zip(alone[:2], together[:2], strict=True):
        torch.testing.assert_close(both[:, 6:], one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", ["llama", "opt"])  # OPT counts positions by the mask where none are given
def test_padding_without_positions(architecture, mode):
    model = lora_on(architecture)
    ids, mask = left_padded((6, 3))
    steered = svdecode.steer(model, mu=MU, alpha=1.0, mode=mode)
    expected = two_model_forwards(model, input_ids=ids, attention_mask=mask)
    used = mask.bool()
    with torch.no_grad():
        first = steered(input_ids=ids[:, :4], attention_mask=mask[:, :4], use_cache=True)  # lazy: all of it waits
        rest = dict(input_ids=ids[:, 4:], attention_mask=mask, past_key_values=first.past_key_values)
        got = steered.pair_logits(**rest)[:2]
        whole = steered.pair_logits(input_ids=ids, attention_mask=mask)[:2]
    for ours, cached, own in zip(whole, got, expected, strict=True):
        torch.testing.assert_close(ours[used], own[used], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(cached, own[:, 4:], rtol=1e-4, atol=1e-4)


def test_tokens_that_wait_keep_their_kind_of_positions(gpt2):
    """With and without positions, and with types of tokens: each forward's own, also where its tokens run later."""
    types = torch.full((2, 2), 5)
    lazy = svdecode.steer(gpt2, mu=MU, alpha=1.0, mode="lazy")
    two = svdecode.steer(gpt2, mu=MU, alpha=1.0, mode="two_pass")
    steps = ({}, {"position_ids": torch.tensor([[7, 9]])}, {"token_type_ids": types}, {})
    found = []
    for steered in (lazy, two):
        cache = None
        with torch.no_grad():
            for number, extra in enumerate(steps):
                last = number == len(steps) - 1
                call = steered.pair_logits if last else steered  # alpha=1: nothing is needed before the last step
                out = call(input_ids=IDS[:, :2] + number, past_key_values=cache, use_cache=True, **extra)
                cache = None if last else out.past_key_values
        found.append(out[0])
    assert lazy.skipped_row_steps == 4  # of the two forwards without types
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_arguments_whose_rows_are_unknown_are_refused():
    steered = svdecode.steer(tiny_lora(), mu=MU)
    for name, value in {"cu_seq_lens_q": torch.tensor([0, 6]), "unknown": torch.zeros(3, 2)}.items():
        with pytest.raises(ValueError, match=f"argument {name}.*mode='two_pass'"):
            steered(input_ids=IDS, **{name: value})
    lazy = svdecode.steer(tiny_lora(), mu=MU, mode="lazy")
    with pytest.raises(ValueError, match=r"attention_mask \(B, S\)"):
        lazy(input_ids=IDS, attention_mask=torch.ones(2, 1, 6, 6, dtype=torch.bool), use_cache=True)


@pytest.mark.parametrize("mode", ["lazy", "two_pass"])
def test_arguments_that_the_other_model_does_not_take_are_refused(gpt2, mode):
    steered = svdecode.steer(gpt2, pretrained=tiny_llama(), mu=MU, mode=mode)
    with pytest.raises(ValueError, match="LlamaForCausalLM, which takes no token_type_ids"):
        steered(input_ids=IDS, token_type_ids=torch.zeros_like(IDS))


@pytest.mark.parametrize("mode", ["lazy", "two_pass"])
def test_a_model_without_logits_to_keep_on_one_side(mode):
    model, other = tiny_llama(), tiny_model("gpt2")
    other.__class__ = type("Whole", (type(other),), {"forward": _without_logits_to_keep})
    steered = svdecode.steer(model, pretrained=other, mu=MU, alpha=0.0, direction="log_ratio", mode=mode)
    with torch.no_grad():
        expected = steered_logprobs(
            other(input_ids=IDS).logits[:, -1], model(IDS).logits[:, -1], MU, alpha=0.0, direction="log_ratio"
        )
        got = steered(input_ids=IDS, logits_to_keep=1).logits[:, -1]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def _without_logits_to_keep(self, input_ids=None, use_cache=None, **keywords):
    keywords.pop("logits_to_keep", None)  # swallowed, as by a forward with **kwargs
    return super(type(self), self).forward(input_ids=input_ids, use_cache=use_cache, **keywords)


def test_calibrate_passes_on_what_the_model_takes(gpt2):
    types, positions = torch.full_like(IDS, 5), torch.arange(6).repeat(2)[None]
    labels = IDS.clone()
    labels[:, :2] = -100
    typed = {"input_ids": IDS, "labels": labels, "token_type_ids": types}
    packed = {"input_ids": IDS.reshape(1, -1), "labels": labels.reshape(1, -1), "position_ids": positions}
    plain = {"input_ids": IDS, "labels": labels}
    mu = {
        name: svdecode.calibrate(gpt2, [batch], alpha=0.0, progress=False).mu
        for name, batch in {"typed": typed, "packed": packed, "plain": plain}.items()
    }
    assert mu["packed"] == pytest.approx(mu["plain"], rel=1e-4)
    assert mu["typed"] != pytest.approx(mu["plain"], rel=1e-2)
