"""Masks that forbid every kept token: the adapted model's order decides, and no draw changes while a kept token is allowed."""

from __future__ import annotations

import pytest
import torch
from test_generate import Recompute, generated
from tiny import EOS, VOCABULARY, left_padded, tiny_llama, tiny_lora, tiny_prompt, two_model_logits
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.modeling_outputs import CausalLMOutputWithPast

import svdecode

MODES = ["paired", "lazy", "two_pass"]
MU, ALPHA = 1.7, 0.3


class WithFloor(Recompute):
    """Two separate models, nothing kept; outside K the adapted model's log-probs, 1000 nats below the least kept one."""

    def forward(self, input_ids, attention_mask=None, **_):
        pre, ft = (logits[:, -1:].double() for logits in two_model_logits(self.pair, input_ids, attention_mask))
        scores = svdecode.fused_steer(pre, ft, MU, alpha=ALPHA).logprobs
        adapted = ft.log_softmax(-1)
        for row, own in zip(scores.flatten(0, -2), adapted.flatten(0, -2), strict=True):
            kept = row > -torch.inf
            row[~kept] = own[~kept] + row[kept].min() - 1000
        return CausalLMOutputWithPast(logits=scores.float())


class Unchanged(LogitsProcessor):
    """Forbids nothing; but who could know?"""

    def __call__(self, input_ids, scores):
        return scores


class Grammar(LogitsProcessor):
    """Even and odd tokens in turns."""

    def __call__(self, input_ids, scores):
        allowed = torch.arange(scores.shape[-1]) % 2 == input_ids.shape[1] % 2
        return scores.masked_fill(~allowed, -torch.inf)


MASKS = {
    "suppressed": {"suppress_tokens": list(range(12, VOCABULARY))},
    "suppressed at the beginning": {"begin_suppress_tokens": list(range(3, VOCABULARY - 5))},
    "forbidden words": {"bad_words_ids": [[token] for token in range(40, 90)]},
    "an allowed list": {"prefix_allowed_tokens_fn": lambda _, ids: list(range(20 + len(ids), 30 + len(ids)))},
    "a grammar": {"logits_processor": LogitsProcessorList([Grammar()])},
    "a minimum length": {"min_new_tokens": 5, "eos_token_id": list(range(30, VOCABULARY))},
}
WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_p": 0.95},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
}


@pytest.fixture(scope="module")
def lora():
    return tiny_lora()


def steer(model, **options):
    return svdecode.steer(model, mu=MU, **{"alpha": ALPHA, **options})


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mask", MASKS)
def test_equals_a_recompute(lora, mask, way):
    options = {**MASKS[mask], **WAYS[way]}
    found = generated(WithFloor.of(lora), use_cache=False, output_scores=True, return_dict_in_generate=True, **options)
    assert min(scores.amax(-1).min() for scores in found.scores) < -500  # the mask has forbidden a whole kept set
    for mode in MODES:
        assert generated(steer(lora, mode=mode), **options).tolist() == found.sequences.tolist(), mode


@pytest.mark.parametrize("kind", ["prompt tuning", "prefix tuning"])
def test_prompt_learning_and_static_caches(kind):
    model = tiny_prompt(kind)
    expected = generated(WithFloor.of(model), use_cache=False, **MASKS["suppressed"])
    for cache in ("dynamic", "static"):
        options = {"cache_implementation": cache, **MASKS["suppressed"]}
        assert generated(steer(model), **options).tolist() == expected.tolist()


@pytest.mark.parametrize("mode", MODES)
def test_the_kept_set_is_what_ends_a_sequence(lora, mode):
    steered = steer(lora, mode=mode, alpha=1.0)
    ids = torch.tensor([[5, 6, 7, 8]])
    first, second = steered.pair_logits(input_ids=ids)[1][0, -1].topk(2).indices.tolist()
    options = {"max_new_tokens": 1, "min_new_tokens": 1, "eos_token_id": first}
    assert steered.generate(ids, do_sample=False, **options)[0, -1] == second
    drawn = torch.cat([steered.generate(ids, do_sample=True, top_k=0, **options)[:, -1] for _ in range(30)])
    assert len(drawn.unique()) > 1  # from the adapted model's distribution
    assert (drawn != first).all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "top_k": 0},
        {"do_sample": True, "temperature": 300.0, "top_k": 0},
        {"do_sample": True, "top_k": 30, "top_p": 0.99, "min_p": 0.01},
        {"do_sample": True, "typical_p": 0.9, "eta_cutoff": 1e-3, "epsilon_cutoff": 1e-3},
        {"num_beams": 4},
        {"num_beams": 3, "do_sample": True, "top_k": 8},
        {"repetition_penalty": 1.4},
    ],
    ids=str,
)
def test_nothing_changes_while_a_kept_token_is_allowed(lora, options):
    steered = steer(lora, alpha=0.02)
    for seed in range(3):
        plain = generated(steered, seed=seed, **options)
        with_mask = generated(steered, seed=seed, logits_processor=LogitsProcessorList([Unchanged()]), **options)
        assert with_mask.tolist() == plain.tolist()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["prompt lookup", "assistant"])
def test_assistants(lora, mode, how):
    steered = steer(lora, mode=mode)
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    options = {"max_new_tokens": 14, "do_sample": False, **MASKS["suppressed"]}
    helper = {"prompt_lookup_num_tokens": 3} if how == "prompt lookup" else {"assistant_model": tiny_llama()}
    assert steered.generate(ids, **helper, **options).tolist() == steered.generate(ids, **options).tolist()


def test_outside_of_masks_the_logits_stay_as_documented(lora):
    steered = steer(lora)
    ids, mask = left_padded()
    inputs = {"input_ids": ids, "attention_mask": mask}
    before = steered(**inputs).logits
    assert (before == -torch.inf).any()
    options = {"output_logits": True, "return_dict_in_generate": True}
    for harmless in ({}, {"do_sample": True, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.2}):
        logits = torch.stack(generated(steered, **options, **harmless).logits)
        assert torch.equal(logits > -torch.inf, logits > -500)  # no floor where nothing masks
        assert (logits == -torch.inf).any()
    masked = torch.stack(generated(steered, **options, **MASKS["suppressed"]).logits)
    assert (masked > -torch.inf).all()
    assert torch.equal(steered(**inputs).logits, before)

    def broken(_, ids):
        raise OSError("no grammar")

    with pytest.raises(OSError, match="no grammar"):
        generated(steered, prefix_allowed_tokens_fn=broken)
    assert torch.equal(steered(**inputs).logits, before)


def test_a_finite_penalty_needs_no_floor(lora):
    steered = steer(lora, penalty=-1.0)
    got = generated(steered, output_logits=True, return_dict_in_generate=True, **MASKS["suppressed"])
    assert torch.stack(got.logits).min() > -500


def test_guidance_is_refused_where_it_would_subtract_infinities(lora):
    with pytest.raises(ValueError, match=r"guidance_scale .* finite penalty"):
        generated(steer(lora), guidance_scale=1.5)
    assert generated(steer(lora, penalty=-1.0), guidance_scale=1.5).shape[0] == 3


def test_beams_of_the_thin_loop_whose_kept_set_is_used_up_do_not_win(lora):
    ids, mask = left_padded()
    steered = steer(lora, alpha=1.0)  # each kept set has one token
    options = {"max_new_tokens": 8, "eos_token_id": EOS}
    greedy = svdecode.generate(steered, ids, mask, **options)
    assert svdecode.generate(steered, ids, mask, num_beams=3, **options).tolist() == greedy.tolist()
