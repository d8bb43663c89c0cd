"""The demo's task: questions about countries, answered with a bare name. Facts from the package countryinfo (MIT)."""

from __future__ import annotations

import random
from typing import NamedTuple

TEMPLATES = {
    "capital": "What is the capital of {country}?",
    "region": "On which continent is {country}?",
    "demonym": "What are people from {country} called?",
}
SHARES = (0.6, 0.2)  # of the countries for training and calibration; the rest is for the test


class Splits(NamedTuple):
    """Examples as {"prompt", "completion"}; no country is in two splits."""

    train: list[dict[str, str]]
    calibration: list[dict[str, str]]
    test: list[dict[str, str]]


CHAT_TURN = "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def as_prompt(question: str, tokenizer: object, bundled: bool) -> str:
    """A user's turn in the form that the model was tuned on, where it was; the bundled model's without its system prompt."""
    if bundled:
        return CHAT_TURN.format(question=question)
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": question}]
        return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return f"Question: {question}\nAnswer: "


def country_facts(sizes: tuple[int, int, int], seed: int, tokenizer: object, bundled: bool) -> Splits:
    """So many examples of each split, chosen and ordered by the seed, as prompts for the tokenizer's model."""
    try:
        from countryinfo import all_countries
    except ImportError:
        raise ValueError("the demo's task needs countryinfo: pip install 'svdecode[demo]' (or pass --data)") from None
    facts = {}
    for country in all_countries():
        info = country.info()
        answers = {name: info.get(name) for name in TEMPLATES}
        if all(isinstance(answer, str) and 0 < len(answer) < 30 for answer in answers.values()):
            facts[info["name"]] = answers
    shuffle = random.Random(seed)
    names = sorted(facts)
    shuffle.shuffle(names)
    first, second = (round(len(names) * share) for share in (SHARES[0], sum(SHARES)))
    splits = []
    for part, size in zip((names[:first], names[first:second], names[second:]), sizes, strict=True):
        rows = [
            {
                "prompt": as_prompt(template.format(country=name), tokenizer, bundled),
                "completion": facts[name][relation],
            }
            for name in part
            for relation, template in TEMPLATES.items()
        ]
        shuffle.shuffle(rows)
        splits.append(rows[:size])
    return Splits(*splits)
