"""The bundled model as a folder, which vLLM can read: its GGUF file is not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from svdecode.models.loading import BUNDLED_NAME, load_model


def bundled_folder() -> Path:
    """The folder of SmolLM2-135M-Instruct in the user's cache, written where it is missing (270 MB).

    Raises:
        ValueError: the bundled model or gguf is missing.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "svdecode"
    folder = cache / BUNDLED_NAME
    if not folder.is_dir():
        model, tokenizer = load_model()
        unfinished = cache / f".{BUNDLED_NAME}.{os.getpid()}"
        try:
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            os.replace(unfinished, folder)
        except OSError:
            if not folder.is_dir():  # else another process was quicker
                raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder
