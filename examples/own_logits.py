"""The operators inside a training loop of your own: no transformers, no adapter, only logits.

    python examples/own_logits.py

A small classifier plays the language model: its first weights are the pre-trained model, and training moves a copy of them.
The loss is the NLL of the labels under the *steered* distribution. Its gradient reaches the weights through `steered_nll` and
the strength mu, which is learned too. It takes seconds on a CPU. Environment variable:

    SVDECODE_EXAMPLE_STEPS   training steps (left out: 60)
"""

import os

import torch

import svdecode

torch.manual_seed(0)
VOCABULARY, WIDTH, ROWS = 512, 32, 64
steps = int(os.environ.get("SVDECODE_EXAMPLE_STEPS", "60"))

# A task: inputs, and a label for each that a hidden matrix decides. -100 marks a row that takes no part in the loss.
inputs = torch.randn(ROWS, WIDTH)
labels = (inputs @ torch.randn(WIDTH, VOCABULARY)).argmax(-1)
labels[0] = -100

pretrained = torch.randn(WIDTH, VOCABULARY) * 0.1
tuned = torch.nn.Parameter(pretrained.clone() + 0.01 * torch.randn(WIDTH, VOCABULARY))
mu = torch.nn.Parameter(torch.tensor([0.5]))
optimizer = torch.optim.Adam([tuned, mu], lr=0.02)

for step in range(steps):
    logits_pre, logits_ft = inputs @ pretrained, inputs @ tuned
    # (ROWS, 1) in nats, one column per strength. alpha=0 keeps every token: no label has an infinite NLL.
    nll = svdecode.steered_nll(logits_pre, logits_ft, labels, mu, alpha=0.0)
    loss = nll.sum() / (labels != -100).sum()
    # The KL to the pre-trained model is differentiable too, and keeps the weights from running away.
    out = svdecode.fused_steer(logits_pre, logits_ft, mu=mu[0], alpha=0.0)
    assert out.kl is not None  # return_kl=False would leave it out
    (loss + 0.01 * out.kl.mean()).backward()
    if step % 20 == 0 or step == steps - 1:
        print(f"step {step:3d}: NLL {loss.item():.3f}, KL {out.kl.mean().item():.3f}, mu {mu.item():.3f}")
    optimizer.step()
    optimizer.zero_grad()

# The strength that each label asks for, and draws from the steered distribution.
with torch.no_grad():
    logits_pre, logits_ft = inputs @ pretrained, inputs @ tuned
    mu_star, _ = svdecode.optimal_strength(logits_pre, logits_ft, labels, alpha=0.0)
    tokens, logprobs = svdecode.steer_sample(logits_pre, logits_ft, mu=mu.item(), temperature=0.0)
print(f"median of mu*: {mu_star[1:].median().item():.3f}")
print(f"right answers: {(tokens == labels)[1:].float().mean().item():.0%}, mean log-prob {logprobs.mean().item():.3f}")
