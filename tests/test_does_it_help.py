"""bench/does_it_help.py: parts without a common prompt, and its pages and figures from results that are there."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from planted_logits import planted, planted_rows

import svdecode

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import does_it_help


def test_parts_share_no_prompt(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": f"question {i % 700} ?", "completion": f"answer {i}"} for i in range(900)]
    path.write_text("\n".join(map(json.dumps, rows)))
    parts = does_it_help.parts_of("some", str(path), None, 0)
    assert {name: len(part) for name, part in parts.items()} == does_it_help.PARTS
    prompts = [row["prompt"] for part in parts.values() for row in part]
    assert len(set(prompts)) == len(prompts)
    assert does_it_help.parts_of("some", str(path), None, 0) == parts
    path.write_text("\n".join(map(json.dumps, rows[:200])))
    with pytest.raises(ValueError, match="some has 200 prompts, too few"):
        does_it_help.parts_of("some", str(path), None, 0)


def test_pages_and_figures(tmp_path, monkeypatch, capsys):
    for name, size in (("countries", 200), ("other", 120)):
        pre, ft, labels = planted_rows(size)
        first, second, batches = planted(pre, ft, labels, 4)
        cal = svdecode.calibrate(second, batches, pretrained=first, progress=False)
        (tmp_path / name).mkdir()
        for step in (48, 12):
            values = {"coverage": cal.coverage, "mean_kl": cal.mean_kl, "table": cal.table, "do": cal.recommendation}
            (tmp_path / name / f"step-{step}.json").write_text(json.dumps(values))
    monkeypatch.setattr(sys, "argv", ["does_it_help.py", "--output", str(tmp_path)])
    does_it_help.main()
    page = (tmp_path / "results.md").read_text()
    assert page in capsys.readouterr().out
    assert (
        page.index("## countries, after 12 steps") < page.index("## countries, after 48 steps") < page.index("## other")
    )
    assert page.count("| log_ratio, whole vocabulary |") == 4
    first = page.splitlines()[2].split(" | ")
    row = next(row for row in cal.table if row["name"] == "log_ratio, whole vocabulary")
    assert first[0:2] == ["| countries", "12"]
    other = next(line for line in page.splitlines() if line.startswith("| other | 48 |"))
    assert f"{row['gain']:+.3f} [{row['interval'][0]:+.3f}, {row['interval'][1]:+.3f}]" in other
    assert list(json.loads((tmp_path / "results.json").read_text())["other"]) == ["12", "48"]
    for which in ("whole", "masked"):
        assert (tmp_path / f"does-it-help-{which}.png").read_bytes()[:4] == b"\x89PNG"


def test_what_is_refused(tmp_path, monkeypatch, capsys):
    for data, words in (([], "holds no results"), (["piqa"], "NAME=FILE")):
        monkeypatch.setattr(sys, "argv", ["does_it_help.py", "--output", str(tmp_path / "none"), *data])
        with pytest.raises(SystemExit):
            does_it_help.main()
        assert words in capsys.readouterr().err
