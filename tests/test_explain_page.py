"""The page of an explanation: texts that try to leave it, and a real browser that looks at it, with axe."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from explanations import HOSTILE, chromium, hostile_explanation, why_no_browser

from svdecode.explanation.page import page
from svdecode.explanation.visible_text import label

WHY_NOT = why_no_browser()
needs_browser = pytest.mark.skipif(WHY_NOT is not None, reason=f"no browser: {WHY_NOT}")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
]  # fmt: skip
PATIENCE = 120_000
"""Milliseconds: other tests may have the processor."""


class Elements(HTMLParser):
    """What a parser sees: every element with its attributes, and what a page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))


def test_hostile_texts_stay_texts():
    text = page(hostile_explanation())
    parser = Elements()
    parser.feed(text)
    tags = [tag for tag, _ in parser.seen]
    assert tags.count("script") == 2  # the numbers and ours
    assert "img" not in tags
    assert not any(name.startswith("on") or name == "style" for _, attributes in parser.seen for name in attributes)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069\u2028\u2029\ud800-\udfff]", text)
    text.encode()  # no lone surrogate


def test_nothing_comes_from_elsewhere():
    parser = Elements()
    parser.feed(page(hostile_explanation()))
    loaded = [
        (tag, attributes[name]) for tag, attributes in parser.seen for name in ("src", "href") if name in attributes
    ]
    assert loaded == [("link", "data:,")]
    policy = next(a["content"] for tag, a in parser.seen if tag == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium(), args=FLAGS, timeout=PATIENCE)
        yield launched
        launched.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Opens an explanation: a page, with what it said on its console and what it asked for."""
    contexts = []

    def open_(explanation=None, **options):
        path = (explanation or hostile_explanation()).to_html(tmp_path / "page.html")
        context = browser.new_context(offline=True, **{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        found = context.new_page()
        found.set_default_timeout(PATIENCE)
        found.said, found.asked = [], []
        found.on("console", lambda message: found.said.append(message.text))
        found.on("pageerror", lambda error: found.said.append(str(error)))
        found.on("request", lambda request: found.asked.append(request.url))
        found.goto(path.as_uri())
        return found

    yield open_
    for context in contexts:
        context.close()


def violations(opened_page) -> list[str]:
    from axe_playwright_python.sync_playwright import Axe

    opened_page.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")
    found = Axe().run(opened_page)
    assert len(found.response["passes"]) > 20  # it has looked
    return [f"{one['id']}: {one['nodes'][0]['html'][:200]}" for one in found.response["violations"]]


@needs_browser
@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 400), ("dark", 400)])
def test_axe_finds_nothing_and_nothing_is_cut_off(opened, scheme, width):
    found = opened(color_scheme=scheme, viewport={"width": width, "height": 900})
    assert violations(found) == []
    found.check("input[name=by][value=kl]")
    assert violations(found) == []
    assert found.evaluate("document.documentElement.scrollWidth") == width
    assert found.evaluate("getComputedStyle(document.body).backgroundColor") == {
        "light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 28)"
    }[scheme]  # fmt: skip


@needs_browser
def test_axe_is_seen_to_bite(opened):
    found = opened()
    found.evaluate("document.querySelector('.summary').style.color = '#ddd'")
    found.evaluate("document.querySelector('#step-0').removeAttribute('aria-label')")
    found.evaluate("document.querySelector('label[for=step-0]').remove()")
    assert {one.split(":")[0] for one in violations(found)} == {"color-contrast", "label"}


@needs_browser
def test_no_hostile_text_runs_and_nothing_is_fetched(opened):
    explanation = hostile_explanation()
    found = opened(explanation)
    for index in range(len(HOSTILE)):
        found.locator(f"label[for=step-{index}]").dispatch_event("click")
        title = found.inner_text("#panel-title")
        assert title == f"Step {index + 1} of {len(HOSTILE)}: {label(explanation.steps[index].chosen.token)}"
    assert found.evaluate("window.broken") is None
    assert found.said == []
    assert [url.split(":")[0] for url in found.asked if url != "data:,"] == ["file"]


@needs_browser
def test_click_and_keyboard_show_the_candidates(opened):
    found = opened(hostile_explanation(4))
    assert found.inner_text("#panel-title").startswith("Step 2 of 19")  # the first changed one
    found.click("label[for=step-16]")
    assert found.inner_text("#panel-title") == "Step 17 of 19: \u2423word1"
    found.keyboard.press("ArrowRight")
    assert found.inner_text("#panel-title") == "Step 18 of 19: \u2423word2"
    assert "Steering changed the choice from \u2423other to \u2423word2." in found.inner_text("#panel")
    assert found.inner_text("#said").startswith("Step 18, \u2423word2. Steering changed the choice from \u2423other.")
    rows = found.locator("table.candidates tbody tr").all_inner_texts()
    assert len(rows) == 3
    assert all(part in rows[0] for part in ("\u2423word2", "steered choice", "in K", "0.200", "0.500", "0.820"))
    assert all(part in rows[2] for part in ("pre-trained's choice", "out", "<0.001", "0.500"))
    widths = found.eval_on_selector_all("tbody tr:first-child .fill", "all => all.map((one) => one.style.width)")
    assert widths == ["20%", "50%", "82%"]
    found.click("label[for=step-4]")  # nothing above 0.5: the bars are drawn larger
    assert "a full bar is 0.5." in found.inner_text("caption")
    assert found.eval_on_selector("tbody tr:first-child .warm-start .fill", "(one) => one.style.width") == "100%"
    found.click("label[for=step-17]")
    found.focus("button[aria-label='Previous changed step']")
    found.keyboard.press("Enter")
    assert found.inner_text("#panel-title").startswith("Step 16 of 19")
    assert found.evaluate("document.activeElement.getAttribute('aria-label')") == "Previous changed step"
    assert found.is_checked("#step-15")


@needs_browser
def test_the_switch_changes_colours_and_bars(opened):
    found = opened()
    fill = "getComputedStyle(document.querySelector('label[for=step-14]')).backgroundColor"
    moved = found.evaluate(fill), found.inner_text("#profile .note"), found.is_visible(".by-moved")
    found.check("input[name=by][value=kl]")
    kl = found.evaluate(fill), found.inner_text("#profile .note"), found.is_visible(".by-moved")
    assert moved == ("rgb(195, 223, 247)", "Each bar is a step; the longest is +0.320 (step 9).", True)
    assert kl == ("rgb(116, 181, 234)", "Each bar is a step; the longest is 0.700 nats (step 15).", False)
    assert found.locator("#profile .mark").count() == 7  # marks, not colours alone
    assert found.locator(".token .mark").count() == 7


@needs_browser
def test_without_javascript_answers_and_numbers_are_there(opened):
    found = opened(java_script_enabled=False)
    assert "The candidates need JavaScript." in found.inner_text("#panel")
    assert "other" in found.inner_text(".other")
    found.click(".all summary")
    assert found.locator(".all tbody tr").count() == len(HOSTILE)
    assert "infinite" in found.locator(".all tbody tr").nth(3).inner_text()


@needs_browser
def test_a_notebook_shows_it_in_a_frame(opened):
    found = opened()
    found.set_content(f"<p>cell</p>{hostile_explanation()._repr_html_()}")
    frame = found.frame_locator("iframe")
    frame.locator("label[for=step-3]").click()
    assert frame.locator("#panel-title").inner_text().startswith("Step 4 of 15")
    assert found.evaluate("window.broken") is None
