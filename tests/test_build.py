"""How the compiled operators are built and installed, and what holds where they cannot be."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SOURCES = ["svdecode", "kernels", "csrc", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of the sources, without what was built in place."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def run(*command: object, cwd: Path, **environment: str) -> str:
    found = subprocess.run(
        list(map(str, command)), cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600
    )
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    return found.stdout + found.stderr


def imported_from(folder: Path, code: str, tmp_path: Path, **environment: str) -> str:
    """What code prints with svdecode imported from a folder, which comes before this checkout."""
    head = f"import sys; sys.path.insert(0, {str(folder)!r}); import torch, svdecode; print(svdecode.__file__)\n"
    text = run(sys.executable, "-c", head + code, cwd=tmp_path, **environment)
    assert str(folder) in text
    return text


PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
REPORT = """
x = torch.randn(2, 300)
print({name: found for name, found in svdecode.backends().items()})
print(svdecode.fused_steer(x, x + torch.randn(2, 300), 0.5).logprobs.exp().sum(-1).round().tolist())
"""


def test_without_a_compiler_it_installs_and_works(checkout, tmp_path):
    target = tmp_path / "installed"
    install = (*PIP, "install", "-v", "--no-deps", "--no-build-isolation", "--target", target, checkout)
    text = run(*install, cwd=tmp_path, PATH=str(tmp_path), CXX="")
    assert "without the compiled operators: there was no C++ compiler" in text
    assert not list(target.rglob("*.so"))
    text = imported_from(target, REPORT, tmp_path, SVDECODE_CUDA_EMULATION="")
    assert "svdecode is here without its compiled operators: there was no C++ compiler" in text
    assert "[1.0, 1.0]" in text


def test_a_wrong_wish_is_refused(checkout, tmp_path):
    found = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=checkout, env={**os.environ, "SVDECODE_BUILD": "foo"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode
    assert "SVDECODE_BUILD must be none, cpu or cuda, or left out, got 'foo'" in found.stderr


def test_nothing_of_an_earlier_build_gets_into_a_wheel(checkout, tmp_path):
    """A module that is deleted between two builds, and the wish for another build, are heeded."""
    gone = checkout / "svdecode" / "gone.py"
    gone.write_text("")
    wheel = (*PIP, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w")
    run(*wheel, tmp_path / "first", checkout, cwd=tmp_path, SVDECODE_BUILD="none")
    gone.unlink()
    run(*wheel, tmp_path / "second", checkout, cwd=tmp_path, SVDECODE_BUILD="none")
    names = [zipfile.ZipFile(next((tmp_path / which).glob("*.whl"))).namelist() for which in ("first", "second")]
    assert ["svdecode/gone.py" in found for found in names] == [True, False]
    assert "svdecode/kernels/row_algebra.py" in names[1]
    assert {"svdecode/explanation/page.css", "svdecode/explanation/page.js"} <= set(names[1])
    reason = zipfile.ZipFile(next((tmp_path / "second").glob("*.whl"))).read("svdecode/ops/not_compiled.txt")
    assert reason == b"SVDECODE_BUILD=none"
    assert not (checkout / "build").exists()


@needs_compiler
def test_in_the_root_of_a_clone_the_installed_operators_are_found(checkout, tmp_path):
    """The folder svdecode/ there hides the installed package; its operators, of the same sources, are used all the same."""
    target = tmp_path / "installed"
    run(*PIP, "install", "-q", "--no-deps", "--no-build-isolation", "--target", target, checkout, cwd=tmp_path)
    code = "import torch, svdecode, svdecode.kernels; print(svdecode.__file__, svdecode.kernels.__file__)" + REPORT
    found = {"PYTHONPATH": str(target), "SVDECODE_CUDA_EMULATION": ""}
    text = run(sys.executable, "-c", code, cwd=checkout, **found)
    assert f"{checkout / 'svdecode' / '__init__.py'} {checkout / 'kernels' / '__init__.py'}" in text
    assert "'cpu': Backend(available=True" in text
    (checkout / "csrc" / "maths.h").write_text("// another version\n")
    text = run(sys.executable, "-c", code, cwd=checkout, **found)
    assert "built from other sources than those in this folder" in text
    assert "[1.0, 1.0]" in text


@needs_compiler
def test_a_wheel_from_the_source_distribution_holds_the_operators(checkout, tmp_path):
    run(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", tmp_path, cwd=checkout)
    (archive,) = tmp_path.glob("svdecode-*.tar.gz")
    run(*PIP, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, archive, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    assert "-cp310-abi3-" in wheel.name  # one for all Python versions, and by the stable ABI for all torch versions
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "wheel")
    for name in ("page.css", "page.js"):
        found = tmp_path / "wheel" / "svdecode" / "explanation" / name
        assert found.read_text() == (ROOT / "svdecode" / "explanation" / name).read_text()
    text = imported_from(tmp_path / "wheel", REPORT, tmp_path, SVDECODE_CUDA_EMULATION="")
    assert "'cpu': Backend(available=True, reason='C++, " in text
    assert "[1.0, 1.0]" in text


@needs_compiler
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_the_cuda_build_links_and_registers_without_a_gpu(checkout, tmp_path):
    """For sm_80, 90, 100 and 120 and as PTX, without a spilled byte, on at most 80 registers: three blocks per processor."""
    built = ("--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "objects")
    text = run(
        *(sys.executable, "setup.py", "-q", "build_ext", *built),
        cwd=checkout,
        SVDECODE_BUILD="cuda",
        NVCC_APPEND_FLAGS="-Xptxas -v",
    )
    kernels = re.findall(r"Compiling entry function '\w*?(\w+_kernel)\w*' for 'sm_(\d+)'", text)
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", text)]
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    assert {architecture for _, architecture in kernels} == {"80", "90", "100", "120"}
    assert len(registers) == len(spills) == len(kernels) == 4 * 7 * 4
    assert set(spills) == {("0", "0")}
    assert max(registers) <= 80
    (library,) = (tmp_path / "lib").rglob("*.so")
    code = "found = svdecode.backends()['cuda']; print(torch.ops.svdecode_compiled.has_cuda(), found)" + REPORT
    text = run(
        *(sys.executable, "-c", "import torch, svdecode; " + code),
        cwd=tmp_path,
        SVDECODE_LIBRARY=str(library),
        SVDECODE_CUDA_EMULATION="",
    )
    assert "True Backend(" in text
    assert torch.cuda.is_available() or "torch sees no GPU" in text
    assert "[1.0, 1.0]" in text


@needs_compiler
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="preloads the sanitizers of gcc on Linux")
def test_address_and_undefined_behaviour_sanitizers(checkout, tmp_path):
    """The C++ cases on a build that stops at the first bad access or undefined operation."""
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -O1 -fno-omit-frame-pointer"
    built = ("--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "objects")
    run(
        *(sys.executable, "setup.py", "-q", "build_ext", *built),
        cwd=checkout,
        SVDECODE_BUILD="cpu",
        CFLAGS=flags,
        CXXFLAGS=flags,
        LDFLAGS="-fsanitize=address,undefined",
    )
    (library,) = (tmp_path / "lib").rglob("*.so")
    assert b"__asan_report" in library.read_bytes()
    runtimes = [
        subprocess.run(["g++", f"-print-file-name=lib{name}.so"], capture_output=True, text=True).stdout.strip()
        for name in ("asan", "ubsan")
    ]
    files = [
        "fused_steer",
        "optimal_strength",
        "steered_nll",
        "steering_vector",
        "steer_sample",
        "steer_topk",
        "backward",
        "compiled",
    ]
    text = run(
        *(sys.executable, "-m", "pytest", "-q", "-x", "-k", "cpu and not any_number_of_threads"),
        *(f"test_{name}.py" for name in files),
        cwd=ROOT / "tests",
        SVDECODE_LIBRARY=str(library),
        SVDECODE_CUDA_EMULATION="",
        LD_PRELOAD=" ".join(runtimes),
        ASAN_OPTIONS="detect_leaks=0:verify_asan_link_order=0",
        TRITON_INTERPRET="0",
        PYTEST_XDIST_WORKER="",
    )
    assert re.search(r"\d{3} passed|\[100%\]", text)
