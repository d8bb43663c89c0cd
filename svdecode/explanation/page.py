"""The page of an `Explanation`: one HTML document with its style and its script inside, and nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING

from svdecode.constants import VERSION
from svdecode.explanation.numbers import (
    KL_LEVELS,
    MINUS,
    MOVED_LEVELS,
    change,
    level,
    nats,
    probability,
    ranges,
)
from svdecode.explanation.steps import Candidate, Step
from svdecode.explanation.token_texts import Token
from svdecode.explanation.visible_text import LINE_BREAK, label, visible

if TYPE_CHECKING:
    from svdecode.explanation.explanation import Explanation

LONG_PROMPT = 600
"""Characters of a prompt that is folded up."""
LONG_ANSWER = 160
"""Tokens of an answer that scrolls in its box, so that the candidates stay in sight."""
FULL_BARS = (0.1, 0.2, 0.5, 1.0)
"""What a full bar may stand for: the least that all candidates of a step fit into."""
MARK = "\u25c6"
"""Stands at the steps where steering changed the choice."""


def page(explanation: Explanation) -> str:
    """The whole document."""
    style, script = (files("svdecode.explanation").joinpath(name).read_text() for name in ("page.css", "page.js"))
    data = json.dumps([_data(number, step) for number, step in enumerate(explanation.steps, 1)])
    # Inside a script element only these letters could end it, or begin a comment.
    for letter in "<>&":
        data = data.replace(letter, f"\\u{ord(letter):04x}")
    long = " long" if len(explanation.steps) > LONG_ANSWER else ""
    return f"""<!doctype html>
<html lang="en" data-by="moved">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_policy(style, script)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="svdecode {VERSION}">
<title>A steered answer, step by step - svdecode</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<main>
<header>
<h1>What steering changed</h1>
<p class="summary">{escape(explanation.summary())}</p>
{_settings(explanation)}
</header>
{_prompt(explanation.prompt, explanation.prompt_ids)}
<section class="answers{long}" aria-label="Both answers">
{_steered_answer(explanation)}
{_unsteered_answer(explanation, long)}
</section>
{_legend()}
<div id="profile" aria-hidden="true"></div>
<section id="panel" aria-labelledby="panel-title">
<noscript><p>The candidates need JavaScript. The table below has the numbers of all steps without it.</p></noscript>
</section>
<p id="said" class="hidden" role="status"></p>
{_table(explanation)}
{_HELP}
</main>
<script type="application/json" id="steps">{data}</script>
<script>{script}</script>
</body>
</html>
"""


def _policy(style: str, script: str) -> str:
    """The browser runs this script and this style alone, and fetches nothing."""
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    return (
        f"default-src 'none'; style-src 'sha256-{digests[0]}'; script-src 'sha256-{digests[1]}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _settings(explanation: Explanation) -> str:
    setting = explanation.setting
    shown = {
        "model": visible(explanation.model),
        "mu": f"{setting.mu:.4g}",
        "alpha": f"{setting.alpha:g}",
        "penalty": f"{setting.penalty:g}".replace("-", MINUS),
        "direction": setting.direction,
        "tokens": f"{len(explanation.prompt_ids)} + {len(explanation.steps)}",
    }
    entries = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in shown.items())
    return f'<dl class="settings">{entries}</dl>'


def _prompt(text: str, ids: list[int]) -> str:
    shown = visible(text) or " ".join(map(str, ids))
    opened = "" if len(shown) > LONG_PROMPT else " open"
    return f'<details class="prompt"{opened}><summary>Prompt</summary><pre dir="auto">{escape(shown)}</pre></details>'


def _running(token: Token) -> str:
    """A token inside a text, as HTML: white space does its work, and a line break is seen too."""
    text = visible(token.text) if token.text and not token.special else label(token)
    return escape(text).replace("\n", f'<span class="break" aria-hidden="true">{LINE_BREAK}</span>\n')


def _steered_answer(explanation: Explanation) -> str:
    tokens = []
    for index, step in enumerate(explanation.steps):
        token, changed = step.chosen.token, step.changed
        spoken = f"{label(token)}, step {index + 1}" + (", choice changed by steering" if changed else "")
        classes = f"token{' changed' if changed else ''}{' special' if token.special else ''}"
        mark = f'<span class="mark" aria-hidden="true">{MARK}</span>' if changed else ""
        tokens.append(
            f'<span class="{classes}" data-kl="{level(step.kl, KL_LEVELS)}" data-moved="{level(step.moved, MOVED_LEVELS)}">'
            f'<input type="radio" name="step" id="step-{index}" value="{index}" aria-label="{escape(spoken)}"'
            f"{' checked' if index == _first(explanation.steps) else ''}>"
            f'<label for="step-{index}">{_running(token)}{mark}</label></span>'
        )
    return (
        '<div class="answer"><h2 id="steered-title">With steering '
        f'<span class="note">(mu = {explanation.setting.mu:.4g})</span></h2>'
        f'<p class="hidden">The whole answer: {escape(visible(explanation.answer))}</p>'
        '<p class="note">Click a token, or move with the arrow keys, to see its candidates.</p>'
        f'<div class="text" role="radiogroup" aria-label="Steps of the answer with steering" dir="auto">{"".join(tokens)}</div>'
        "</div>"
    )


def _first(steps: list[Step]) -> int:
    """The step that is shown first: the first one that steering changed."""
    return next((index for index, step in enumerate(steps) if step.changed), 0)


def _unsteered_answer(explanation: Explanation, long: str) -> str:
    first = explanation.first_difference
    cut = len(explanation.unsteered) if first is None else first - 1
    same, other = (
        "".join(_running(token) for token in part)
        for part in (explanation.unsteered[:cut], explanation.unsteered[cut:])
    )
    if first is None:
        note = "The same tokens."
    elif other:
        note = f"Underlined: from step {first} on, where the answers part."
    else:
        note = f"This answer ends before step {first}."
    # A box that scrolls has to be reached by keyboard.
    focus = ' tabindex="0" role="region" aria-labelledby="unsteered-title"' if long else ""
    return (
        '<div class="answer"><h2 id="unsteered-title">Without steering <span class="note">(mu = 0)</span></h2>'
        f'<p class="note">{note}</p><div class="text" dir="auto"{focus}>{same}'
        + (f'<span class="other">{other}</span>' if other else "")
        + "</div></div>"
    )


def _legend() -> str:
    """The switch between the two colourings, and what the colours stand for."""
    kl = "".join(
        f'<li><span class="token" data-kl="{index}">{text}</span></li>' for index, text in enumerate(ranges(KL_LEVELS))
    )
    texts = ranges(MOVED_LEVELS)
    moved = "".join(
        f'<li><span class="token" data-moved="{sign * index}">{text}</span></li>'
        for sign, order in ((-1, range(5, 0, -1)), (1, range(6)))
        for index in order
        for text in [texts[index] if index == 0 else f"{'+' if sign > 0 else MINUS}{texts[index]}"]
    )
    return f"""<section class="colours" aria-label="Colours">
<fieldset><legend>Colour by</legend>
<label><input type="radio" name="by" value="moved" checked> change of the token's probability</label>
<label><input type="radio" name="by" value="kl"> KL of the two models</label>
</fieldset>
<div class="legend by-moved" data-by="moved"><p>Probability with steering minus without (stripes: it fell)</p>
<ul>{moved}</ul></div>
<div class="legend by-kl" data-by="kl"><p>KL(warm start || pre-trained) in nats: how far the warm start has moved</p>
<ul>{kl}</ul></div>
<p class="note"><span class="mark">{MARK}</span> marks a step at which the warm start would have taken another token.</p>
</section>"""


def _table(explanation: Explanation) -> str:
    head = ("Step", "Token", "Without steering", "Pre-trained", "Warm start", "Steered", "Change", "KL", "Tokens in K")
    rows = []
    for number, step in enumerate(explanation.steps, 1):
        chosen = step.chosen
        texts = (
            f"{MARK} instead of {label(step.without.token)}" if step.changed else "the same",
            probability(chosen.pretrained),
            probability(chosen.warm_start),
            probability(chosen.steered),
            change(step.moved),
            nats(step.kl),
            f"{step.num_kept:,}",
        )
        cells = "".join(f"<td>{escape(text)}</td>" for text in texts)
        rows.append(f'<tr><td>{number}</td><th scope="row"><bdi>{escape(label(chosen.token))}</bdi></th>{cells}</tr>')
    heads = "".join(f'<th scope="col">{name}</th>' for name in head)
    return (
        '<details class="all"><summary>All steps as a table</summary>'
        '<div class="scroll" tabindex="0" role="region" aria-label="All steps"><table><thead><tr>'
        f"{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def _data(number: int, step: Step) -> dict[str, object]:
    """One step as the script shows it: ready texts, and shares for the bars."""
    chosen = step.chosen
    largest = max(max(row.pretrained, row.warm_start, row.steered) for row in step.candidates)
    full = next((bar for bar in FULL_BARS if largest <= bar), 1.0)
    facts = [
        ["Probability of the choice", f"{probability(chosen.warm_start)} without steering, "
         f"{probability(chosen.steered)} with it ({change(step.moved)})"],
        ["KL(warm start || pre-trained)", f"{nats(step.kl)} nats"],
        ["Kept set K", f"{step.num_kept:,} token{'' if step.num_kept == 1 else 's'}"],
    ]  # fmt: skip
    return {
        "step": number,
        "token": label(chosen.token),
        "changed": step.changed,
        "without": label(step.without.token),
        "moved": [step.moved, change(step.moved)],
        # JSON has no infinity, and a bar no more than its full height.
        "kl": [step.kl if math.isfinite(step.kl) else -1, nats(step.kl)],
        "facts": facts,
        "full": f"{full:g}",
        "rows": [_row(candidate, step, full) for candidate in step.candidates],
    }


def _row(candidate: Candidate, step: Step, full: float) -> dict[str, object]:
    top = max(step.candidates, key=lambda row: row.pretrained).token.id
    choices = {"steered": step.chosen.token.id, "warm start": step.without.token.id, "pre-trained": top}
    values = (candidate.pretrained, candidate.warm_start, candidate.steered)
    return {
        "token": label(candidate.token),
        "id": candidate.token.id,
        "kept": candidate.kept,
        "choices": [name for name, token in choices.items() if token == candidate.token.id],
        "shares": [round(min(value / full, 1.0), 4) for value in values],
        "texts": [probability(value) for value in values],
    }


_HELP = """<details class="help"><summary>How to read this page</summary>
<p>At every step two models give each token a probability: the <b>pre-trained</b> model, and the <b>warm start</b>, which is the
same model with its adapter. Steering pushes the warm start further in the direction in which it has moved away from the
pre-trained model; mu says how far. Without steering (mu = 0) the warm start answers alone.</p>
<p>Only the tokens of the kept set <b>K</b> are pushed: those with at least alpha times the warm start's highest probability.
The penalty is added to all others; with \u2212inf they cannot be chosen.</p>
<p>All probabilities of a step are over the whole vocabulary, given the prompt and the <em>steered</em> answer up to there. So a
changed step means: after the same words, the warm start would have taken another token. KL is the Kullback-Leibler divergence
of the two models' distributions; 0 means that they agree.</p>
<p>\u2423 is a space, \u21b5 a line break, and \u27e8U+202E\u27e9 a character that cannot be seen.</p></details>"""
