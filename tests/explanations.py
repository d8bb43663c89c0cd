"""An explanation made by hand, with texts that try to leave the page; and a browser to look at it."""

from __future__ import annotations

import math
import os
import shutil

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from svdecode.explanation.explanation import Explanation
from svdecode.explanation.steps import Candidate, Step
from svdecode.explanation.token_texts import Token
from svdecode.ops.setting import Setting

HOSTILE = [
    "</script><script>window.broken = 1</script>",
    "<img src=x onerror='window.broken = 1'>",
    '"\' onmouseover="window.broken = 1" x=\'',
    "<!--<script>",
    "&lt;b&gt;",
    "\x00\x07\x1b[31m",
    "\u202egnp.exe\u2066",
    "\ud800",
    "\u2028\u2029",
    "line\nbreak",
    "\t",
    "",
    " מים",
    "\u0301",
    "]]>",
]


BYTES = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, as the smallest pieces of most tokenizers are."""
    letters = Tokenizer(models.BPE(BYTES, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=letters)


def hostile_explanation(more: int = 0) -> Explanation:
    """One step for each hostile text, `more` ordinary ones; every second step is changed, KL once infinite."""
    texts = HOSTILE + [f" word{i}" for i in range(more)]
    tokens = [Token(i, text, text or "\u0120<piece>", special=text == "]]>") for i, text in enumerate(texts)]
    steps = []
    for i, token in enumerate(tokens):
        other = Token(900 + i, " other", "other")
        change = 0.08 * (i % 9 - 4)
        chosen = Candidate(token, True, 0.2, 0.5, 0.5 + change)
        without = Candidate(other, i % 3 > 0, 0.3, 0.5, 0.5 - change) if i % 2 else chosen
        last = Candidate(Token(99, HOSTILE[i % len(HOSTILE)], "piece"), False, 0.5, 0.0001, 0.0)
        candidates = [chosen, *([] if without is chosen else [without]), last]
        steps.append(Step(chosen, without, math.inf if i == 3 else 0.05 * i, 2, candidates))
    return Explanation(
        prompt="".join(HOSTILE),
        prompt_ids=[1, 2],
        answer="".join(texts),
        steps=steps,
        unsteered_answer="".join(HOSTILE[:4]),
        unsteered=[*tokens[:1], Token(901, " other", "other"), *tokens[2:]],
        setting=Setting(1.25, 0.1, -math.inf, "kl"),
        mode="paired",
        model="</title><script>window.broken = 1</script>",
        vocabulary=49152,
    )


def why_no_browser() -> str | None:
    """What a browser test lacks here, or None."""
    if "SVDECODE_BROWSER" not in os.environ:
        return "make test-page runs these, and sets SVDECODE_BROWSER"
    try:
        import axe_playwright_python  # noqa: F401
        import playwright  # noqa: F401
    except ImportError as error:
        return f"{error.name} is not installed"
    return None if chromium() else "there is no chromium: apt-get install chromium"


def chromium() -> str | None:
    """The system's own browser; playwright's is not used."""
    return next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )
