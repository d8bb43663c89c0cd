"""Draw the README's picture: what steering does to one next-token distribution, at a real step of a real model.

    python docs/picture.py --adapter demo-output/adapter [--output docs/images/one-step.png]

`svdecode demo` (or `make demo`) leaves the adapter and its calibration there. Among the demo's test questions this looks for
steps where steering changes the chosen token to the gold one, takes the one where it moves most probability, and draws the
most probable tokens of the pre-trained model, of the warm start and of the steered distribution.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

import svdecode
from svdecode.common.figures import GREY, ORANGE, load_pyplot, save_figure
from svdecode.demo.facts import country_facts
from svdecode.models.loading import BUNDLED_NAME, load_adapter, load_model

SHOWN = 6
COLOURS = {"pre-trained": "#cbd5e0", "LoRA": GREY, "steered": ORANGE}
HATCHES = {"pre-trained": "", "LoRA": "//", "steered": ""}


@torch.inference_mode()
def best_step(steered, tokenizer, questions: list[dict[str, str]]) -> dict:
    """The first step of an answer where steering turns a wrong token into the gold one, and moves most probability."""
    best = None
    for question in tqdm(questions, desc="questions"):
        ids = tokenizer(question["prompt"], return_tensors="pt").input_ids
        gold = tokenizer(question["completion"], add_special_tokens=False).input_ids
        for length in range(len(gold)):
            prefix = torch.tensor([gold[:length]], dtype=torch.long)
            pre, ft, _ = steered.pair_logits(input_ids=torch.cat([ids, prefix], 1), use_cache=False)
            pre, ft = pre[:, -1], ft[:, -1]
            logprobs = steered.steered_logprobs(pre, ft)[0]
            before, after = int(ft.argmax()), int(logprobs.argmax())
            if after == gold[length] != before:
                moved = (logprobs.exp() - ft[0].softmax(-1))[after].item()
                if best is None or moved > best["moved"]:
                    best = {
                        "moved": moved,
                        "pre": pre[0].softmax(-1),
                        "ft": ft[0].softmax(-1),
                        "steered": logprobs.exp(),
                    }
                    best |= {"question": question, "done": tokenizer.decode(gold[:length]), "gold": after}
    if best is None:
        raise ValueError("steering changes no token of the gold answers: take another adapter")
    return best


def draw(step: dict, tokenizer, mu: float, path: Path) -> None:
    """Bars of the most probable tokens under the three distributions."""
    order = torch.maximum(step["ft"], step["pre"]).topk(SHOWN).indices.tolist()
    if step["gold"] not in order:
        order[-1] = step["gold"]
    order.sort(key=lambda token: -step["ft"][token])
    parts = {"pre-trained": step["pre"], "LoRA": step["ft"], "steered": step["steered"]}
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(8.4, 3.6), layout="constrained")
    for index, (name, distribution) in enumerate(parts.items()):
        heights = [distribution[token].item() for token in order]
        places = [x + 0.27 * (index - 1) for x in range(len(order))]
        bars = axes.bar(
            places, heights, 0.25, label=name, color=COLOURS[name], hatch=HATCHES[name], edgecolor="#4a5568"
        )
        axes.bar_label(bars, [f"{h:.2f}" if h >= 0.005 else "0" for h in heights], fontsize=7, padding=1)
    labels = [f"{step['done']}{tokenizer.decode([token])}" for token in order]
    axes.set_xticks(range(len(order)), labels)
    for label, token in zip(axes.get_xticklabels(), order, strict=True):
        label.set_fontweight("bold" if token == step["gold"] else "normal")
    axes.set_ylabel("probability of the next token")
    axes.set_ylim(0, 1)
    axes.spines[["top", "right"]].set_visible(False)
    text = max(step["question"]["prompt"].replace("<|im_end|>", "").splitlines(), key=len)
    axes.set_title(f'{text}   Answer so far: "{step["done"]}"', fontsize=11)
    axes.legend(frameon=False)
    caption = f"{BUNDLED_NAME}, a LoRA after 48 steps, mu = {mu:.2f}. Bold: the right next token."
    figure.supxlabel(caption, fontsize=8)
    save_figure(figure, path)


def main() -> None:
    """Find the step and draw it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--only", default="", help="look only at questions that contain this text")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "images" / "one-step.png")
    arguments = parser.parse_args()
    base, tokenizer = load_model()
    calibration = svdecode.Calibration.from_pretrained(arguments.adapter)
    steered = svdecode.steer(load_adapter(base, arguments.adapter), mu=calibration)
    rows, splits = country_facts(0, tokenizer, bundled=True)
    questions = [row for row in splits.select(rows, "test") if arguments.only in row["prompt"]]
    step = best_step(steered, tokenizer, questions)
    draw(step, tokenizer, calibration.mu, arguments.output)
    print(
        f"{arguments.output}: {step['question']['prompt']!r} {step['done']!r} -> {tokenizer.decode([step['gold']])!r}"
    )


if __name__ == "__main__":
    main()
