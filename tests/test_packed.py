"""Compressed files and tables of Parquet and Arrow give the rows of the plain file; damaged ones say what is wrong."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import sys
import zipfile

import pytest

from svdecode.data.examples import read_examples
from svdecode.data.sources import read_rows

ROWS = [{"prompt": f"p{i}", "completion": f"c{i} \u2028 é"} for i in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
CSV = b"prompt,completion\na,b\n"
MESSAGES = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"messages": [{"role": "assistant", "content": "c", "name": "d"}]},
]


def only_texts(value: object) -> str:
    """Names a test's parameter; the bytes of gzip hold the time, and two processes would collect different names."""
    return value if isinstance(value, str) else ""


def zipped(files: dict[str, bytes]) -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return memory.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl.gz", gzip.compress(LINES), ROWS),
        ("a.ndjson.bz2", bz2.compress(LINES), ROWS),
        ("a.JSONL.XZ", lzma.compress(LINES), ROWS),
        ("a.jsonl", gzip.compress(LINES), ROWS),  # whatever its name is
        ("a.json.gz", gzip.compress(json.dumps(ROWS).encode()), ROWS),
        ("a.csv.gz", gzip.compress(CSV), [{"prompt": "a", "completion": "b"}]),
        ("a.tsv.xz", lzma.compress(CSV.replace(b",", b"\t")), [{"prompt": "a", "completion": "b"}]),
        ("a.zip", zipped({"folder/rows.jsonl": LINES, "__MACOSX/._rows.jsonl": b"x"}), ROWS),
    ],
    ids=only_texts,
)
def test_compressed_files_are_read_as_plain_ones(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    assert read_rows(tmp_path / name) == read_examples(tmp_path / name) == expected


def test_tables_of_parquet_and_arrow(tmp_path):
    datasets = pytest.importorskip("datasets")
    feather = pytest.importorskip("pyarrow.feather")
    rows = datasets.Dataset.from_list(ROWS)
    rows.to_parquet(tmp_path / "a.parquet")
    feather.write_feather(rows.data.table, tmp_path / "a.feather")
    rows.save_to_disk(tmp_path / "saved")
    (stream,) = (tmp_path / "saved").glob("*.arrow")
    for path in (tmp_path / "a.parquet", tmp_path / "a.feather", stream):
        assert read_rows(path) == read_examples(path) == ROWS
    datasets.Dataset.from_list(MESSAGES).to_parquet(tmp_path / "chat.parquet")
    found = read_examples(tmp_path / "chat.parquet")
    assert found[0] == {"prompt": MESSAGES[0]["messages"][:1], "completion": MESSAGES[0]["messages"][1:]}
    assert found[1]["completion"] == MESSAGES[1]["messages"]  # the first rows' missing names are no names
    assert found[1].place == f"{tmp_path / 'chat.parquet'}, row 2"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl.gz", gzip.compress(LINES)[:-12], "a.jsonl.gz cannot be unpacked, it is a damaged gzip file"),
        ("a.jsonl.bz2", bz2.compress(LINES)[:20], "damaged bzip2 file"),
        ("a.jsonl.xz", lzma.compress(LINES)[:-9], "damaged xz file"),
        ("a.jsonl.gz", gzip.compress(LINES + b"{"), "a.jsonl.gz, line 4: not JSON"),
        ("a.csv.gz", gzip.compress(CSV + b"c\n"), "a.csv.gz, line 3: 1 cells under 2 columns"),
        ("a.zip", zipped({"a.jsonl": LINES})[:-30], "damaged or protected zip file"),
        ("a.zip", zipped({"a.jsonl": LINES, "b.jsonl": LINES}), "a zip archive of 2 files: name one of them, unpacked"),
        ("a.xlsx", zipped({"[Content_Types].xml": b"x", "xl/a.xml": b"x"}), "an Excel file, .*save the sheet as CSV"),
        ("a.parquet", b"PAR1\x15\x04", "a.parquet cannot be read, it is a damaged Parquet file"),
    ],
    ids=only_texts,
)  # fmt: skip
def test_damaged_files_are_one_line(tmp_path, name, content, words):
    if name == "a.parquet":
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    for read in (read_rows, read_examples):
        with pytest.raises(ValueError, match=words) as error:
            read(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "start", "missing", "words"),
    [
        ("a.parquet", b"PAR1", ["pyarrow"], r"a Parquet file, .*\[train\].*pandas\.read_parquet\('.*a\.parquet'\)\.to_js"),
        ("a.zst", b"\x28\xb5\x2f\xfd", ["zstandard", "compression.zstd", "backports.zstd"], "a Zstandard file, .*unzstd .*st"),
    ],
)  # fmt: skip
def test_without_a_package_the_message_says_what_to_do(tmp_path, monkeypatch, name, start, missing, words):
    (tmp_path / name).write_bytes(start)
    for package in missing:
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=words):
        read_rows(tmp_path / name)
