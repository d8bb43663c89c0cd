"""The demo's task: questions about countries, answered with a bare name. Facts from the package countryinfo (MIT)."""

from __future__ import annotations

import random

from svdecode.data.splits import NAMES, Splits, data_hash, example_hash

TEMPLATES = {
    "capital": "What is the capital of {country}?",
    "region": "On which continent is {country}?",
    "demonym": "What are people from {country} called?",
}
SHARES = (0.6, 0.2)  # of the countries for training and calibration; the rest is for the test
SIZES = (192, 96, 120)  # questions in the three parts
CHAT_TURN = "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def as_prompt(question: str, tokenizer: object, bundled: bool) -> str:
    """A user's turn in the form that the model was tuned on, where it was; the bundled model's without its system prompt."""
    if bundled:
        return CHAT_TURN.format(question=question)
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": question}]
        return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return f"Question: {question}\nAnswer: "


def country_facts(seed: int, tokenizer: object, bundled: bool) -> tuple[list[dict[str, str]], Splits]:
    """Questions about countries as {"prompt", "completion"}, and their parts; no country is in two parts.

    Args:
        seed: of what is chosen, and of the order.
        tokenizer: its model's chat template makes the prompts.
        bundled: whether that is the bundled model.

    Raises:
        ValueError: countryinfo is missing.
    """
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
    rows, parts = [], {}
    for name, countries, size in zip(NAMES, (names[:first], names[first:second], names[second:]), SIZES, strict=True):
        questions = [
            {
                "prompt": as_prompt(template.format(country=country), tokenizer, bundled),
                "completion": facts[country][relation],
            }
            for country in countries
            for relation, template in TEMPLATES.items()
        ]
        shuffle.shuffle(questions)
        rows += questions[:size]
        parts[name] = [example_hash(question) for question in questions[:size]]
    fractions = tuple(size / sum(SIZES) for size in SIZES)
    return rows, Splits("facts about countries", data_hash(rows), seed, fractions, parts)
