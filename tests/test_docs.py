"""The documentation: no placeholder is left, links and paths exist, and the blocks of the quickstart run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
import traffic_table

PAGES = [
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
]
FOLDERS = ("svdecode", "kernels", "csrc", "bench", "docs", "tests", "examples")
FIGURE = r"[-+]?[\d.,]+(?: ?[%x])?"
KNOWN = ("NVIDIA", "IJCAI", "JSONL", "README")
"""Words of five capitals and more that readers know."""
OPERATORS = ["fused_steer", "steering_vector", "optimal_strength", "steered_nll", "steer_sample", "steer_topk"]


def without_code(text: str) -> str:
    """The prose and the tables: no fenced or indented block, no inline code."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^ {4}.*$", "", text, flags=re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", text)


def leftovers(text: str) -> list[str]:
    """Marks of unfinished work, and words in capitals that stand where a figure should."""
    found = re.findall(r"\b(?:TODO|FIXME|XXX+|TBD|TBA)\b|\?\?\?+|@@\w+", text)
    prose = without_code(text)
    for line in re.findall(r"^\|(.*)\|$", prose, re.MULTILINE):
        cells = [cell.strip(" *") for cell in line.split("|")]
        if any(re.fullmatch(FIGURE, cell) for cell in cells):  # a row of figures
            found += [cell for cell in cells if re.fullmatch(r"[A-Z][A-Z0-9_]{2,}", cell)]
    words = re.findall(r"(?<![\w/.$-])[A-Z]{5,}(?![\w/.-])", prose)
    return found + [word for word in words if word not in {*KNOWN, *found}]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_no_placeholder_is_left(page):
    assert leftovers(page.read_text()) == []


def test_a_planted_placeholder_is_found():
    row = "| peaked | steer_topk, 8 tokens | 513,024 | {} |\n"
    assert leftovers(row.format("535,768 | 1,792 | 1.048")) == []
    for planted in ("TOPKP", "TBD", "FIG1", "MU_A"):
        assert set(leftovers(row.format(planted))) == {planted}
    for planted in ("It takes TOPKF us.", "- TODO: measure", "mu is ??? here", "it takes @@us@@"):
        assert leftovers(planted), planted
    assert leftovers("A `TOPKP` in code, an NVIDIA GPU, LoRA, an FP32 sum.") == []


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as the site makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(path), f"{page.name} links to {target}"


def missing_paths(text: str) -> list[str]:
    """Paths of this repository that a text names and that do not exist."""
    found = re.findall(rf"(?<![\w/.-])((?:{'|'.join(FOLDERS)})/[\w/.-]*\w(?:\.\w+)?)", text)
    # NAME is what a contributor fills in; results and builds are not in the repository.
    return [name for name in found if "NAME" not in name and not (ROOT / name.rstrip("/.")).exists()]


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "csrc" / "README.md"], ids=lambda path: f"{path.parent.name}-{path.name}"
)
def test_paths_exist(page):
    assert missing_paths(page.read_text()) == []


def test_paths_in_comments_and_docstrings_exist():
    sources = [path for folder in ("svdecode", "kernels", "csrc") for path in (ROOT / folder).rglob("*.*")]
    texts = {path: path.read_text() for path in sources if path.suffix in (".py", ".h", ".cpp", ".cu", ".inc")}
    assert {path.name: wrong for path, text in texts.items() if (wrong := missing_paths(text))} == {}


def test_a_wrong_path_is_found():
    assert missing_paths("see `svdecode/steered_model.py` and bench/cpu.py") == ["svdecode/steered_model.py"]


def test_every_public_name_is_in_the_reference_and_every_page_in_the_navigation():
    import svdecode

    api, navigation = (ROOT / "docs" / "api.md").read_text(), (ROOT / "mkdocs.yml").read_text()
    for name in svdecode.__all__:
        assert name.startswith("_") or f"::: svdecode.{name}\n" in api, name
    for page in (ROOT / "docs").glob("*.md"):
        assert f": {page.name}\n" in navigation, page


def test_the_traffic_table_is_whole():
    """Every operator on both kinds of rows, six columns each; test_traffic.py compares the figures."""
    lines = traffic_table.written(traffic_table.PAGE.read_text()).splitlines()
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith(("| peaked", "| flat"))
    ]
    for kind in ("peaked", "flat"):
        of_kind = [row[1] for row in cells if row[0] == kind]
        assert all(any(name.startswith(operator) for name in of_kind) for operator in OPERATORS), kind
    for row in cells:
        minimum, loaded, stored = (int(cell.replace(",", "")) for cell in row[2:5])
        assert f"{(loaded + stored) / minimum:.3f}" == row[5], row


def test_the_blocks_of_the_quickstart_run(tmp_path, capsys):
    """One after another in one namespace, as a reader would type them, with a tiny model in place of the one on the hub."""
    from peft import LoraConfig, get_peft_model
    from test_demo import WORDS
    from tiny import randomise, tiny_llama
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "quickstart.md").read_text(), re.DOTALL)
    words = [*WORDS, *["2", "+", "=", "4", "3", "7", "5"]]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")
    fast.save_pretrained(tmp_path / "model")
    base = tiny_llama(vocabulary=len(words))
    base.lm_head.weight.data *= 0.05  # nearly flat: the completions are in the kept set
    base.save_pretrained(tmp_path / "model")
    adapter = get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"]))
    randomise(adapter, scale=0.1)
    adapter.save_pretrained(tmp_path / "my-lora")
    space: dict = {}
    for block in blocks:
        block = block.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(tmp_path / "model"))
        exec(compile(block.replace("my-lora", str(tmp_path / "my-lora")), "quickstart.md", "exec"), space)
    assert space["steered"].mode == "paired"
    assert space["nll"].shape == (8, 2)
    assert "Calibration(mu=" in capsys.readouterr().out


def test_cpp_sources_are_formatted():
    tool = shutil.which("clang-format", path=str(Path(sys.executable).parent)) or shutil.which("clang-format")
    if tool is None:
        pytest.skip("clang-format is not installed")
    pinned = re.search(r"^clang-format==(.*)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)[1]
    if pinned not in subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout:
        pytest.skip("another version of clang-format")
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".inc")]
    done = subprocess.run(
        [tool, "--dry-run", "-Werror", *map(str, sources)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
