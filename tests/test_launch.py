"""The remembered launch of a Triton kernel passes on what Triton's own does, seen on a driver that starts nothing."""

from __future__ import annotations

import gc
import random
import sys
import threading
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from stub_driver import StubDriver
from triton import knobs
from triton import language as tl
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction

import svdecode.kernels  # noqa: F401
from svdecode.kernels import launch as remembered
from svdecode.kernels.launch import launch

X, Y = torch.zeros(64), torch.zeros(64)
CONSTANTS = {"KEEP": True, "BLOCK": 16, "num_warps": 1}
PLAIN = (X, Y, 0.5, 40, ((2, 3), (48, 5)))


def body(x_ptr, y_ptr, number, count, layout, KEEP: tl.constexpr, BLOCK: tl.constexpr):
    sizes, strides = layout
    index = tl.arange(0, BLOCK)
    value = number + sizes[0] * strides[0] + sizes[1] * strides[1]
    if x_ptr is not None and KEEP:
        value += tl.load(x_ptr + index).to(tl.float32)
    tl.store(y_ptr + index, value, mask=index < count)


def with_argument(place: int, value) -> tuple:
    return (*PLAIN[:place], value, *PLAIN[place + 1 :])


CASES = [
    *(
        ((3,), with_argument(0, X.to(dtype)), {})
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64)
    ),
    *(((3,), with_argument(place, X[1:]), {}) for place in (0, 1)),
    *(((3,), (X[1:], Y[3:], *PLAIN[2:]), {}), ((3,), with_argument(0, None), {})),
    *(((3,), with_argument(2, number), {}) for number in (1, 7, 32, True, -1.5)),
    *(((3,), with_argument(3, count), {}) for count in (0, 1, 16, 17, -16, 2**31 - 1, 2**31, 2**31 + 1, 2**40 + 16)),
    *(((3,), with_argument(4, ((1, rows), (stride, 5))), {}) for rows in (1, 8) for stride in (0, 17, 2**31 + 16)),
    *(((3,), PLAIN, change) for change in ({"KEEP": False}, {"BLOCK": 32}, {"num_warps": 4}, {"maxnreg": 64})),
    ((3,), PLAIN, {"enable_fp_fusion": False}),
    *((grid, PLAIN, {}) for grid in ((1,), (3, 5), (3, 5, 2))),
]


@pytest.fixture
def stub(monkeypatch):
    """The driver of this test, which notes launches; nothing of other tests is remembered."""
    driver = StubDriver()
    driver.launches = []
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(remembered, "_FORMS", {})
    return driver


@pytest.fixture
def through_triton(monkeypatch):
    """Counts the launches that Triton prepares itself."""
    calls = []
    run = JITFunction.run
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **rest: calls.append(self) or run(self, *args, **rest))
    return calls


def start(kernel, case) -> None:
    grid, arguments, changes = case
    launch(kernel, grid, arguments, CONSTANTS | changes)


def seen(found) -> tuple:
    """What a launch says, with tensors by identity and the variant by the hash of what it was compiled from."""
    arguments = [id(x) if isinstance(x, torch.Tensor) else x for x in found.arguments]
    return found.metadata.hash, found.grid, found.stream, arguments


def test_the_same_reaches_the_launcher_as_by_tritons_own_way(stub, through_triton):
    kernel, own = JITFunction(body), JITFunction(body)
    for grid, arguments, changes in CASES:
        own[grid](*arguments, **(CONSTANTS | changes))
    expected = [seen(found) for found in stub.launches]
    assert len({str(what) for what in expected}) >= len(CASES) - 1  # the cases differ
    for case in CASES:
        start(kernel, case)
    stub.launches.clear()
    through_triton.clear()
    order = random.Random(0).sample(range(len(CASES)), len(CASES))
    for i in order:
        start(kernel, CASES[i])
    assert not through_triton
    assert [seen(found) for found in stub.launches] == [expected[i] for i in order]


def test_numbers_that_the_kernel_does_not_specialise(stub, through_triton):
    kernel = JITFunction(body, do_not_specialize=["count"])
    for count in (1, 16, 17):
        start(kernel, ((3,), with_argument(3, count), {}))
    assert len(through_triton) == 1
    assert [found.arguments[3] for found in stub.launches] == [1, 16, 17]
    assert {found.source.signature["count"] for found in stub.launches} == {"i32"}
    start(kernel, ((3,), with_argument(3, 2**31), {}))
    assert stub.launches[-1].source.signature["count"] == "i64"


def test_the_stream_and_the_device_of_the_moment(stub, through_triton):
    kernel = JITFunction(body)
    for device in (0, 1):
        stub.current.device = device
        for stream in (0, 7):
            stub.current.stream = stream
            start(kernel, ((3,), PLAIN, {}))
            assert stub.launches[-1].stream == stream
        assert len(through_triton) == device + 1  # a kernel is loaded on each device of its own
    first, second = (found.compiled for form in remembered._FORMS.values() for found in form.compiled.values())
    assert first is not second


def copied(x_ptr, y_ptr, number, count, layout, KEEP: tl.constexpr, BLOCK: tl.constexpr):
    tl.store(y_ptr + tl.arange(0, BLOCK), number)


def test_two_kernels_of_one_form(stub):
    kernels = [JITFunction(body), JITFunction(copied)]
    for _ in range(2):
        for kernel in kernels:
            start(kernel, ((3,), PLAIN, {}))
            assert stub.launches[-1].source.fn is kernel


def test_another_driver_finds_nothing_of_the_first(stub, through_triton, monkeypatch):
    kernel = JITFunction(body)
    start(kernel, ((3,), PLAIN, {}))
    other = StubDriver()
    other.launches = []
    monkeypatch.setattr(triton.runtime.driver, "_active", other)
    kernel.device_caches.clear()  # Triton itself does not tell drivers apart
    for _ in range(2):
        start(kernel, ((3,), PLAIN, {}))
    assert len(through_triton) == 2
    assert (len(stub.launches), len(other.launches)) == (1, 2)


def test_a_kernel_that_triton_forgets_stays_loaded(stub, monkeypatch):
    unloaded = []
    monkeypatch.setattr(stub, "load_binary", lambda *_: (1, 1, 64, 0, 1024))
    monkeypatch.setattr(stub, "unload_module", unloaded.append, raising=False)
    kernel = JITFunction(body)
    start(kernel, ((3,), PLAIN, {}))
    kernel.device_caches.clear()
    gc.collect()
    start(kernel, ((3,), PLAIN, {}))
    assert len(stub.launches) == 2
    assert not unloaded
    remembered._FORMS.clear()
    gc.collect()
    assert unloaded or not hasattr(CompiledKernel, "__del__")


def test_two_threads(stub):
    kernel = JITFunction(body)
    together = threading.Barrier(2)
    failures = []

    def work(number: int) -> None:
        try:
            stub.current.stream = number
            own = [((number,), with_argument(3, count), {}) for count in range(16 * number, 16 * number + 3)]
            together.wait()
            for i in range(300):
                start(kernel, own[i % 3])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(stub.launches) == 600
    for found in stub.launches:
        count = found.arguments[3]
        assert (count // 16,) * 2 == (found.stream, found.grid[0])
        assert ("divisibility" in str(found.source.attrs.get((3,)))) == (count % 16 == 0)


def test_hooks_see_every_launch(stub, through_triton):
    kernel = JITFunction(body)
    case = ((3,), PLAIN, {})
    start(kernel, case)
    told = []
    for hook in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        through_triton.clear()
        hook.add(told.append)
        try:
            start(kernel, case)
        finally:
            hook.remove(told.append)
        assert len(through_triton) == 1
    kernel.add_pre_run_hook(lambda *args, **rest: told.append(args))
    start(kernel, case)
    assert told == [PLAIN]


@pytest.mark.parametrize("name", ["_REDUCES", "_STARTS"])
def test_a_triton_that_works_in_another_way_keeps_its_own_launch(stub, through_triton, monkeypatch, name):
    monkeypatch.setattr(remembered, name, "something else")
    remembered._is_known_triton.cache_clear()
    kernel = JITFunction(body)
    try:
        for _ in range(3):
            start(kernel, ((3,), PLAIN, {}))
    finally:
        remembered._is_known_triton.cache_clear()
    assert len(through_triton) == len(stub.launches) == 3


def annotated(y_ptr, count: tl.int64, BLOCK: tl.constexpr):
    tl.store(y_ptr + tl.arange(0, BLOCK), count)


def constexpr_between(y_ptr, BLOCK: tl.constexpr, count=3):
    tl.store(y_ptr + tl.arange(0, BLOCK), count)


@pytest.mark.parametrize(
    ("function", "arguments", "constants"),
    [
        (annotated, (Y, 3), {"BLOCK": 16}),
        (constexpr_between, (Y, 16), {}),
        (body, PLAIN[:3], dict(count=3, layout=PLAIN[4])),
    ],
)
def test_a_kernel_of_another_form_is_left_to_triton(stub, through_triton, function, arguments, constants):
    kernel = JITFunction(function)
    constants = (CONSTANTS if function is body else {}) | constants
    for _ in range(2):
        launch(kernel, (1,), arguments, constants)
    assert len(through_triton) == len(stub.launches) == 2


def test_an_interpreted_kernel_asks_for_no_driver(monkeypatch):
    monkeypatch.setattr(triton.runtime.driver, "_active", None)
    monkeypatch.setattr(triton.runtime.driver, "_default", None)
    calls = []

    class Interpreted:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: calls.append((grid, arguments, constants))

    launch(Interpreted(), (3,), PLAIN, CONSTANTS)
    assert calls == [((3,), PLAIN, CONSTANTS)]
    assert triton.runtime.driver._active is None
