"""Starts a Triton kernel; from its second launch on without Triton's own preparation of a launch.

`kernel[grid](...)` compares all constants of our modules that a kernel uses (80 of them) at each launch, builds the text of
its options, and looks for what it compiled under a key of strings. That is more than half of the time of a small call. `launch`
lets Triton do it once for each variant of a kernel, remembers the compiled kernel, and then calls its own launcher.

The key consists of what Triton compiles a variant for: its own `native_specialize_impl` reduces each argument to a type and a
class (the alignment of a pointer; an int that is 1, divisible by 16, or wider than 32 bits). The constants, the kernel, the
driver and the current device complete it. The constants of our modules are not in it: nothing changes them after import.

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
from itertools import repeat

from triton import knobs
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
    variants = _VARIANTS.get((id(kernel), active, device))
    if variants is None:
        variants = _VARIANTS[id(kernel), active, device] = _Variants(kernel, active)
    if len(arguments) != variants.num_arguments or _is_watched(kernel):
        kernel[grid](*arguments, **constants)
        return
    classes = tuple(map(variants.reduce, variants.backend, arguments, *variants.flags))
    key = (classes, *constants, *constants.values())
    remembered = variants.remembered.get(key)
    if remembered is None:
        compiled = kernel[grid](*arguments, **constants)
        if isinstance(compiled, CompiledKernel):
            variants.remembered[key] = _Remembered(compiled, variants.constexprs(constants))
        return
    x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
    stream = active.get_current_stream(device)
    remembered.run(
        x, y, z, stream, remembered.function, remembered.metadata, None, None, None, *arguments, *remembered.constants
    )


class _Remembered:
    """A compiled kernel and what each of its launches passes on."""

    __slots__ = ("compiled", "constants", "function", "metadata", "run")

    def __init__(self, compiled: CompiledKernel, constants: tuple) -> None:
        self.compiled = compiled  # some versions unload the code of a kernel that nothing refers to
        self.run, self.function, self.metadata = compiled.run, compiled.function, compiled.packed_metadata
        self.constants = constants


class _Variants:
    """The remembered variants of one kernel on one device of one driver."""

    def __init__(self, kernel: JITFunction, active) -> None:
        self.kernel = kernel  # the table knows it by its id, which must not become another's
        self.remembered: dict[tuple, _Remembered] = {}
        parameters = [p for p in kernel.params if not p.is_constexpr]
        self._constexprs = kernel.params[len(parameters) :]
        takes = [p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in kernel.signature.parameters.values()]
        in_order = kernel.params[: len(parameters)] == parameters
        if not (_is_known_triton() and in_order and all(takes)) or any(p.annotation_type for p in parameters):
            self.num_arguments = None  # no call has so many: each goes through Triton
            return
        self.num_arguments = len(parameters)
        self.reduce = jit.native_specialize_impl
        self.backend = repeat(make_backend(active.get_current_target()))
        self.flags = (
            tuple(p.is_const for p in parameters),
            tuple(not p.do_not_specialize for p in parameters),
            tuple(not p.do_not_specialize_on_alignment for p in parameters),
        )

    def constexprs(self, constants: dict[str, object]) -> tuple:
        """The constexpr parameters in the kernel's order."""
        return tuple(constants.get(p.name, p.default) for p in self._constexprs)


_VARIANTS: dict[tuple, _Variants] = {}


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
