"""Contrastive decoding (Li et al. 2023, O'Brien and Lewis 2023) with two models, in one call of `steer`.

    python examples/contrastive.py "The capital of France is"

The expert's logits are pushed away from the amateur's: z_expert + mu (z_expert - z_amateur), among the tokens that the expert
finds plausible. Two models cannot share a forward, so `steer` takes mode "lazy": the amateur runs only at steps where the
expert hesitates. Environment variables:

    SVDECODE_EXAMPLE_MODEL     the expert, a folder or hub name (left out: the bundled SmolLM2-135M-Instruct)
    SVDECODE_EXAMPLE_AMATEUR   the amateur, with the same tokenizer (left out: the expert without its last ten layers)
"""

import copy
import os
import sys

import svdecode
from svdecode.models.loading import load_model

prompt = sys.argv[1] if len(sys.argv) > 1 else "The capital of France is"
expert, tokenizer = load_model(os.environ.get("SVDECODE_EXAMPLE_MODEL"))

if name := os.environ.get("SVDECODE_EXAMPLE_AMATEUR"):
    amateur, _ = load_model(name)
else:  # a weaker model with the same vocabulary, made of the expert itself
    amateur = copy.deepcopy(expert)
    amateur.model.layers = amateur.model.layers[:-10]
    amateur.config.num_hidden_layers = len(amateur.model.layers)

steered = svdecode.steer(expert, pretrained=amateur, direction="log_ratio", mu=0.5, alpha=0.1)
inputs = tokenizer(prompt, return_tensors="pt").to(expert.device)
for name, model in {"expert": expert, "contrastive": steered}.items():
    tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    print(f"{name}: {tokenizer.decode(tokens[0], skip_special_tokens=True)!r}")
print(f"the amateur sat out {steered.skipped_share:.0%} of the steps (mode {steered.mode})")
