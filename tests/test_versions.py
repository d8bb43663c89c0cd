"""What is said of versions that nobody has tested."""

from __future__ import annotations

import warnings

import pytest
from tiny import tiny_lora

import svdecode
from svdecode.common import versions


def test_versions_outside_the_range_are_named():
    newest = ".".join(map(str, versions.TESTED["transformers"][1]))
    assert versions.untested({"transformers": f"{newest}.3", "peft": None, "torch": "2.13.0+cpu"}) == []
    (sentence,) = versions.untested({"transformers": "6.0.0.dev1", "peft": "0.21.2"})
    assert "transformers 6.0.0.dev1" in sentence
    assert newest in sentence
    assert len(versions.untested({"transformers": "5.16.2", "peft": "0.18.0", "torch": "2.10.0"})) == 3


def test_the_first_steer_says_so_and_the_second_does_not(monkeypatch):
    monkeypatch.setattr(versions, "installed", lambda: {"peft": "7.0.0"})
    versions.warn_untested.cache_clear()
    model = tiny_lora()
    with pytest.warns(UserWarning, match=r"peft 7\.0\.0"):
        svdecode.steer(model, mu=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svdecode.steer(model, mu=0.5)
    versions.warn_untested.cache_clear()
