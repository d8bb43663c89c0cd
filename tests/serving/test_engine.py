"""What vLLM does around a model: sampling, beams, log-probs of prompts, speculation, preemption, masks. On a tiny Llama."""

from __future__ import annotations

import collections
import math

import kit
import pytest
import torch
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import BeamSearchParams

from svdecode.serving.names import MU

pytestmark = pytest.mark.engine


@pytest.fixture
def llama(models):
    return kit.tiny(models, "llama")


def steered_rows(folder, prompt, **options):
    """(T, V) steered log-probs of transformers after each token of a prompt."""
    return kit.in_transformers(folder, **options)(input_ids=torch.tensor([prompt])).logits[0]


def test_draws_are_those_of_the_steered_distribution(llama):
    """One request with n > 1, at temperature 1: nothing outside the kept set, and chi-square."""
    prompt, n = kit.prompts()[2], 2000
    rows = steered_rows(llama, prompt)
    last = int((rows > -math.inf).sum(-1).argmax())  # the position with most kept tokens
    row = rows[last]
    llm = kit.engine(llama, max_num_seqs=64, max_num_batched_tokens=256)
    params = SamplingParams(temperature=1, n=n, max_tokens=1, detokenize=False)
    drawn = collections.Counter(o.token_ids[0] for o in kit.ask(llm, [prompt[: last + 1]], params)[0].outputs)
    expected = n * row.exp()
    assert sum(drawn.values()) == n
    assert all(expected[token] > 0 for token in drawn)
    cells = [(drawn[token], float(expected[token])) for token in (expected >= 5).nonzero()[:, 0].tolist()]
    assert len(cells) >= 3
    chi_square = sum((seen - mean) ** 2 / mean for seen, mean in cells)
    assert chi_square < len(cells) + 5 * math.sqrt(2 * len(cells))


def test_log_probs_of_the_prompt(llama):
    """Through chunks too; a token outside the kept set is far below, and the draws do not change."""
    inputs = kit.prompts()
    llm = kit.engine(llama)
    outputs = kit.ask(llm, inputs, kit.greedy(1, prompt_logprobs=0))
    outside = 0
    for output, prompt in zip(outputs, inputs, strict=True):
        rows = steered_rows(llama, prompt)
        for position, entry in enumerate(output.prompt_logprobs[1:]):
            known, given = rows[position, prompt[position + 1]].item(), entry[prompt[position + 1]].logprob
            outside += known == -math.inf
            assert given < -900 if known == -math.inf else abs(given - known) < 1e-4
    assert 0 < outside < sum(map(len, inputs)) - len(inputs)


def test_beams(llama):
    inputs = kit.prompts()[1:3]
    steered = kit.in_transformers(llama)
    llm = kit.engine(llama, max_num_seqs=16, skip_tokenizer_init=False)
    found = llm.beam_search(
        [{"prompt_token_ids": prompt} for prompt in inputs],
        BeamSearchParams(beam_width=3, max_tokens=6, ignore_eos=True),
    )
    for output, prompt in zip(found, inputs, strict=True):
        ids = torch.tensor([prompt])
        wanted = steered.generate(
            ids, attention_mask=torch.ones_like(ids), num_beams=3, num_return_sequences=3, max_new_tokens=6, do_sample=False,
            pad_token_id=0, eos_token_id=None, output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        assert [beam.tokens for beam in output.sequences] == wanted.sequences.tolist()
        scores = torch.tensor([beam.cum_logprob for beam in output.sequences]) / 6
        torch.testing.assert_close(scores, wanted.sequences_scores, atol=1e-4, rtol=0)


def test_ngram_speculation(llama):
    inputs = [prompt * 3 for prompt in kit.prompts((3, 9, 17))]
    wanted = [kit.reference(kit.in_transformers(llama), prompt, 24) for prompt in inputs]
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    llm = kit.engine(llama, speculative_config=speculation, disable_log_stats=False)
    kit.assert_equal(kit.ask(llm, inputs, kit.greedy(24)), wanted)
    counts = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    assert counts["vllm:spec_decode_num_draft_tokens"] > 0


def test_requests_that_are_preempted(llama):
    """A cache too small for all: vLLM drops requests and computes them again, each with its own strength."""
    inputs, mus = kit.prompts((60, 61, 62, 63))[:4], [0.7, -1.0, 2.0, 0.3]
    wanted = [
        kit.reference(kit.in_transformers(llama, mu=mu), prompt, 40) for prompt, mu in zip(inputs, mus, strict=True)
    ]
    llm = kit.engine(llama, num_gpu_blocks_override=9, max_model_len=128, disable_log_stats=False)
    kit.assert_equal(kit.ask(llm, inputs, [kit.greedy(40, extra_args={MU: mu}) for mu in mus]), wanted)
    assert {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}["vllm:num_preemptions"] > 0


def test_each_request_has_its_own_strength(llama):
    """More requests than places, of different lengths, so that they move between rows of the batch."""
    inputs = kit.prompts() * 2
    mus = [0.0, 2.0, None, -1.0, 0.3, 5.0, 1.2] * 2
    steered = kit.in_transformers(llama)
    wanted = []
    for place, (prompt, mu) in enumerate(zip(inputs, mus, strict=True)):
        steered.mu = kit.MU if mu is None else mu
        wanted.append(kit.reference(steered, prompt, 6 + 3 * (place % 5)))
    llm = kit.engine(llama, max_num_seqs=5)
    params = [
        kit.greedy(6 + 3 * (place % 5), extra_args=None if mu is None else {MU: mu}, logprobs=None if mu == 0 else 5)
        for place, mu in enumerate(mus)
    ]
    kit.assert_equal(kit.ask(llm, inputs, params), wanted)
    for bad, words in (("x", "finite number"), (math.nan, "finite number"), (True, "finite number")):
        with pytest.raises(VLLMValidationError, match=words):
            kit.ask(llm, inputs[:1], kit.greedy(extra_args={MU: bad}))
    with pytest.raises(VLLMValidationError, match="svdecode_my is unknown"):
        kit.ask(llm, inputs[:1], kit.greedy(extra_args={"svdecode_my": 1.0}))
    with pytest.raises(VLLMValidationError, match="prompt_logprobs are those of the server"):
        kit.ask(llm, inputs[:1], kit.greedy(extra_args={MU: 1.0}, prompt_logprobs=0))


def test_a_strength_of_zero_is_the_adapted_model(llama):
    """All of its distribution, not only the kept part."""
    prompt = kit.prompts()[1]
    steered = kit.in_transformers(llama, alpha=0.0, mu=0.0)
    adapted = steered(input_ids=torch.tensor([prompt])).logits[0, -1]
    llm = kit.engine(llama)
    output = kit.ask(llm, [prompt], kit.greedy(1, logprobs=20, extra_args={MU: 0}))[0].outputs[0]
    for token, entry in output.logprobs[0].items():
        assert abs(entry.logprob - adapted[token].item()) < 1e-4


def test_masks_never_leave_a_row_without_a_choice(llama):
    """Where a mask forbids every kept token, the adapted model's order decides; where it allows one, nothing changes."""
    prompt = kit.prompts()[1]
    ids = torch.tensor([prompt])
    adapted = kit.in_transformers(llama, alpha=0.0, mu=0.0)(input_ids=ids).logits[0, -1]
    row = steered_rows(llama, prompt)[-1]
    kept = (row > -math.inf).nonzero()[:, 0].tolist()
    outside = adapted.argsort(descending=True)[len(kept) :].tolist()
    allowed = outside[5:9]
    llm = kit.engine(llama, skip_tokenizer_init=False)  # bad words are words

    def first(**options):
        return kit.ask(llm, [prompt], kit.greedy(1, **options))[0].outputs[0].token_ids[0]

    assert first(allowed_token_ids=allowed) == max(allowed, key=lambda token: adapted[token].item())
    assert first(allowed_token_ids=[*allowed, kept[0]]) == kept[0]
    assert first(logit_bias=dict.fromkeys(kept, -100.0)) in kept  # a bias is no mask: kept tokens stay above the floor
    assert first(min_tokens=1, stop_token_ids=kept, ignore_eos=False) == outside[0]
    assert first(bad_words=[kit.word(token) for token in kept]) == outside[0]
    assert first(bad_words=[kit.word(token) for token in outside[:100]]) == first()
    drawn = kit.ask(llm, [prompt], kit.greedy(1, temperature=1.0, n=64, allowed_token_ids=allowed))[0].outputs
    assert {output.token_ids[0] for output in drawn} <= set(allowed)


def test_without_the_floor(llama):
    llm = kit.engine(llama, floor=False)
    found = [
        step for output in kit.ask(llm, kit.prompts(), kit.greedy(logprobs=20)) for step in output.outputs[0].logprobs
    ]
    values = [entry.logprob for step in found for entry in step.values()]
    assert min(values) == -math.inf
    assert min(value for value in values if value > -math.inf) > -900


def test_weights_that_are_loaded_again(llama):
    """As after a sleep that has dropped them."""
    inputs = kit.prompts()
    llm = kit.engine(llama)

    def answers():
        llm.reset_prefix_cache()
        return [output.outputs[0].token_ids for output in kit.ask(llm, inputs)]

    before = answers()
    for layer in llm.llm_engine.model_executor.driver_worker.worker.model_runner.model.modules():
        if hasattr(layer, "svdecode_b"):
            layer.svdecode_b.zero_()
    assert answers() != before
    llm.collective_rpc("reload_weights")
    assert answers() == before


def test_the_cache_has_both_streams(llama):
    """Twice the heads of keys, so half the tokens in the same memory."""
    llm = kit.engine(llama)
    core = llm.llm_engine.engine_core.engine_core
    spec = core.scheduler.kv_cache_config.kv_cache_groups[0].kv_cache_spec
    assert spec.num_kv_heads == 2 * kit.FAMILIES["llama"]["num_key_value_heads"]
