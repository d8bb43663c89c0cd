"""Data in the forms that training code has: padded on either side, packed, streamed, tokenised, with tokenizers that append."""

from __future__ import annotations

import pytest
import torch
from evaluation_kit import tiny_tokenizer
from tiny import batches, tiny_lora
from tiny import tiny_model as tiny
from tokenizers import processors

import svdecode
from svdecode.data.batches import encode, prompt_ids

LENGTH = 10


@pytest.fixture(scope="module")
def gpt2():
    """A model with learned positions, which counts padding unless it is told not to."""
    from peft import LoraConfig, get_peft_model
    from tiny import randomise

    config = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    model = get_peft_model(tiny("gpt2"), config)
    torch.manual_seed(3)
    randomise(model)
    return model.eval()


def mu_of(model, data, **settings) -> float:
    return svdecode.calibrate(model, data, alpha=0.05, progress=False, **settings).mu


def padded(batch: dict, side: str) -> dict:
    fillers = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    sides = (0, 5) if side == "right" else (5, 0)
    return {k: torch.nn.functional.pad(v, sides, value=fillers[k]) for k, v in batch.items()}


def rows_of(data: list[dict]) -> list[dict]:
    return [{k: v[i].tolist() for k, v in batch.items()} for batch in data for i in range(len(batch["input_ids"]))]


def test_padding_on_the_left_changes_nothing(gpt2):
    expected = mu_of(gpt2, batches())
    for side in ("right", "left"):
        assert mu_of(gpt2, [padded(batch, side) for batch in batches()]) == pytest.approx(expected, rel=1e-4), side


def test_packed_rows(gpt2):
    expected = mu_of(gpt2, batches())
    positions = torch.arange(LENGTH).repeat(4)
    packed = [
        {
            "input_ids": b["input_ids"].reshape(1, -1),
            "labels": b["labels"].reshape(1, -1),
            "position_ids": positions[None],
        }
        for b in batches()
    ]
    assert mu_of(gpt2, packed) == pytest.approx(expected, rel=1e-4)
    rows = [{k: v[0] for k, v in batch.items()} for batch in packed]
    found = svdecode.calibrate(gpt2, rows, alpha=0.05, progress=False)
    assert found.mu == pytest.approx(expected, rel=1e-4)
    assert found.num_sequences == 12
    lengths = [{"input_ids": r["input_ids"], "labels": r["labels"], "seq_lengths": [LENGTH] * 4} for r in rows]
    assert mu_of(gpt2, lengths) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="sum to 41, and it has 40 tokens"):
        mu_of(gpt2, [{**lengths[0], "seq_lengths": [LENGTH + 1, *[LENGTH] * 3]}])
    with pytest.raises(ValueError, match="position_ids must count from 0"):
        mu_of(gpt2, [{**rows[0], "position_ids": positions + 1}])


@pytest.fixture(scope="module")
def lora():
    return tiny_lora()


def test_streams_and_integers(lora):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([{k: torch.tensor(v) for k, v in row.items()} for row in rows_of(batches())])

    expected = mu_of(lora, batches())
    assert mu_of(lora, torch.utils.data.DataLoader(Stream(), batch_size=4)) == pytest.approx(expected, rel=1e-4)
    assert mu_of(lora, Stream()) == pytest.approx(expected, rel=1e-4)
    small = [{**batch, "labels": batch["labels"].int()} for batch in batches()]
    assert mu_of(lora, small) == pytest.approx(expected, rel=1e-4)
    assert mu_of(lora, iter(batches())) == pytest.approx(expected, rel=1e-4)


def test_tokenised_data_sets(lora):
    datasets = pytest.importorskip("datasets")
    expected = mu_of(lora, batches())
    for side in ("right", "left"):
        rows = rows_of([padded(batch, side) for batch in batches()])
        assert mu_of(lora, rows, batch_size=5) == pytest.approx(expected, rel=1e-4), side
        for kind in (None, "torch"):
            found = datasets.Dataset.from_list(rows).with_format(kind)
            assert mu_of(lora, found, batch_size=5) == pytest.approx(expected, rel=1e-4), (side, kind)
    with pytest.raises(ValueError, match=r"data\[0\] needs input_ids and labels"):
        mu_of(lora, datasets.Dataset.from_list([{"input_ids": [1, 2]}]))
    with pytest.raises(ValueError, match=r"data\[0\] has pixel_values: pass batches"):
        mu_of(lora, [{"input_ids": [3, 4], "labels": [3, 4], "pixel_values": torch.zeros(3, 2, 2)}])
    with pytest.raises(ValueError, match="different lengths"):
        mu_of(lora, [{"input_ids": [3, 4], "labels": [3]}])


def test_what_a_tokenizer_appends_stays_at_the_end():
    tokenizer = tiny_tokenizer()
    eos, bos = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<bos>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", bos), ("<eos>", eos)]
    )
    prompt, completion = (tokenizer(text, add_special_tokens=False).input_ids for text in ("what is w1", "w2 w3"))
    assert tokenizer("what is w1").input_ids == [bos, *prompt, eos]  # the tokenizer does append
    found = encode({"prompt": "what is w1", "completion": "w2 w3"}, tokenizer)
    assert found["input_ids"] == [bos, *prompt, *completion, eos]
    assert found["labels"] == [-100] * (1 + len(prompt)) + [*completion, eos]
    assert prompt_ids("", tokenizer) == [bos]
    assert prompt_ids("what is w1 <eos>", tokenizer) == [bos, *prompt, eos]  # the text's own
