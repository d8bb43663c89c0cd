"""`steer`: both halves of its forward, everything of `generate()`, and the model that it leaves alone."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from tiny import (
    PAD,
    VOCABULARY,
    left_padded,
    randomise,
    stateless,
    steered_logprobs,
    tiny_llama,
    tiny_lora,
    two_model_logits,
)
from transformers import TextStreamer

import svdecode

MODES = ["paired", "two_pass"]
MU = 1.7


@pytest.fixture(scope="module")
def lora():
    return tiny_lora()


@pytest.mark.parametrize("mode", MODES)
def test_both_models_logits_equal_separate_forwards(lora, mode):
    ids, mask = left_padded()
    expected_pre, expected_ft = two_model_logits(lora, ids, mask)
    steered = svdecode.steer(lora, mu=MU, mode=mode)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        pre, ft, _ = steered.pair_logits(input_ids=ids, attention_mask=mask, position_ids=positions)
    used = mask.bool()
    torch.testing.assert_close(pre[used], expected_pre[used], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ft[used], expected_ft[used], rtol=1e-5, atol=1e-5)
    assert (expected_pre - expected_ft)[used].abs().mean() > 0.1


@pytest.mark.parametrize("mode", MODES)
def test_forward_returns_steered_logprobs(lora, mode):
    ids, mask = left_padded()
    pre, ft = two_model_logits(lora, ids, torch.ones_like(mask))
    steered = svdecode.steer(lora, mu=MU, penalty=-2.0, direction="log_ratio", mode=mode)
    with torch.no_grad():
        logits = steered(input_ids=ids).logits
        first = steered(ids, return_dict=False)[0]
    torch.testing.assert_close(
        logits, steered_logprobs(pre, ft, MU, penalty=-2.0, direction="log_ratio"), rtol=1e-4, atol=1e-4
    )
    assert torch.equal(first, logits)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("penalty", [-float("inf"), -1.0])
def test_greedy_is_token_identical_to_a_stateless_recompute(lora, mode, penalty):
    ids, mask = left_padded()
    steered = svdecode.steer(lora, mu=MU, penalty=penalty, mode=mode)
    expected = stateless(lora, ids, mask, 12, lambda pre, ft: steered_logprobs(pre, ft, MU, penalty=penalty).argmax(-1))
    got = steered.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert got.tolist() == expected.tolist()
    thin = svdecode.generate(steered, ids, mask, max_new_tokens=12)
    assert thin.tolist() == expected.tolist()


@pytest.mark.parametrize("mode", MODES)
def test_seeded_sampling_with_generate(lora, mode):
    ids, mask = left_padded()
    steered = svdecode.steer(lora, mu=MU, alpha=0.02, mode=mode)

    def draw(pre, ft):
        scores = steered_logprobs(pre, ft, MU, alpha=0.02) / 1.3
        scores = scores.masked_fill(scores < scores.topk(5).values[:, -1:], -torch.inf)
        return torch.multinomial(torch.softmax(scores, -1), 1).squeeze(1)

    torch.manual_seed(11)
    expected = stateless(lora, ids, mask, 12, draw)
    torch.manual_seed(11)
    got = steered.generate(
        ids, attention_mask=mask, max_new_tokens=12, do_sample=True, temperature=1.3, top_k=5, top_p=1.0
    )
    assert got.tolist() == expected.tolist()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"top_p": 0.8}, {"top_k": 6, "top_p": 0.9}])
def test_seeded_sampling_with_the_thin_loop(lora, mode, options):
    ids, mask = left_padded()
    steered = svdecode.steer(lora, mu=MU, alpha=0.02, mode=mode)
    ours, theirs = (torch.Generator().manual_seed(4) for _ in range(2))

    def draw(pre, ft):
        return svdecode.steer_sample(pre, ft, MU, temperature=1.3, alpha=0.02, generator=theirs, **options)[0]

    expected = stateless(lora, ids, mask, 12, draw)
    got = svdecode.generate(steered, ids, mask, max_new_tokens=12, temperature=1.3, generator=ours, **options)
    assert got.tolist() == expected.tolist()


@pytest.mark.parametrize("mode", [*MODES, "lazy"])
@pytest.mark.parametrize("num_beams", [2, 4])
@pytest.mark.parametrize("stop", [1, 40, [1, 40, 41, 42, 43]])
def test_beams_of_the_thin_loop_are_those_of_generate(lora, mode, num_beams, stop):
    ids, mask = left_padded()
    steered = svdecode.steer(lora, mu=MU, alpha=0.01, penalty=-torch.inf if mode == "lazy" else -1.0, mode=mode)
    options = dict(max_new_tokens=10, num_beams=num_beams, eos_token_id=stop)
    expected = steered.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=PAD, **options)
    assert svdecode.generate(steered, ids, mask, **options).tolist() == expected.tolist()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_beams_equal_beams_without_a_cache(lora, mode, cache):
    ids, mask = left_padded()
    steered = svdecode.steer(lora, mu=MU, penalty=-1.0, mode=mode)
    options = dict(attention_mask=mask, max_new_tokens=10, num_beams=4, num_return_sequences=2, do_sample=False)
    expected = steered.generate(ids, use_cache=False, **options)
    got = steered.generate(ids, cache_implementation=None if cache == "dynamic" else "static", **options)
    assert got.tolist() == expected.tolist()


def test_streamer_stop_and_padding(lora, capsys):
    ids, mask = left_padded()
    steered = svdecode.steer(lora, mu=MU)
    plain = svdecode.generate(steered, ids, mask, max_new_tokens=10)
    stop = plain[1, ids.shape[1] + 2].item()  # end row 1 at its third token

    class Recorder(TextStreamer):
        def __init__(self):
            self.pieces, self.ended = [], False

        def put(self, value):
            self.pieces.append(value)

        def end(self):
            self.ended = True

    recorder = Recorder()
    got = svdecode.generate(steered, ids, mask, max_new_tokens=10, eos_token_id=stop, streamer=recorder)
    end = got[1].tolist().index(stop, ids.shape[1])
    assert (got[1, end + 1 :] == PAD).all()
    assert recorder.ended
    assert torch.equal(torch.stack(recorder.pieces[1:], 1), got[:, ids.shape[1] :])
    by_generate = steered.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False, eos_token_id=stop)
    assert got.tolist() == by_generate.tolist()


def test_the_wrapped_model_is_left_as_it_was(lora):
    ids, mask = left_padded()
    state = {name: (value.clone(), value.requires_grad) for name, value in lora.named_parameters()}
    scalings = [dict(m.scaling) for m in lora.modules() if hasattr(m, "scaling") and isinstance(m.scaling, dict)]
    training = [m.training for m in lora.modules()]
    forward = type(lora.get_base_model()).forward
    with torch.no_grad():
        before = lora(input_ids=ids, attention_mask=mask).logits
    steered = svdecode.steer(lora, mu=MU)
    with pytest.raises(IndexError):  # a token outside the vocabulary, in the middle of a forward
        steered(input_ids=torch.full((2, 3), VOCABULARY + 5))
    steered.generate(ids, attention_mask=mask, max_new_tokens=3)
    with torch.no_grad():
        assert torch.equal(lora(input_ids=ids, attention_mask=mask).logits, before)
    assert {name: value.requires_grad for name, value in lora.named_parameters()} == {k: v[1] for k, v in state.items()}
    assert all(torch.equal(value, state[name][0]) for name, value in lora.named_parameters())
    assert scalings == [
        dict(m.scaling) for m in lora.modules() if hasattr(m, "scaling") and isinstance(m.scaling, dict)
    ]
    assert training == [m.training for m in lora.modules()]
    assert type(lora.get_base_model()).forward is forward
    assert "forward" not in vars(lora.get_base_model())
    assert {p.data_ptr() for p in steered.parameters()} == {p.data_ptr() for p in lora.get_base_model().parameters()}


def test_gradients_reach_the_adapter(lora):
    ids, mask = left_padded()
    steered = svdecode.steer(lora, mu=MU, penalty=-1.0)
    loss = steered(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    loss.backward()
    grads = [p.grad for p in lora.parameters() if p.requires_grad]
    lora.zero_grad()
    assert all(g is not None and g.abs().sum() > 0 for g in grads)


def test_a_second_model_as_pretrained():
    expert, amateur = tiny_llama(seed=1), tiny_llama(seed=2)
    ids, mask = left_padded()
    steered = svdecode.steer(expert, pretrained=amateur, mu=0.7, direction="log_ratio")
    assert steered.mode == "lazy"
    assert svdecode.steer(expert, pretrained=amateur, mu=0.7, penalty=-1.0).mode == "two_pass"
    tokens = ids
    with torch.no_grad():
        got = steered.generate(ids[:1], max_new_tokens=8, do_sample=False)
        tokens = ids[:1]
        for _ in range(8):
            pre, ft = (m(tokens).logits[:, -1] for m in (amateur, expert))
            choice = steered_logprobs(pre, ft, 0.7, direction="log_ratio").argmax(-1)
            tokens = torch.cat([tokens, choice[:, None]], 1)
            if choice.item() == 1:
                break
    assert got.tolist() == tokens.tolist()


def test_auto_pairs_every_adapter():
    """`test_tuners.py` shows that it is exact."""
    for config in (
        LoraConfig(target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM"),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    ):
        model = get_peft_model(tiny_llama(), config)
        randomise(model)
        steered = svdecode.steer(model.eval(), mu=MU)
        assert steered.mode == "paired"
        ids, mask = left_padded()
        expected = stateless(model, ids, mask, 8, lambda pre, ft: steered_logprobs(pre, ft, MU).argmax(-1))
        assert (
            steered.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False).tolist() == expected.tolist()
        )
    with pytest.raises(ValueError, match="mode='paired' needs an adapter"):
        svdecode.steer(tiny_llama(), pretrained=tiny_llama(), mu=MU, mode="paired")


def test_what_steer_refuses(lora, monkeypatch):
    monkeypatch.setattr(
        "svdecode.strength.calibration._SAVED", {}
    )  # another test may have saved one for an equal adapter
    with pytest.raises(ValueError, match="no adapter"):
        svdecode.steer(tiny_llama(), mu=1.0)
    with pytest.raises(TypeError, match="model must be a PeftModel"):
        svdecode.steer("model", mu=1.0)
    with pytest.raises(ValueError, match="different vocabularies: 97 and 50"):
        svdecode.steer(tiny_llama(), pretrained=tiny_llama(vocabulary=50), mu=1.0)
    with pytest.raises(ValueError, match="mu is missing"):
        svdecode.steer(lora)
    with pytest.raises(ValueError, match="mode must be one of"):
        svdecode.steer(lora, mu=1.0, mode="fast")
    merged = copy.deepcopy(lora)
    merged.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        svdecode.steer(merged, mu=1.0)
    disabled = copy.deepcopy(lora)
    disabled.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match="no adapter is active"):
        svdecode.steer(disabled, mu=1.0)
    biased = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], bias="all", task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="bias='all'"):
        svdecode.steer(biased, mu=1.0)
    with pytest.raises(ValueError, match=r"mode='lazy' needs penalty=-inf, got -1\.0"):
        svdecode.steer(lora, mu=1.0, penalty=-1.0, mode="lazy")
    elsewhere = tiny_llama().to("meta")
    with pytest.raises(ValueError, match=r"one device, got cpu and meta: .*two_pass"):
        svdecode.steer(tiny_llama(), pretrained=elsewhere, mu=1.0, mode="lazy")
    with pytest.raises(ValueError, match="mode='paired' needs"):
        svdecode.steer(tiny_llama(), pretrained=elsewhere, mu=1.0, mode="paired")
    assert svdecode.steer(tiny_llama(), pretrained=elsewhere, mu=1.0).mode == "two_pass"
    with pytest.raises(ValueError, match="a pair"):
        svdecode.steer(tiny_llama(), pretrained=[tiny_llama()] * 3, mu=1.0)
    with pytest.raises(ValueError, match="empty prompt"):
        svdecode.steer(lora, mu=1.0).generate(torch.zeros(1, 0, dtype=torch.long))


def test_what_the_thin_loop_refuses(lora):
    steered = svdecode.steer(lora, mu=1.0)
    ids, mask = left_padded()
    with pytest.raises(TypeError, match=r"svdecode\.steer"):
        svdecode.generate(lora, ids, max_new_tokens=1)
    with pytest.raises(ValueError, match="empty prompt"):
        svdecode.generate(steered, ids[:, :0], max_new_tokens=1)
    with pytest.raises(ValueError, match="max_new_tokens"):
        svdecode.generate(steered, ids, max_new_tokens=0)
    with pytest.raises(ValueError, match="pad on the left"):
        svdecode.generate(steered, ids, mask.flip(-1), max_new_tokens=1)
    with pytest.raises(ValueError, match="beam sampling"):
        svdecode.generate(steered, ids, mask, max_new_tokens=1, num_beams=2, temperature=1.0)
