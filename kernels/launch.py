"""Starts a Triton kernel; from its second launch on without Triton's own preparation of a launch.

`kernel[grid](...)` compares all constants of our modules that a kernel uses (80 of them) at each launch, builds the text of
its options, and looks for what it compiled under a key of strings. That is more than half of the time of a small call. `launch`
lets Triton do it once for each variant of a kernel, remembers the compiled kernel, and then calls its own launcher.

The key consists of what Triton compiles a variant for: the kernel, its constants, the driver, the current device, the type of
each argument, the dtype of a tensor and whether its memory begins at a multiple of 16 bytes, and what Triton's own
`native_specialize_impl` makes of an int (it is 1, divisible by 16, or wider than 32 bits). The constants of our modules are not
in it: nothing changes them after import.

Where anything looks on (a profiler's hooks, a debug mode), where kernels are interpreted, and where a version of Triton starts
a kernel in another way than the ones known here, every launch is Triton's own.

- Threads: no lock is needed, since reading and writing a dictionary is atomic. Two threads that miss at once both go through
  Triton, which gives each a compiled kernel, and whichever entry stays is right.
- Streams: the current stream of the device is read at each launch.
- CUDA graphs: a remembered launch allocates nothing and waits for nothing, so it is captured as Triton's is.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from itertools import repeat
from operator import itemgetter

from torch import Tensor
from triton import knobs
from triton.backends.compiler import BaseBackend
from triton.compiler import CompiledKernel, make_backend
from triton.runtime import JITFunction, driver, jit

# How triton 3.6 to 3.9 reduce an argument, and how they start a compiled kernel, in their own words without blanks.
_REDUCES = "specialize_impl(backend,{name},{is_const},{specialize},{align})"
_STARTS = (
    "kernel.run(grid_0,grid_1,grid_2,stream,kernel.function,kernel.packed_metadata,launch_metadata,"
    "knobs.runtime.launch_enter_hook,knobs.runtime.launch_exit_hook,*bound_args.values())"
)
_RUNTIME_KNOBS = ("launch_enter_hook", "launch_exit_hook", "add_stages_inspection_hook", "debug")


def launch(kernel, grid: tuple[int, ...], arguments: tuple, constants: dict[str, object]) -> None:
    """Start a kernel on the current device and its current stream: `kernel[grid](*arguments, **constants)`, remembered.

    Args:
        kernel: a function under `@triton.jit` whose constexpr parameters are its last.
        grid: number of programs in one, two or three dimensions.
        arguments: all others in their order: tensors, numbers, None, nested tuples of ints.
        constants: the constexpr parameters by name and options such as num_warps; hashable values.
    """
    if type(kernel) is not JITFunction:  # an interpreted kernel
        kernel[grid](*arguments, **constants)
        return
    active = driver.active
    device = active.get_current_device()
    place = (id(kernel), active, device, *map(type, arguments))
    form = _FORMS.get(place)
    if form is None:
        form = _FORMS[place] = _Form(kernel, active, arguments)
    if not form.is_known or _is_watched(kernel):
        kernel[grid](*arguments, **constants)
        return
    key = (*form.classes(arguments), *constants, *constants.values())
    found = form.compiled.get(key)
    if found is None:
        compiled = kernel[grid](*arguments, **constants)
        if isinstance(compiled, CompiledKernel):
            form.compiled[key] = _Compiled(compiled, form.in_order(constants))
        return
    x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
    stream = active.get_current_stream(device)
    found.run(x, y, z, stream, found.function, found.metadata, None, None, None, *arguments, *found.constants)


class _Compiled:
    """A compiled kernel and what each of its launches passes on."""

    __slots__ = ("compiled", "constants", "function", "metadata", "run")

    def __init__(self, compiled: CompiledKernel, constants: tuple) -> None:
        self.compiled = compiled  # some versions unload the code of a kernel that nothing refers to
        self.run, self.function, self.metadata = compiled.run, compiled.function, compiled.packed_metadata
        self.constants = constants


class _Form:
    """What is remembered of one kernel, on one device of one driver, for arguments of certain types."""

    def __init__(self, kernel: JITFunction, active, arguments: tuple) -> None:
        self.kernel = kernel  # the table knows it by its id, which must not become another's
        self.compiled: dict[tuple, _Compiled] = {}
        parameters = [p for p in kernel.params if not p.is_constexpr]
        self._constexprs = kernel.params[len(parameters) :]
        backend = make_backend(active.get_current_target())
        tensors = [i for i, x in enumerate(arguments) if isinstance(x, Tensor)]
        numbers = [i for i, x in enumerate(arguments) if type(x) in (int, tuple)]
        others = sum(x is None or type(x) in (float, bool) for x in arguments)  # all is told by their type
        self.is_known = (
            _is_known_triton()
            and type(backend).get_tensor_specialization is BaseBackend.get_tensor_specialization
            and all(p.kind is p.POSITIONAL_OR_KEYWORD for p in kernel.signature.parameters.values())
            and kernel.params[: len(parameters)] == parameters
            and not any(p.annotation_type for p in parameters)
            and len(parameters) == len(arguments) == len(tensors) + len(numbers) + others
        )
        self._tensors, self._numbers = _items(tensors), _items(numbers)
        parameters = self._numbers(parameters) if self.is_known else ()
        flags = (
            tuple(p.is_const for p in parameters),
            tuple(not p.do_not_specialize for p in parameters),
            tuple(not p.do_not_specialize_on_alignment for p in parameters),
        )

        @functools.lru_cache(maxsize=1024)
        def classes_of_numbers(*values: int | tuple) -> tuple:
            return tuple(map(jit.native_specialize_impl, repeat(backend), values, *flags))

        self._classes_of_numbers = classes_of_numbers

    def classes(self, arguments: tuple) -> tuple:
        """What Triton may compile differently for, beyond the types of the arguments and the constants."""
        tensors = self._tensors(arguments)
        dtypes, pointers = [], 0
        for x in tensors:
            dtypes.append(x.dtype)
            pointers |= x.data_ptr()
        # That all are aligned is the rule, and quicker to see from all bits together.
        aligned = pointers % 16 == 0 or tuple([x.data_ptr() % 16 == 0 for x in tensors])
        return (aligned, self._classes_of_numbers(*self._numbers(arguments)), *dtypes)

    def in_order(self, constants: dict[str, object]) -> tuple:
        """The constexpr parameters in the kernel's order."""
        return tuple(constants.get(p.name, p.default) for p in self._constexprs)


_FORMS: dict[tuple, _Form] = {}


def _items(places: list[int]) -> Callable:
    """The function that picks these elements of a sequence, as a tuple."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda values: tuple(values[i] for i in places)


@functools.cache
def _is_known_triton() -> bool:
    """Whether this version of Triton prepares and starts a launch as `launch` does, told from its source."""
    try:
        source = "".join(inspect.getsource(jit).split())
    except OSError:
        return False
    knows = hasattr(knobs.compilation, "instrumentation_mode") and all(
        hasattr(knobs.runtime, k) for k in _RUNTIME_KNOBS
    )
    return knows and hasattr(jit, "native_specialize_impl") and _REDUCES in source and _STARTS in source


def _is_watched(kernel: JITFunction) -> bool:
    """Whether a hook, a debug mode or an instrumentation wants to see the launch or changes what is compiled."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        getattr(enter, "calls", enter)
        or getattr(leave, "calls", leave)
        or kernel.pre_run_hooks
        or runtime.debug
        or runtime.add_stages_inspection_hook
        or knobs.compilation.instrumentation_mode
    )
