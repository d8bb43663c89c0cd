"""Quantised bases, as compressed-tensors saves them, against vLLM's own: the same base alone, and with a LoRA put on by hand.

Not against transformers: vLLM's products of whole numbers are rounded in a way of their own, on this or that CPU.
"""

from __future__ import annotations

import json
import shutil

import kit
import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm import LLM

from svdecode.serving.names import MU

pytestmark = pytest.mark.engine

GROUP = 32
UNPACKED = {"target_modules": ["o_proj", "down_proj"], "r": 4, "lora_alpha": 8}
SCALE = 2  # lora_alpha / r
WHOLE = {"type": "int", "symmetric": True}
FOUR_BITS = {"weights": {**WHOLE, "num_bits": 4, "strategy": "group", "group_size": GROUP}}
EIGHT_BITS = {
    "weights": {**WHOLE, "num_bits": 8, "strategy": "channel"},
    "input_activations": {**WHOLE, "num_bits": 8, "strategy": "token", "dynamic": True},
}


def four_bits(weight):
    """{name: tensor} of a layer."""
    groups = weight.unflatten(1, (-1, GROUP))
    scale = (groups.abs().amax(-1) / 7).bfloat16()
    levels = (groups / scale.float()[..., None]).round().clamp(-8, 7).flatten(1)
    words = (levels.long() + 8).unflatten(1, (-1, 8)) << (4 * torch.arange(8))
    packed = words.sum(-1).to(torch.int32)  # the highest bit wraps to the sign
    return {"weight_packed": packed, "weight_scale": scale, "weight_shape": torch.tensor(weight.shape)}


def eight_bits(weight):
    scale = weight.abs().amax(1, keepdim=True) / 127
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}


def quantised(source, folder, scheme, pack, layout):
    """The model in `source` with whole numbers for its projections, and its adapter."""
    tensors = {}
    for name, value in load_file(source / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            tensors |= {name.removesuffix("weight") + key: tensor for key, tensor in pack(value).items()}
        else:
            tensors[name] = value
    quantisation = {
        "quant_method": "compressed-tensors", "format": layout, "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": {"targets": ["Linear"], **scheme}},
    }  # fmt: skip
    config = json.loads((source / "config.json").read_text())
    shutil.copytree(source / "lora", folder / "lora")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantisation}))


def furthest(outputs, wanted):
    """The largest difference of the first token's log-probs between two lists of answers."""
    off = 0.0
    for output, other in zip(outputs, wanted, strict=True):
        found, known = output.outputs[0].logprobs[0], other.outputs[0].logprobs[0]
        off = max(
            [off, *(abs(entry.logprob - known[token].logprob) for token, entry in found.items() if token in known)]
        )
    return off


def put_lora(llm, folder):
    """LoRA as its definition has it, onto the layers of a plain engine that are packed with no other."""
    factors = load_file(folder / "lora" / "adapter_model.safetensors")
    count = 0
    for name, layer in llm.llm_engine.model_executor.driver_worker.worker.model_runner.model.named_modules():
        stem = f"base_model.model.{name}.lora_"
        if f"{stem}A.weight" in factors:
            a, b = factors[f"{stem}A.weight"], factors[f"{stem}B.weight"] * SCALE

            def forward(x, own=layer.forward, a=a, b=b):
                y, bias = own(x)
                return y + (x @ a.to(x).T) @ b.to(x).T, bias

            layer.forward = forward
            count += 1
    assert count == len(factors) / 2


def check(folder, dtype, close):
    """With log_ratio over the whole vocabulary, -1 gives the pre-trained model, and 0 is the adapted one."""
    inputs, every = kit.prompts(), kit.greedy(1, logprobs=20)
    plain = LLM(str(folder), **{**kit.small(), "dtype": dtype, "enable_prefix_caching": False})
    pretrained = kit.ask(plain, inputs, every)
    put_lora(plain, folder)
    adapted = kit.ask(plain, inputs, every)
    assert furthest(adapted, pretrained) > 10 * close  # or the comparison would see nothing
    llm = kit.engine(folder, dtype=dtype, alpha=0.0, direction="log_ratio")
    for mu, wanted in ((-1.0, pretrained), (0.0, adapted)):
        assert furthest(kit.ask(llm, inputs, kit.greedy(1, logprobs=20, extra_args={MU: mu})), wanted) < close


def test_eight_bits(models, tmp_path):
    quantised(kit.tiny(models, "llama", **UNPACKED), tmp_path, EIGHT_BITS, eight_bits, "int-quantized")
    check(tmp_path, "float32", 1e-3)


@pytest.mark.skipif(not hasattr(torch.ops._C, "cpu_gemm_wna16"), reason="vLLM has the product for AVX-512 alone")
def test_four_bits(models, tmp_path):
    """In bfloat16, the only dtype of vLLM's product."""
    quantised(kit.tiny(models, "llama", **UNPACKED), tmp_path, FOUR_BITS, four_bits, "pack-quantized")
    check(tmp_path, "bfloat16", 0.1)
