"""Put the Python blocks of the README and of the quickstart into .typing/, where pyright reads them (`make lint`)."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/quickstart.md", "docs/recipes.md")
PRELUDE = '''"""The blocks of {page}, one after another; above them what the page takes for granted."""

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

model: PeftModel
expert: PreTrainedModel
amateur: PreTrainedModel
large: PreTrainedModel
tuned: PreTrainedModel
small: PreTrainedModel
tokenizer: PreTrainedTokenizerBase
logits_pre: torch.Tensor
logits_ft: torch.Tensor
labels: torch.Tensor
mus: torch.Tensor

'''


def blocks(page: Path) -> list[str]:
    """The Python blocks of a page."""
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def main() -> None:
    """Write one file for each page that is there."""
    folder = ROOT / ".typing"
    folder.mkdir(exist_ok=True)
    for name in PAGES:
        if (ROOT / name).is_file():
            text = PRELUDE.replace("{page}", name) + "\n".join(blocks(ROOT / name))
            (folder / f"{Path(name).stem.lower()}_blocks.py").write_text(text)


if __name__ == "__main__":
    main()
