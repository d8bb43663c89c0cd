"""Token statistics of streams: any batch size, no length, texts a window at a time, against dense formulas."""

from __future__ import annotations

import pytest
import torch
from test_calibration import ALPHA, batches, logits_and_labels, lora  # noqa: F401  (a fixture)

import svdecode


def test_streams_without_length_and_any_batch_size(lora):  # noqa: F811
    """A generator, single rows, sub-ranges of labels: the same tokens in the same order with the same hash."""
    data = batches()
    data[1]["labels"][:, 6] = -100  # a gap
    data[2]["labels"][:, :9] = -100  # few labelled positions among many
    whole = svdecode.calibrate(lora, data, alpha=ALPHA, progress=False)
    rows = ({name: value[i : i + 1] for name, value in batch.items()} for batch in data for i in range(4))
    single = svdecode.calibrate(lora, rows, alpha=ALPHA, progress=False)
    assert single.data == whole.data
    assert single.num_sequences == whole.num_sequences == 12
    assert torch.equal(single.tokens.gold.kept, whole.tokens.gold.kept)
    assert torch.equal(single.tokens.gold.sequence, whole.tokens.gold.sequence)
    torch.testing.assert_close(single.tokens.gold.moments, whole.tokens.gold.moments, rtol=1e-3, atol=1e-5)
    assert single.estimates == pytest.approx(whole.estimates, rel=1e-3)
    data[0]["labels"][0, 5] = 7
    assert svdecode.calibrate(lora, data, alpha=ALPHA, progress=False).data != whole.data


def test_statistics_against_dense_formulas(lora):  # noqa: F811
    """What is stored of each token, from float64 rows of the whole vocabulary."""
    data = batches(1)
    tokens = svdecode.calibrate(lora, data, alpha=ALPHA, progress=False).tokens.gold
    pre, ft, labels = (
        value.double() if value.is_floating_point() else value for value in logits_and_labels(lora, data)
    )
    kept = ft >= ft.amax(-1, keepdim=True) + torch.tensor(ALPHA).log()
    assert torch.equal(tokens.num_kept.long(), kept.sum(1))
    assert torch.equal(tokens.kept, kept.gather(1, labels[:, None]).squeeze(1))
    out = svdecode.fused_steer(pre, ft, 0.0, labels=labels, alpha=ALPHA)
    for name in ("moments", "mu_star", "kl"):
        torch.testing.assert_close(getattr(tokens, name).double(), getattr(out, name), rtol=1e-3, atol=1e-5)


def test_texts_are_read_a_window_at_a_time(monkeypatch):
    from datasets import Dataset

    from svdecode.data import batches as collection

    monkeypatch.setattr(collection, "WINDOW", 2)
    read = []

    def examples():
        for i in range(50):
            read.append(i)
            yield {"prompt": "a" * (i % 7 + 1), "completion": "b"}

    class Letters:
        pad_token_id, eos_token_id = 0, 1

        def __call__(self, text, add_special_tokens=True):
            from types import SimpleNamespace

            return SimpleNamespace(input_ids=[ord(letter) for letter in text])

    found, count = collection.numbered_batches(examples(), Letters(), batch_size=3)
    assert count is None
    first = next(found)
    assert len(read) == 6  # two batches of three
    numbers = [*first["sequence"].tolist(), *(n for batch in found for n in batch["sequence"].tolist())]
    assert sorted(numbers) == list(range(50))
    with pytest.raises(ValueError, match=r"held_out needs the columns prompt and completion, got question"):
        collection.numbered_batches(Dataset.from_dict({"question": ["a"]}), Letters(), 3, name="held_out")
