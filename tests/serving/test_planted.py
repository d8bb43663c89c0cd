"""Faults that are planted on purpose are seen by the comparison that the other tests rest on."""

from __future__ import annotations

import kit
import pytest

from svdecode.serving import attention, lora
from svdecode.serving.names import MU
from svdecode.serving.strength import Strengths

pytestmark = pytest.mark.engine


@pytest.fixture
def compare(models):
    """Compare an engine that is made now with transformers; `mus` are the requests' own strengths."""
    folder = kit.tiny(models, "llama")

    def run(mus=(kit.MU,) * 7, **options):
        steered, wanted = kit.in_transformers(folder), []
        for place, (prompt, mu) in enumerate(zip(kit.prompts(), mus, strict=True)):
            steered.mu = mu
            wanted.append(kit.reference(steered, prompt, 6 + 3 * (place % 5)))
        params = [kit.greedy(6 + 3 * (place % 5), extra_args={MU: mu}) for place, mu in enumerate(mus)]
        kit.assert_equal(kit.ask(kit.engine(folder, **options), kit.prompts(), params), wanted)

    return run


def test_lora_on_the_wrong_half(compare, monkeypatch):
    monkeypatch.setattr(lora, "ADAPTED", 0)
    with pytest.raises(AssertionError):
        compare()


def test_heads_in_the_wrong_order(compare, monkeypatch):
    """Head 0 of one stream beside head 0 of the other: the groups of query heads then meet keys of both."""

    def mixed(self, query, key, value, output_shape=None, output_dtype=None):
        def fold(x):
            return x.view(x.shape[0] // 2, 2, -1, self.head_size).transpose(1, 2).flatten(1)

        out = super(attention.PairedAttention, self).forward(fold(query), fold(key), fold(value), None, output_dtype)
        return out.view(query.shape[0] // 2, -1, 2, self.head_size).transpose(1, 2).reshape(query.shape[0], -1)

    monkeypatch.setattr(attention.PairedAttention, "forward", mixed)
    with pytest.raises(AssertionError):
        compare()


def test_one_cache_for_both_streams(compare, monkeypatch):
    original = attention.PairedAttention.forward

    def shared(self, query, key, value, *rest):
        return original(self, query, key[::2].repeat_interleave(2, 0), value[::2].repeat_interleave(2, 0), *rest)

    monkeypatch.setattr(attention.PairedAttention, "forward", shared)
    with pytest.raises(AssertionError):
        compare()


MUS = (0.5, 2.0, -1.0, 5.0, 0.3, 3.0, 1.2)


def test_requests_that_move_keep_their_strength(compare):
    compare(MUS, max_num_seqs=4)


def test_the_strength_of_another_request_after_a_move(compare, monkeypatch):
    monkeypatch.setattr(Strengths, "move", lambda *_: None)
    with pytest.raises(AssertionError):
        compare(MUS, max_num_seqs=4)
