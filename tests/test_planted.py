"""Errors planted on purpose, each of which the comparisons of `test_generate.py` must notice."""

from __future__ import annotations

import pytest
import torch
from test_generate import ALPHA, MU, generated
from tiny import tiny_lora, tiny_prompt

import svdecode
from svdecode.models.lazy_cache import LazyCache
from svdecode.models.paired_layers import PairedLayers
from svdecode.models.steered_cache import SteeredCache
from svdecode.models.virtual_tokens import VirtualTokens


def one_half_reordered(monkeypatch):
    def rows(self, indices):
        return torch.cat([indices, torch.arange(len(indices), 2 * len(indices))])

    monkeypatch.setattr(SteeredCache, "_rows_of_both", rows)
    return tiny_lora(), "paired", {"num_beams": 4}


def scale_on_the_wrong_half(monkeypatch):
    right = PairedLayers.set_rows

    def set_rows(self, batch, length):
        right(self, batch, length)
        for layer, adapter, *_ in self.scaled:
            layer.scaling[adapter] = layer.scaling[adapter].flip(0)
        self.batch = 0

    monkeypatch.setattr(PairedLayers, "set_rows", set_rows)
    return tiny_lora(), "paired", {}


def positions_not_shifted(monkeypatch):
    right = VirtualTokens.put_in_front

    def put_in_front(self, inputs, model, masked_rows, takes_positions):
        right(self, inputs, model, masked_rows, takes_positions)
        inputs["position_ids"][masked_rows:, -1] -= self.count

    monkeypatch.setattr(VirtualTokens, "put_in_front", put_in_front)
    return tiny_prompt("prefix tuning"), "paired", {}


def virtual_slots_not_masked(monkeypatch):
    right = VirtualTokens.put_in_front

    def put_in_front(self, inputs, model, masked_rows, takes_positions):
        right(self, inputs, model, masked_rows, takes_positions)
        inputs["attention_mask"][:, : self.count] = 1

    monkeypatch.setattr(VirtualTokens, "put_in_front", put_in_front)
    return tiny_prompt("prefix tuning"), "paired", {}


def catch_up_one_token_short(monkeypatch):
    right = LazyCache.catch_up

    def catch_up(self, *arguments):
        self.seen[self.seen < self.ids.shape[1] - 1] += 1
        return right(self, *arguments)

    monkeypatch.setattr(LazyCache, "catch_up", catch_up)
    return tiny_lora(), "lazy", {}


PLANTED = [
    one_half_reordered, scale_on_the_wrong_half, positions_not_shifted, virtual_slots_not_masked, catch_up_one_token_short,
]  # fmt: skip


@pytest.mark.parametrize("plant", PLANTED)
def test_is_noticed(plant, monkeypatch):
    with pytest.MonkeyPatch.context() as planted:
        model, mode, options = plant(planted)
        wrong = generated(svdecode.steer(model, mu=MU, alpha=ALPHA, mode=mode), max_new_tokens=16, **options)
    right = generated(svdecode.steer(model, mu=MU, alpha=ALPHA, mode=mode), max_new_tokens=16, **options)
    stateless = generated(
        svdecode.steer(model, mu=MU, alpha=ALPHA, mode="two_pass"), max_new_tokens=16, use_cache=False, **options
    )
    assert right.tolist() == stateless.tolist()
    assert wrong.tolist() != right.tolist()


def test_another_thread_is_refused():
    """Two threads in one steered model would mix up their rows; the wrapped model may run beside it."""
    import threading

    model = tiny_lora()
    steered = svdecode.steer(model, mu=MU)
    ids = torch.tensor([[5, 6, 7]])
    found = {}

    def elsewhere():
        for name, run in (("steered", steered), ("wrapped", model)):
            try:
                found[name] = run(input_ids=ids).logits
            except RuntimeError as error:
                found[name] = str(error)

    def while_running(module, args, kwargs):
        if not found:
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()

    handle = steered.model.layers[0].register_forward_pre_hook(while_running, with_kwargs=True)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        during = steered(input_ids=ids).logits
        handle.remove()
        assert torch.equal(steered(input_ids=ids).logits, during)
    assert "running in another thread" in found["steered"]
    torch.testing.assert_close(found["wrapped"], before)
