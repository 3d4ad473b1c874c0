"""Is an operator right? Its results and gradients against float64, and its inputs untouched.

    import torch
    from pgolf.ops.testing import Call

    def reference(x, w):  # plain torch: what is meant
        return (x * w).sum(-1)

    call = Call(reference, (torch.randn(8, 33), torch.randn(33)), differentiable=("x", "w"))
    assert call.problem(my_kernel) == ""  # takes what `reference` takes

An operator of the registry comes with its arguments: `Call.of(operator, sample, dtype)`.

The rule, for the largest and for the mean error of each result:

    err(kernel) <= k err(torch in the same dtype) + one rounding of the largest (mean) value

with k = 2 for outputs and 3 for gradients, where err is the distance from the reference in float64
on the same numbers. Of a result that is one number, or some that err together, torch's error is one
draw: it is small by chance now and then, and a kernel as exact would be refused (one in five, of
two errors of one normal distribution and for k = 3). A floor that is wide enough for that would
hide the faults of all others. So torch's error is drawn again, up to seven times, before a kernel
is refused: on inputs that differ in their last place, with other gradients of the outputs, which
round otherwise and mean the same. The largest counts. Of two alike one in 1100 is refused then (k =
2: one in 120), were there not the rounding as well. A fault stays one: it is many times the error
of the dtype, which no draw is.

In float64 there is no better truth: torch's error counts as a thousand roundings.
"""

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.utils.deterministic
from torch import Tensor

from pgolf.ops.operator import Operator, Result, Sample
from pgolf.ops.tensors import tensors_in

# How many times torch's own error a kernel may have, in outputs and in gradients.
OUTPUTS, GRADIENTS = 2.0, 3.0
# Of torch's error, before a kernel is refused.
DRAWS = 8
CPU = torch.device("cpu")

Function = Callable[..., Result]
Errors = tuple[float, float]  # largest and mean


def as_tuple(result: Result) -> tuple[Tensor, ...]:
    """The results of an operator, where there is one, none, or lists of them too."""
    if isinstance(result, Tensor):
        return (result,)
    return tuple(t for part in result or () for t in as_tuple(part))


def with_tensors(argument: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """An argument with each of its tensors changed."""
    if isinstance(argument, (list, tuple)):
        return [change(t) if isinstance(t, Tensor) else t for t in argument]
    return change(argument) if isinstance(argument, Tensor) else argument


class Call:
    """A call of an operator: arguments by name, those that have gradients, those that change.

    Attributes:
        reference: what is meant, in plain torch.
        arguments: by name. (The truth about them is computed once, by the first `problem`.)
        wanted: names of the arguments whose gradients are taken.
        changed: names of those that are changed in place.
    """

    def __init__(
        self,
        reference: Function,
        args: Sequence[Any] = (),
        named: Mapping[str, Any] | None = None,
        *,
        differentiable: Sequence[str] = (),
        mutates: Sequence[str] = (),
        contiguous: bool = False,
    ) -> None:
        """
        Args:
            reference: called as `reference(*args, **named)`, and so is what is checked.
            args, named: tensors, lists of them and anything else; a dtype is that of a result.
            differentiable: names of the arguments that have gradients: tensors, or None.
            mutates: names of the arguments that are changed in place. Each run gets copies, which
                come after its outputs.
            contiguous: whether gradients of the outputs are; a kernel has to take strided ones.
        """
        given = inspect.signature(reference).bind(*args, **named or {}).arguments
        self.reference = reference
        self.arguments: dict[str, Any] = dict(given)
        self.wanted = [n for n in differentiable if given.get(n) is not None]
        self.changed = [n for n in mutates if given.get(n) is not None]
        self._places, self._contiguous, self._seed = len(args), contiguous, 0

    @classmethod
    def of(
        cls,
        operator: Operator,
        sample: Sample,
        dtype: torch.dtype,
        device: torch.device = CPU,
        contiguous: bool = False,
    ) -> "Call":
        """An operator of the registry on one of its samples."""
        how = {"differentiable": operator.differentiable, "mutates": operator.mutates}
        args, named = sample.build(device, dtype)
        return cls(operator.reference, args, named, **how, contiguous=contiguous)

    def with_arguments(self, changes: Mapping[str, Any]) -> "Call":
        """The same call with some arguments in the place of others."""
        twin = object.__new__(Call)
        known = ("_truth", "_drawn_errors")  # of other arguments
        twin.__dict__ = {n: v for n, v in vars(self).items() if n not in known}
        twin.arguments = self.arguments | changes
        return twin

    def in_double(self) -> "Call":
        """The same numbers in float64, as the dtype that a result is asked for."""

        def widen(argument: Any) -> Any:
            if isinstance(argument, torch.dtype):
                return torch.float64
            return with_tensors(argument, lambda t: t.double() if t.is_floating_point() else t)

        return self.with_arguments({n: widen(a) for n, a in self.arguments.items()})

    def drawn(self, seed: int) -> "Call":
        """Other gradients of the outputs, and inputs of which each number is the next one, or not.

        Those inputs are the ones that have gradients: others may be settings. Without any, all.
        """

        def move(t: Tensor) -> Tensor:
            if not t.is_floating_point() or not t.dim():
                return t
            g = torch.Generator(t.device).manual_seed(seed)
            steps = torch.randint(-1, 2, t.shape, generator=g, device=t.device)
            return (t.detach().double() * (1 + steps * torch.finfo(t.dtype).eps)).to(t.dtype)

        names = self.wanted or list(self.arguments)
        twin = self.with_arguments({n: with_tensors(self.arguments[n], move) for n in names})
        twin._seed = seed
        return twin

    # --- running ----------------------------------------------------------------------------------

    def leaves(self) -> list[Tensor]:
        """The differentiable arguments, detached; strides are kept."""
        return [self.arguments[n].detach().requires_grad_() for n in self.wanted]

    def on(self, function: Function, *leaves: Tensor) -> Result:
        """What a function gives for these in place of the differentiable arguments.

        What it changes in place is copied first, and comes after its outputs.
        """
        given = self.arguments | dict(zip(self.wanted, leaves, strict=True))
        copies = {n: with_tensors(given[n], torch.clone) for n in self.changed}
        given |= copies
        args, named = self.split(given)
        out = function(*args, **named)
        if not copies:
            return out
        return (*as_tuple(out), *(t for a in copies.values() for t in tensors_in(a)))

    def split(self, arguments: Mapping[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Arguments by name as they were given: (positional, by keyword)."""
        items = list(arguments.items())
        return tuple(a for _, a in items[: self._places]), dict(items[self._places :])

    def upstream(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of the outputs: the same numbers in every dtype, not contiguous by default."""
        made = [strided_like(t, 100 * self._seed + i) for i, t in enumerate(outputs, 1)]
        return [t.contiguous() for t in made] if self._contiguous else made

    def gradients(self, out: Result, leaves: Sequence[Tensor], **how: bool) -> tuple[Tensor, ...]:
        """Of the leaves; `how` goes to torch.autograd.grad."""
        outputs = as_tuple(out)
        pairs = zip(outputs, self.upstream(outputs), strict=True)
        kept, upstream = zip(*[p for p in pairs if p[0].requires_grad] or [(outputs[0], None)],
                             strict=True)  # fmt: skip
        return torch.autograd.grad(kept, leaves, upstream, **how)

    def run(self, function: Function) -> list[Tensor]:
        """[output, ..., gradient, ...]: as many gradients as there are `wanted`."""
        leaves = self.leaves()
        out = self.on(function, *leaves)
        results = [t.detach() for t in as_tuple(out)]
        return [*results, *self.gradients(out, leaves)] if leaves else results

    # --- judging ----------------------------------------------------------------------------------

    def problem(self, function: Function) -> str:
        """What is wrong with a function; '' if it computes what the reference does.

        Shapes and dtypes are those of the reference, no argument is written (apart from those that
        are to change), and errors keep the rule above. What is NaN or infinite in truth has to be.
        """
        before = self._bits()
        found = self.run(function)
        for name, bits in self._bits().items():
            if not all(map(torch.equal, bits, before[name])):
                return f"it wrote to {name}, which it may only read"
        torchs, truth = self._truth
        if len(found) != len(torchs):
            outputs = (len(results) - len(self.wanted) for results in (found, torchs))
            return "it has {} outputs, not {}".format(*outputs)
        for i, (got, wanted) in enumerate(zip(found, torchs, strict=True)):
            if got.shape != wanted.shape or got.dtype != wanted.dtype:
                return (
                    f"{self._name(i)} is {got.dtype} {[*got.shape]}, "
                    f"not {wanted.dtype} {[*wanted.shape]}"
                )
        mine = [error(got, exact) for got, exact in zip(found, truth, strict=True)]
        allowed = [(0.0, 0.0)] * len(found)
        problem = ""
        for draw in range(DRAWS):
            allowed = [
                tuple(map(max, *pair))
                for pair in zip(allowed, self._errors_of_torch(draw), strict=True)
            ]
            problem = self._beyond(mine, allowed)
            if not problem:
                break
        return problem

    @functools.cached_property
    def _truth(self) -> tuple[list[Tensor], list[Tensor]]:
        """Results of the reference in this dtype, and in float64."""
        return self.run(self.reference), self.in_double().run(self.reference)

    @functools.cached_property
    def _drawn_errors(self) -> list[list[Errors]]:
        return []

    def _errors_of_torch(self, draw: int) -> list[Errors]:
        """torch's error in this dtype, of each result; draw 0 is on the arguments themselves."""
        known = self._drawn_errors
        if draw == len(known):
            call = self.drawn(draw) if draw else self
            known.append([error(*pair) for pair in zip(*call._truth, strict=True)])
        return known[draw]

    def _beyond(self, mine: Sequence[Errors], torchs: Sequence[Errors]) -> str:
        """Which error is larger than these of torch allow; '' if none is."""
        results, truth = self._truth
        outputs = len(results) - len(self.wanted)
        for i, (result, exact) in enumerate(zip(results, truth, strict=True)):
            factor = OUTPUTS if i < outputs else GRADIENTS
            roundings = 1000.0 if result.dtype is torch.float64 else 0.5
            eps = torch.finfo(result.dtype).eps if result.is_floating_point() else 0.0
            sizes = error(exact.nan_to_num(0.0, 0.0, 0.0), torch.zeros_like(exact))
            for which, got, theirs, size in zip(
                ("largest", "mean"), mine[i], torchs[i], sizes, strict=True
            ):
                limit = factor * theirs + roundings * eps * size
                if not got <= limit:  # NaN is wrong too
                    return f"{self._name(i)}: {which} error {got:.3g}, allowed {limit:.3g}"
        return ""

    def _name(self, i: int) -> str:
        """What a result is, counted from the first output."""
        outputs = len(self._truth[0]) - len(self.wanted)
        if i >= outputs:
            return f"gradient of {self.wanted[i - outputs]}"
        return "output" if outputs == 1 else f"output {i + 1}"

    def _bits(self) -> dict[str, list[Tensor]]:
        """Copies of all tensors among the arguments."""
        return {n: [bits_of(t) for t in tensors_in(a)] for n, a in self.arguments.items()}


def kernel(operator: Operator, impl: str) -> Function:
    """An operator's public function with an implementation chosen, for `Call.run` and `problem`."""
    return functools.partial(operator.call, impl=impl)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Inside, memory that torch allocates is NaN (integers: the largest) until it is written.

    An element that a kernel leaves out is then wrong, whatever lay there before.
    """
    fill = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        fill.fill_uninitialized_memory,
    )
    # torch.use_deterministic_algorithms would import Inductor, to tell it as well.
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    fill.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():  # of what has no deterministic form, which matters not
            warnings.filterwarnings("ignore", ".*[Dd]eterministic", UserWarning)
            yield
    finally:
        torch._C._set_deterministic_algorithms(before[0], warn_only=before[1])
        fill.fill_uninitialized_memory = before[2]


def error(got: Tensor, exact: Tensor) -> Errors:
    """Largest and mean absolute error; where both are NaN, or the same infinity, there is none."""
    got, exact = got.double(), exact.double()
    alike = (got == exact) | (got.isnan() & exact.isnan())
    distance = torch.where(alike, 0.0, (got - exact).abs())
    return (distance.max().item(), distance.mean().item()) if got.numel() else (0.0, 0.0)


def bits_of(t: Tensor) -> Tensor:
    """A copy of a tensor's bytes, which are equal for NaN and differ for zeros of other signs."""
    return t.detach().flatten().clone().view(torch.uint8)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype is b.dtype and torch.equal(bits_of(a), bits_of(b))


def strided_like(out: Tensor, seed: int = 1) -> Tensor:
    """Random numbers of out's shape that are not contiguous in any dimension.

    They are those of bfloat16, hence the same in any other dtype.
    """
    g = torch.Generator(out.device).manual_seed(seed)
    columns = out.size(-1) if out.dim() else 1
    wide = torch.randn(*out.shape[:-1], 2 * columns, generator=g, device=out.device)
    strided = wide.bfloat16().to(out.dtype)[..., ::2]
    return strided if out.dim() else strided[0]
