"""Everything `generate()` does, token for token what it does with a model that recomputes both models from scratch."""

from __future__ import annotations

import string

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import (
    ARCHITECTURES,
    EOS,
    PROMPTS,
    VOCABULARY,
    left_padded,
    randomise,
    stateless,
    steered_logprobs,
    tiny_llama,
    tiny_lora,
    tiny_model,
    tiny_prompt,
    two_model_logits,
)
from tokenizers import Tokenizer, decoders, models
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutputWithPast

import svdecode

MODES = ["paired", "lazy", "two_pass"]
MU, ALPHA = 1.7, 0.02
INFINITE = -torch.inf


class Recompute(LlamaForCausalLM):
    """Steered log-probs of the last position from two separate models, each row alone, nothing kept."""

    @classmethod
    def of(cls, pair, penalty=INFINITE):
        model = tiny_llama()
        model.__class__ = cls
        model.__dict__["pair"], model.penalty = pair, penalty
        return model

    def forward(self, input_ids, attention_mask=None, **_):
        pre, ft = two_model_logits(self.pair, input_ids, attention_mask)
        logits = steered_logprobs(pre[:, -1:], ft[:, -1:], MU, alpha=ALPHA, penalty=self.penalty)
        return CausalLMOutputWithPast(logits=logits)


@pytest.fixture(scope="module")
def lora():
    return tiny_lora()


@pytest.fixture(scope="module", params=["lora", *PROMPTS])
def adapted(request, lora):
    return lora if request.param == "lora" else tiny_prompt(request.param)


def generated(model, seed=7, **options):
    ids, mask = left_padded()
    torch.manual_seed(seed)
    return model.generate(ids, attention_mask=mask, **{"max_new_tokens": 8, "do_sample": False, **options})


FEATURES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 6, "top_p": 0.95},
    "min-p": {"do_sample": True, "min_p": 0.05, "top_k": 0},
    "beams": {"num_beams": 4},
    "beams returned": {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5, "early_stopping": True},
    "beam sampling": {"num_beams": 3, "do_sample": True, "temperature": 1.2, "top_k": 8},
    "several sequences": {"do_sample": True, "num_return_sequences": 3, "top_k": 0},
    "repetition penalty": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "forbidden words": {"bad_words_ids": [[5], [7, 9]], "min_new_tokens": 6, "suppress_tokens": [11]},
    "watermark": {"watermarking_config": {"bias": 2.0, "seeding_scheme": "lefthash"}},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("feature", FEATURES)
def test_equals_a_recompute(lora, mode, feature):
    finite = feature in ("repetition penalty", "beam sampling", "beams returned", "watermark") and mode != "lazy"
    penalty = -1.0 if finite else INFINITE  # a finite penalty leaves other tokens to the processors
    steered = svdecode.steer(lora, mu=MU, alpha=ALPHA, penalty=penalty, mode=mode)
    expected = generated(Recompute.of(lora, penalty), use_cache=False, **FEATURES[feature])
    assert generated(steered, **FEATURES[feature]).tolist() == expected.tolist()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("feature", ["greedy", "sampling", "beams", "several sequences"])
def test_every_kind_of_adapter(adapted, mode, feature):
    steered = svdecode.steer(adapted, mu=MU, alpha=ALPHA, mode=mode)
    expected = generated(Recompute.of(adapted), use_cache=False, **FEATURES[feature])
    assert generated(steered, **FEATURES[feature]).tolist() == expected.tolist()
    assert generated(steered, **FEATURES[feature], use_cache=False).tolist() == expected.tolist()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "num_beams": 3},
        {"prefill_chunk_size": 2},
        {"prefill_chunk_size": 4, "cache_implementation": "static"},
    ],
    ids=str,
)
def test_caches_and_chunks(adapted, mode, options):
    steered = svdecode.steer(adapted, mu=MU, alpha=ALPHA, mode=mode)
    beams = {"num_beams": options.get("num_beams", 1)}
    assert generated(steered, **options).tolist() == generated(steered, use_cache=False, **beams).tolist()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["prompt lookup", "assistant", "sampling assistant"])
def test_assistants_change_nothing(adapted, mode, how):
    steered = svdecode.steer(adapted, mu=MU, alpha=ALPHA, mode=mode)
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    options = {"max_new_tokens": 14, "do_sample": False}
    expected = steered.generate(ids, use_cache=False, **options)
    if how == "prompt lookup":
        got = steered.generate(ids, prompt_lookup_num_tokens=3, **options)
    else:
        # the same model guesses right often, another one wrong often
        assistant = tiny_llama(seed=0 if how == "assistant" else 1)
        got = steered.generate(ids, assistant_model=assistant, **options)
    assert got.tolist() == expected.tolist()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures(mode, architecture):
    model = get_peft_model(tiny_model(architecture), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    randomise(model, scale=0.2)
    steered = svdecode.steer(model.eval(), mu=MU, alpha=ALPHA, mode=mode)
    ids, mask = left_padded()
    expected = stateless(model, ids, mask, 12, lambda pre, ft: steered_logprobs(pre, ft, MU, alpha=ALPHA).argmax(-1))
    assert generated(steered, max_new_tokens=12).tolist() == expected.tolist()
    assert svdecode.generate(steered, ids, mask, max_new_tokens=12).tolist() == expected.tolist()
    static = generated(steered, max_new_tokens=12, cache_implementation="static")
    assert static.tolist() == expected.tolist()


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2", "opt"])
@pytest.mark.parametrize("kind", ["prompt tuning", "prefix tuning"])
def test_prompts_on_other_architectures(architecture, kind):
    model = tiny_prompt(kind, architecture)
    steered = svdecode.steer(model, mu=MU, alpha=ALPHA)
    assert steered.mode == "paired"
    ids, mask = left_padded()
    expected = stateless(model, ids, mask, 8, lambda pre, ft: steered_logprobs(pre, ft, MU, alpha=ALPHA).argmax(-1))
    assert generated(steered).tolist() == expected.tolist()


@pytest.mark.parametrize("mode", MODES)
def test_scores_are_steered_logprobs_after_the_processors(lora, mode):
    steered = svdecode.steer(lora, mu=MU, alpha=ALPHA, mode=mode)
    options = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True, "repetition_penalty": 1.3}
    got = generated(steered, **options)
    expected = generated(Recompute.of(lora), use_cache=False, **options)
    for name in ("scores", "logits"):
        for ours, theirs in zip(got[name], expected[name], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert not torch.equal(got.scores[-1], got.logits[-1])
    hidden = generated(steered, output_hidden_states=True, output_attentions=False, return_dict_in_generate=True)
    assert hidden.hidden_states[1][0].shape[:2] == (3, 1)


def test_stop_strings_streamer_and_generation_config(lora, capsys):
    letters = Tokenizer(models.BPE({letter: i for i, letter in enumerate(string.printable[:VOCABULARY])}, []))
    letters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="0", eos_token="1")
    steered = svdecode.steer(lora, mu=MU, alpha=ALPHA)
    ids = torch.tensor([[5, 6, 7]])
    plain = steered.generate(ids, max_new_tokens=10, do_sample=False)
    word = tokenizer.decode(plain[0, 5])
    stopped = steered.generate(ids, max_new_tokens=10, do_sample=False, stop_strings=[word], tokenizer=tokenizer)
    assert stopped.tolist() == plain[:, : 3 + plain[0, 3:].tolist().index(plain[0, 5].item()) + 1].tolist()

    class Recorder:
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    recorder = Recorder()
    config = GenerationConfig(max_new_tokens=10, do_sample=False, eos_token_id=EOS, pad_token_id=0)
    assert steered.generate(ids, generation_config=config, streamer=recorder).tolist() == plain.tolist()
    assert recorder.tokens == plain[0].tolist()
    assert recorder.ended


@pytest.mark.parametrize("mode", MODES)
def test_a_cache_goes_on_where_it_stopped(lora, mode):
    steered = svdecode.steer(lora, mu=MU, alpha=ALPHA, mode=mode)
    ids = torch.tensor([[5, 6, 7, 8]])
    whole = steered.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=None)
    first = steered.generate(
        ids, max_new_tokens=4, do_sample=False, eos_token_id=None, return_dict_in_generate=True, use_cache=True
    )
    rest = steered.generate(
        first.sequences, past_key_values=first.past_key_values, max_new_tokens=5, do_sample=False, eos_token_id=None
    )
    assert rest.tolist() == whole.tolist()
    with pytest.raises(ValueError, match="tokens of one model only"):
        steered.generate(ids, past_key_values=lora.get_base_model()(ids[:, :2]).past_key_values, max_new_tokens=2)
