"""The README's own example, run with adapters of three kinds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from peft import IA3Config, LoraConfig, PrefixTuningConfig, get_peft_model
from test_demo import WORDS
from tiny import randomise, tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

README = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLE = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "calibrate" in block)
ADAPTERS = {
    "LoRA": LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"]),
    "IA3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    "prefix": PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_example_works(kind, tmp_path, capsys):
    words = [*WORDS, *{word for text in re.findall(r'"([^"]*[=+][^"]*)"', EXAMPLE) for word in text.split()}, "4"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(words))}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>"
    ).save_pretrained(tmp_path / "model")
    base = tiny_llama(vocabulary=len(words))
    base.lm_head.weight.data *= 0.05  # nearly flat: the example's one completion is in the kept set
    base.save_pretrained(tmp_path / "model")
    model = get_peft_model(base, ADAPTERS[kind])
    randomise(model, scale=0.1)
    model.save_pretrained(tmp_path / "my-lora")
    names = re.findall(r'from_pretrained\("([^"]+/[^"]+)"\)', EXAMPLE)
    text = EXAMPLE.replace("my-lora", str(tmp_path / "my-lora")).replace(names[0], str(tmp_path / "model"))
    space: dict = {}
    exec(compile(text.replace("max_new_tokens=8", "max_new_tokens=3"), "README.md", "exec"), space)
    assert space["steered"].mode == "paired"
    assert capsys.readouterr().out.strip()
    assert (tmp_path / "my-lora" / "svdecode.json").is_file()
