"""The peers of `docs/recipes.md`: contrastive decoding, guidance by two prompts, proxy tuning, DeRa and their kin."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from tiny import PAD, left_padded, tiny_llama, tiny_lora, tiny_prompt

import svdecode

RECIPES = Path(__file__).parents[1] / "docs" / "recipes.md"


@torch.no_grad()
def alone(model, ids):
    """Log-probs (V,) of the next token."""
    return torch.log_softmax(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1], -1)


def greedy(choose, ids, steps):
    for _ in range(steps):
        ids = [*ids, choose(ids)]
        if ids[-1] == 1:
            break
    return ids


@pytest.mark.parametrize("mode", ["lazy", "two_pass"])
def test_contrastive_decoding(mode):
    """Li et al. 2023 in the form of O'Brien and Lewis 2023: (1 + beta) z - beta a, among p >= alpha max p."""
    expert, amateur, beta, alpha = tiny_llama(seed=1), tiny_llama(seed=2), 0.5, 0.1
    steered = svdecode.steer(expert, pretrained=amateur, mu=beta, alpha=alpha, direction="log_ratio", mode=mode)

    def choose(ids):
        z, a = alone(expert, ids), alone(amateur, ids)
        scores = ((1 + beta) * z - beta * a).masked_fill(z < z.max() + torch.tensor(alpha).log(), -torch.inf)
        return int(scores.argmax())

    prompt = [5, 6, 7, 8]
    got = steered.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
    assert got[0].tolist() == greedy(choose, prompt, 12)


@pytest.mark.parametrize("guided", [tiny_llama, tiny_lora, lambda: tiny_prompt("prompt tuning")])
@pytest.mark.parametrize("mode", ["paired", "two_pass"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_guidance_equals_a_recompute(guided, mode, options):
    """Sanchez et al. 2023: uncond + scale (cond - uncond), a prompt of its own for the unconditional side."""
    model, scale = guided(), 1.5
    if mode == "two_pass" and getattr(model, "prompt_encoder", None):
        with pytest.raises(ValueError, match="a prompt-learning adapter on both sides needs mode='paired'"):
            svdecode.steer(model, pretrained=model, mu=1.0, mode=mode)
        with pytest.raises(ValueError, match="pretrained has virtual tokens"):
            svdecode.steer(tiny_llama(), pretrained=model, mu=1.0)
        return
    steered = svdecode.steer(
        model, pretrained=model, mu=scale - 1, alpha=0.0, direction="log_ratio", penalty=0.0, mode=mode
    )
    assert steered.mode == mode
    ids, mask = left_padded((7, 5))
    own, own_mask = torch.full_like(ids, PAD), torch.zeros_like(mask)
    own[:, -2:], own_mask[:, -2:] = ids[:, -2:], 1
    got = steered.generate(
        ids, attention_mask=mask, pretrained_input_ids=own, pretrained_attention_mask=own_mask,
        max_new_tokens=8, do_sample=False, **options,
    )  # fmt: skip
    if "num_beams" in options:
        again = steered.generate(
            ids, attention_mask=mask, pretrained_input_ids=own, pretrained_attention_mask=own_mask,
            max_new_tokens=8, do_sample=False, use_cache=False, **options,
        )  # fmt: skip
        assert got.tolist() == again.tolist()
        return
    for row in range(2):
        prompt = ids[row][mask[row].bool()].tolist()

        def choose(tokens, prompt=prompt):
            conditional, unconditional = alone(model, tokens), alone(model, tokens[len(prompt) - 2 :])
            return int((unconditional + scale * (conditional - unconditional)).argmax())

        expected = greedy(choose, prompt, 8)
        assert got[row][mask.shape[1] :].tolist()[: len(expected) - len(prompt)] == expected[len(prompt) :]


def test_guidance_equals_transformers_processor():
    """Where that one is right: one sequence at a time, no beams."""
    model = tiny_llama()
    ids, own = torch.tensor([[5, 9, 6, 7, 8]]), torch.tensor([[7, 8]])
    theirs = model.generate(
        ids, guidance_scale=1.5, negative_prompt_ids=own, negative_prompt_attention_mask=torch.ones_like(own),
        max_new_tokens=12, do_sample=False, output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    steered = svdecode.steer(model, pretrained=model, mu=0.5, alpha=0.0, direction="log_ratio")
    padded = torch.nn.functional.pad(own, (3, 0), value=PAD)
    ours = steered.generate(
        ids, pretrained_input_ids=padded, pretrained_attention_mask=(padded != PAD).long(),
        max_new_tokens=12, do_sample=False, output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    for got, expected in zip(ours.scores, theirs.scores, strict=True):
        torch.testing.assert_close(got, torch.log_softmax(expected, -1), rtol=1e-3, atol=1e-3)
    assert ours.sequences.tolist() != model.generate(ids, max_new_tokens=12, do_sample=False).tolist()
    with pytest.raises(ValueError, match=r"pretrained_input_ids must be left-padded .* \(1, 5\), got \(1, 2\)"):
        steered.generate(ids, pretrained_input_ids=own)


@pytest.mark.parametrize("mode", ["lazy", "two_pass"])
@pytest.mark.parametrize("alpha", [0.0, 0.1])
def test_proxy_tuning(mode, alpha):
    """Liu et al. 2021 and 2024: base + mu (expert - anti-expert); with alpha, only what the base finds plausible."""
    base, expert, anti = (tiny_llama(seed=seed) for seed in (1, 2, 3))
    steered = svdecode.steer(base, pretrained=(expert, anti), mu=0.8, alpha=alpha, direction="log_ratio", mode=mode)
    ids, mask = left_padded((6, 4))
    got = steered.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False)
    thin = svdecode.generate(steered, ids, mask, max_new_tokens=10)
    for row in range(2):
        prompt = ids[row][mask[row].bool()].tolist()

        def choose(tokens):
            z = alone(base, tokens)
            scores = z + 0.8 * (alone(expert, tokens) - alone(anti, tokens))
            return int(scores.masked_fill(z < z.max() + torch.tensor(alpha).log(), -torch.inf).argmax())

        new = greedy(choose, prompt, 10)[len(prompt) :]
        assert got[row, 6:].tolist()[: len(new)] == new
        assert thin[row, 6:].tolist()[: len(new)] == new


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0, 2.5])
@pytest.mark.parametrize("aligned_by", ["lora", "another model"])
def test_dera(aligned_by, share):
    """Liu et al. 2024: (1 - lambda) z_sft + lambda z_aligned, over the whole vocabulary."""
    if aligned_by == "lora":
        aligned, sft = tiny_lora(), tiny_llama()
        steered = svdecode.steer(aligned, mu=share - 1, alpha=0.0, direction="log_ratio")
    else:
        aligned, sft = tiny_llama(seed=1), tiny_llama(seed=2)
        steered = svdecode.steer(aligned, pretrained=sft, mu=share - 1, alpha=0.0, direction="log_ratio")

    def choose(tokens):
        return int(((1 - share) * alone(sft, tokens) + share * alone(aligned, tokens)).argmax())

    prompt = [5, 6, 7, 8]
    got = steered.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False)[0].tolist()
    assert got == greedy(choose, prompt, 10)


def test_context_aware_decoding():
    """Shi et al. 2023: (1 + a) z(context, question) - a z(question)."""
    model, context, question, weight = tiny_llama(seed=1), [9, 8, 40], [5, 6, 7], 0.7
    steered = svdecode.steer(model, pretrained=model, mu=weight, alpha=0.0, direction="log_ratio")

    def choose(tokens):
        return int(((1 + weight) * alone(model, tokens) - weight * alone(model, tokens[len(context) :])).argmax())

    got = steered.generate(
        torch.tensor([context + question]),
        pretrained_input_ids=torch.tensor([[PAD] * len(context) + question]),
        pretrained_attention_mask=torch.tensor([[0] * len(context) + [1] * len(question)]),
        max_new_tokens=10,
        do_sample=False,
    )
    assert got[0].tolist() == greedy(choose, context + question, 10)


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", RECIPES.read_text(), re.DOTALL))
def test_the_examples_of_the_page_run(block, capsys):
    names = ("model", "expert", "amateur", "small", "large", "sft", "aligned")
    models = {name: tiny_llama(seed=i) for i, name in enumerate(names)}

    class Tokenizer:
        """Words to ids, left-padded, as the page's tokenizer."""

        def __call__(self, texts, **_):
            rows = [[3 + sum(map(ord, word)) % 90 for word in text.split()] or [2] for text in texts]
            width = max(map(len, rows))
            ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
            return type("Batch", (dict,), {"__getattr__": dict.__getitem__})(
                input_ids=ids, attention_mask=(ids != PAD).long()
            )

        def decode(self, tokens, **_):
            return " ".join(map(str, tokens.tolist()))

    exec(compile(block, str(RECIPES), "exec"), {**models, "tuned": tiny_llama(seed=9), "tokenizer": Tokenizer()})
    assert capsys.readouterr().out.strip()
