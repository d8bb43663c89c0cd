"""`mode="lazy"`: the pre-trained model runs only where more than one token is kept, row by row, and nothing changes."""

from __future__ import annotations

import pytest
import torch
from tiny import left_padded, tiny_lora

import svdecode

MU = 1.7


@pytest.fixture(scope="module")
def lora():
    return tiny_lora()


class Calls:
    """The shapes (rows, tokens) of a model's forwards."""

    def __init__(self, model):
        self.shapes = []
        model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module, args, kwargs):
        self.shapes.append(tuple(kwargs["input_ids"].shape))


@pytest.mark.parametrize("alpha", [0.02, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("sampling", [False, True])
def test_identical_to_paired(lora, alpha, sampling):
    ids, mask = left_padded()
    lazy, paired = (svdecode.steer(lora, mu=MU, alpha=alpha, mode=mode) for mode in ("lazy", "paired"))
    options = dict(max_new_tokens=24, do_sample=sampling, temperature=1.4 if sampling else None, eos_token_id=None)
    found = []
    for steered in (lazy, paired):
        torch.manual_seed(2)
        found.append(steered.generate(ids, attention_mask=mask, pad_token_id=0, **options))
    assert torch.equal(*found)
    drawn = [
        svdecode.generate(
            steered,
            ids,
            mask,
            max_new_tokens=24,
            temperature=1.4 * sampling,
            generator=torch.Generator().manual_seed(3),
        )
        for steered in (lazy, paired)
    ]
    assert torch.equal(*drawn)


def test_the_share_of_skipped_forwards(lora):
    ids, mask = left_padded()
    lazy = svdecode.steer(lora, mu=MU, alpha=0.5, mode="lazy")
    calls = Calls(lazy._others[0])
    svdecode.generate(lazy, ids, mask, max_new_tokens=24, eos_token_id=[])
    assert lazy.row_steps == 24 * len(ids)
    run = sum(rows for rows, _ in calls.shapes)
    assert lazy.skipped_row_steps == lazy.row_steps - run
    assert 0.2 < lazy.skipped_share < 0.9
    assert any(rows < len(ids) for rows, _ in calls.shapes)  # rows wait independently
    assert any(1 < tokens < ids.shape[1] for _, tokens in calls.shapes)  # and are caught up in a chunk


def test_alpha_of_one_never_asks_the_pretrained_model(lora):
    ids, mask = left_padded()
    lazy = svdecode.steer(lora, mu=MU, alpha=1.0, mode="lazy")
    calls = Calls(lazy._others[0])
    lazy.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert calls.shapes == []
    assert lazy.skipped_share == 1.0


def test_a_finite_penalty_later_on_runs_every_step(lora):
    ids, mask = left_padded()
    lazy, paired = (svdecode.steer(lora, mu=MU, mode=mode) for mode in ("lazy", "paired"))
    lazy.penalty = paired.penalty = -0.5
    options = dict(attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert torch.equal(lazy.generate(ids, **options), paired.generate(ids, **options))
    assert lazy.row_steps == 0


def test_pair_logits_are_both_models_own(lora):
    ids, mask = left_padded()
    lazy, paired = (svdecode.steer(lora, mu=MU, alpha=1.0, mode=mode) for mode in ("lazy", "paired"))
    with torch.no_grad():
        for ours, theirs in zip(
            lazy.pair_logits(input_ids=ids)[:2], paired.pair_logits(input_ids=ids)[:2], strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match="needs input_ids"):
            lazy(inputs_embeds=lora.get_input_embeddings()(ids))
