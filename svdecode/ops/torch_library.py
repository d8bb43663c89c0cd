"""How an operator gets under `torch.ops.svdecode`, and how a public function calls it.

`Library.impl` costs 1.3 us per call where `torch.library.custom_op` costs 7 to 10 us, hence the former. Every schema ends in
the name of the backend, which `Operator` resolves. A tensor that a call does not ask for comes back with shape (0,), since a
schema cannot return an optional tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch.autograd import forward_ad
from torch.nn import Parameter

from svdecode.constants import SAVED_FIELDS
from svdecode.ops import reference, reference_backward, validation
from svdecode.ops.backends import choose, implementation, implementation_for
from svdecode.ops.compiled import out_of_memory
from svdecode.ops.mu import as_tensor

PAIR = "Tensor logits_pre, Tensor logits_ft"
SETTINGS = "float alpha, float penalty, str direction, float eps"
NEEDS = "bool need_pre, bool need_ft"

_LIBRARY = torch.library.Library("svdecode", "DEF")


class Operator:
    """One operator of `torch.ops.svdecode`, called by the public function of its name.

    The dispatcher, with its autograd in Python, costs more than the kernel of a decode step. So a call goes through it only
    where a gradient is wanted or something looks on (`is_watched`), and otherwise straight to the backend. The kernels have no
    forward-mode derivative: where one is wanted, the reference computes an operator that has a backward.
    """

    def __init__(
        self,
        name: str,
        arguments: str,
        results: int,
        run: Callable,
        fake: Callable,
        backward: Callable | None = None,
        setup_context: Callable | None = None,
        *,
        watched: int = 2,
    ) -> None:
        """Register the operator.

        Args:
            name: under torch.ops.svdecode.
            arguments: its schema, without the backend's name, which is added.
            results: how many tensors it returns.
            run: the implementation on every device; takes the arguments and the backend's name.
            fake: gives the shapes and dtypes of the results.
            backward: of autograd.
            setup_context: keeps what `backward` needs.
            watched: how many of the first arguments may want a gradient or be something else than a plain tensor.
        """
        self.name, self.watched, self._is_differentiable = name, watched, backward is not None
        schema = f"{name}({arguments}, str backend) -> ({', '.join(['Tensor'] * results)})"
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, _guarded(run), "CompositeExplicitAutograd")
        torch.library.register_fake(f"svdecode::{name}", fake, lib=_LIBRARY)
        if backward is not None:
            torch.library.register_autograd(f"svdecode::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
        self.registered = getattr(torch.ops.svdecode, name)

    def __call__(self, backend: str | None, arguments: tuple, labels: Tensor | None = None, short: tuple = ()):
        """Call it with checked arguments, those of the schema but for a mu that may be a number.

        Args:
            backend: the public function's argument.
            arguments: logits_pre (..., V), logits_ft (..., V) and the rest.
            labels: those among the arguments, whose values are still to be checked.
            short: what the backend alone gets, behind the arguments.
        """
        logits_ft = arguments[1]
        try:
            # The level is read here: a function that says it would cost as much as the rest of this line.
            differentiated = self._is_differentiable and forward_ad._current_level >= 0
            watched = not differentiated and is_watched(arguments[: self.watched])
            if watched and not (self._is_differentiable and _is_in_func_grad()):
                return self.through_torch(backend, arguments)
            if watched or differentiated:
                choose(backend, arguments[0], logits_ft)  # as strict as ever about what was asked for
                run = getattr(reference, self.name)
            else:
                run = implementation_for(self.name, backend, arguments[0], logits_ft)
            if labels is not None:
                validation.check_label_range(labels, logits_ft.shape[-1])
            return run(*(arguments + short))
        except RuntimeError as error:
            raise self._in_words(error, logits_ft) from None

    def derivative(self, *arguments, backend: str):
        """Results of an operator that is a backward, given its own arguments.

        The kernels have no second derivative. Where autograd keeps a graph of the backward (`create_graph=True`), the reference
        computes it, through whose operations autograd goes on.
        """
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return getattr(reference_backward, self.name)(*arguments)
        return self.registered(*arguments, backend)

    def _in_words(self, error: RuntimeError, logits_ft: Tensor) -> RuntimeError:
        """What to do where a transform of torch cannot see into the operator."""
        if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
            return RuntimeError(f"{self.name} cannot be traced by torch.jit.trace: use torch.compile or torch.export")
        kind = _transform()
        if kind == "Vmap":
            return RuntimeError(
                f"{self.name} does not run under torch.func.vmap: call it on the whole batch, it takes any leading dimensions"
            )
        if kind == "Functionalize":
            return RuntimeError(
                f"{self.name} does not run under torch.func.functionalize: use torch.compile, or call it outside"
            )
        return out_of_memory(error, logits_ft)

    def through_torch(self, backend: str | None, arguments: tuple):
        """The call through torch.ops, whoever looks on."""
        if self.watched > 2:
            arguments = (*arguments[:2], as_tensor(arguments[2]), *arguments[3:])
        return self.registered(*arguments, choose(backend, arguments[0], arguments[1]))


def _guarded(run: Callable) -> Callable:
    """The same function, whose lack of memory looks like torch's own."""

    def guarded(*arguments):
        try:
            return run(*arguments)
        except RuntimeError as error:
            raise out_of_memory(error, next(x for x in arguments if isinstance(x, Tensor))) from None

    return guarded


def is_forward_mode() -> bool:
    """Whether a level of forward-mode derivatives is open, torch.func.jvp's or `forward_ad.dual_level`'s."""
    return forward_ad._current_level >= 0


def _is_in_func_grad() -> bool:
    """Whether torch.func takes a gradient: torch's Function of an operator does not go through it, plain operations do."""
    if torch.compiler.is_compiling():  # torch.compile cannot look at the transforms
        return False
    return _transform() == "Grad"


def _transform() -> str | None:
    """The innermost transform of torch.func that looks on ("Grad", "Vmap", "Functionalize", ...), None where none does."""
    transform = torch._C._functorch.peek_interpreter_stack()  # pyright: ignore[reportAttributeAccessIssue]
    return None if transform is None else transform.key().name


def is_watched(inputs: tuple) -> bool:
    """Whether a call must go through torch.ops: a gradient is wanted, or torch.compile or another mode looks on."""
    if torch.compiler.is_compiling() or _len_torch_dispatch_stack() > 0:
        return True
    wants_gradients = torch.is_grad_enabled()
    for x in inputs:
        kind = type(x)
        if kind is Tensor or kind is Parameter:
            if wants_gradients and x.requires_grad:
                return True
        elif kind is not float and isinstance(x, Tensor):  # a number needs no look at torch's classes, which is slow
            return True
    return False


def check_tensors(logits_pre: Tensor, logits_ft: Tensor, labels: Tensor | None = None, values: bool = True) -> None:
    """What could harm a kernel, for those who call torch.ops themselves, and for graphs that torch.compile has traced.

    `values` is False in a fake, whose tensors have none.
    """
    validation.check_logits(logits_pre, logits_ft)
    if labels is not None:
        validation.check_labels(labels, logits_ft)
        if values:
            validation.check_label_range(labels, logits_ft.shape[-1])


def runner(name: str) -> Callable:
    """An implementation that passes everything but the backend's name on to the backend."""

    def run(*arguments):
        *arguments, backend = arguments
        return implementation(backend, name)(*arguments)

    return run


def float_dtype(logits_pre: Tensor, logits_ft: Tensor) -> torch.dtype:
    """float64 where an input is (the reference alone takes it), else float32."""
    return torch.float64 if torch.float64 in (logits_pre.dtype, logits_ft.dtype) else torch.float32


def rows_like(logits: Tensor, dtype: torch.dtype, *trailing: int) -> Tensor:
    """An uninitialised (..., *trailing) tensor for logits (..., V)."""
    return logits.new_empty((*logits.shape[:-1], *trailing), dtype=dtype)


def present(value: Tensor | None, like: Tensor) -> Tensor:
    """The value, or the (0,) tensor that stands for None."""
    return like.new_empty(0, dtype=torch.float32) if value is None else value


def saved_like(logits: Tensor, backend: str) -> Tensor:
    """The `saved` result: the reference keeps nothing and computes everything again."""
    return present(None if backend == "reference" else rows_like(logits, torch.float32, SAVED_FIELDS), logits)


def logits_grads_like(logits_pre: Tensor, logits_ft: Tensor, need_pre: bool, need_ft: bool) -> list[Tensor]:
    """Gradients as every backward returns them: contiguous, in the dtypes of the logits, (0,) where not needed."""
    needs = ((logits_pre, need_pre), (logits_ft, need_ft))
    return [x.new_empty(x.shape if need else (0,)) for x, need in needs]


def save(ctx, tensors: tuple[Tensor | None, ...], settings: tuple) -> None:
    """Keep what the backward needs."""
    ctx.set_materialize_grads(False)  # an output that no loss uses costs no (..., V) tensor of zeros
    ctx.save_for_backward(*tensors)
    ctx.settings = settings


def needed(ctx, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients of both logits, None where none is needed."""
    return tuple(g if need else None for g, need in zip(grads, ctx.needs_input_grad[:2], strict=True))
