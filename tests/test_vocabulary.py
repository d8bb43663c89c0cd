"""Two models of one tokenizer whose vocabularies end at different sizes."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import left_padded, tiny_llama
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import svdecode

SIZES = {"shorter": 90, "longer": 110}
PROMPT = [5, 17, 33, 60]


def saved(folder, vocabulary: int, seed: int, words: dict[int, str] | None = None):
    """A tiny model that was loaded from its folder, with a tokenizer in it."""
    tiny_llama(vocabulary, seed).save_pretrained(folder)
    names = {f"<{token}>": token for token in range(80)} | {text: token for token, text in (words or {}).items()}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(names, unk_token="<0>")))
    tokenizer.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(params=SIZES)
def pair(request, tmp_path):
    adapted = saved(tmp_path / "adapted", 97, 0)
    return adapted, saved(tmp_path / "pretrained", SIZES[request.param], 1)


def in_common(pre, ft):
    """The definition: cut to the adapted model's vocabulary; beyond the common part both models have the same probability."""
    if pre.shape[-1] >= ft.shape[-1]:
        return pre[..., : ft.shape[-1]]
    tail = ft.softmax(-1)[..., pre.shape[-1] :]
    common = pre.softmax(-1) * (1 - tail.sum(-1, keepdim=True))
    return torch.cat([common, tail], -1).log()


@pytest.mark.parametrize("penalty", [-torch.inf, 0.0])
@pytest.mark.parametrize("mode", ["two_pass", "lazy"])
@pytest.mark.parametrize("direction", ["kl", "log_ratio"])
def test_steered_on_the_common_part(pair, mode, direction, penalty):
    adapted, pretrained = pair
    if mode == "lazy" and penalty == 0:
        pytest.skip("lazy needs a penalty of -inf")
    steered = svdecode.steer(adapted, pretrained=pretrained, mu=1.5, mode=mode, direction=direction, penalty=penalty)
    ids, mask = left_padded()
    ids = ids.clamp(max=79)
    expected = svdecode.fused_steer(
        in_common(pretrained(ids, attention_mask=mask).logits, adapted(ids, attention_mask=mask).logits),
        adapted(ids, attention_mask=mask).logits,
        1.5,
        direction=direction,
        penalty=penalty,
        backend="reference",
    ).logprobs
    found = steered(ids, attention_mask=mask).logits
    shown = mask.bool()
    assert found.shape[-1] == 97
    torch.testing.assert_close(found[shown].exp(), expected[shown].exp(), atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("mode", ["two_pass", "lazy"])
def test_generation(pair, mode):
    adapted, pretrained = pair
    adapted.lm_head.weight.data[80:] = -adapted.lm_head.weight.data[80:].abs()
    steered = svdecode.steer(adapted, pretrained=pretrained, mu=1.0, mode=mode)
    ids = torch.tensor([PROMPT])
    found = steered.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    for _ in range(6):
        with torch.no_grad():
            pre, ft = pretrained(ids).logits[:, -1], adapted(ids).logits[:, -1]
        ids = torch.cat([ids, svdecode.fused_steer(in_common(pre, ft), ft, 1.0).logprobs.argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, ids)


def test_kl_stays_finite(pair):
    """A mean over tokens, as calibration reports it, must not be infinite for the sake of padding."""
    adapted, pretrained = pair
    pre, ft, _ = svdecode.steer(adapted, pretrained=pretrained, mu=1.0).pair_logits(input_ids=torch.tensor([PROMPT]))
    common = min(pre.shape[-1], SIZES["shorter"])
    assert svdecode.fused_steer(pre, ft, 1.0).kl.isfinite().all()
    if pretrained.config.vocab_size < 97:
        torch.testing.assert_close(pre.softmax(-1)[..., common:], ft.softmax(-1)[..., common:])


def test_a_token_that_the_pretrained_model_lacks_is_refused(tmp_path):
    adapted, pretrained = saved(tmp_path / "a", 97, 0), saved(tmp_path / "b", 90, 1)
    for mode in ("two_pass", "lazy"):
        steered = svdecode.steer(adapted, pretrained=pretrained, mu=1.0, mode=mode)
        with pytest.raises(ValueError, match="input_ids has the token 95, and the pre-trained model knows 90 tokens"):
            steered(torch.tensor([[3, 95]]))


def test_tokenizers_that_disagree_are_refused(tmp_path):
    adapted = saved(tmp_path / "a", 97, 0)
    other = saved(tmp_path / "b", 90, 1, words={80: "<other>"})
    with pytest.raises(ValueError, match="80 is None in model and '<other>' in pretrained"):
        svdecode.steer(adapted, pretrained=other, mu=1.0)


def test_without_a_tokenizer_they_are_refused(tmp_path):
    adapted = saved(tmp_path / "a", 97, 0)
    with pytest.raises(ValueError, match=r"different vocabularies: 97 and 90 .* none lies beside pretrained"):
        svdecode.steer(adapted, pretrained=tiny_llama(90), mu=1.0)
    for file in (tmp_path / "a").glob("tokenizer*"):
        file.unlink()
    assert json.loads((tmp_path / "a" / "config.json").read_text())["vocab_size"] == 97
    with pytest.raises(ValueError, match="none lies beside model"):
        svdecode.steer(adapted, pretrained=saved(tmp_path / "b", 90, 1), mu=1.0)
