"""What the operators over lists of tensors share: the numbers of a step, and lists for kernels.

Everything that changes from step to step is read from one small tensor on the device, so that a
CUDA graph can hold a whole optimiser step: nothing waits for the host, and no argument changes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pgolf.ops.launch import DTYPE_CODES
from pgolf.ops.tensors import compute_dtype

Tensors = Sequence[Tensor]

# Columns of `scalars`, a row a group of parameters; csrc/param_update.h says what each one is.
COLUMNS = (
    "lr", "weight_decay", "momentum", "rate1", "rate2", "bias1", "bias2", "eps", "average_rate",
    "max_norm",
)  # fmt: skip
CHUNK = 4096  # numbers of a tensor of which the kernels make a sum; csrc/multi_tensor.h
KERNEL_DTYPES = (torch.float32, torch.bfloat16)
# The matrices that Muon steps in PR 1473, for samples.
PR1473_MATRICES = (
    [(512, 512)] * 22 + [(256, 512)] * 22 + [(1536, 512)] * 11 + [(512, 1536)] * 11
)


def scalars_row(**values: float) -> list[float]:
    """A row of `scalars` from names of COLUMNS; those that are not named are 0, biases 1."""
    unknown = set(values) - set(COLUMNS)
    if unknown:
        raise ValueError(f"scalars have no {', '.join(unknown)}, only {', '.join(COLUMNS)}")
    defaults = {"bias1": 1.0, "bias2": 1.0, "max_norm": float("inf")}
    return [values.get(name, defaults.get(name, 0.0)) for name in COLUMNS]


def adamw_row(
    step: int, lr: float, betas: tuple[float, float], eps: float, **values: float
) -> list[float]:
    """The row of an AdamW group at its step number `step`, from 1."""
    biases = {f"bias{i}": 1.0 - beta**step for i, beta in enumerate(betas, 1)}
    rates = {f"rate{i}": 1.0 - beta for i, beta in enumerate(betas, 1)}
    return scalars_row(lr=lr, eps=eps, **biases, **rates, **values)


def named(row: Tensor) -> dict[str, Tensor]:
    """A row of `scalars` by column, as 0-d views."""
    return dict(zip(COLUMNS, row.unbind(0), strict=True))


def clip_factor(max_norm: Tensor, norm: Tensor) -> Tensor:
    """What gradients are multiplied with, as torch.nn.utils.clip_grad_norm_ has it."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def store(target: Tensor, value: Tensor, finite: Tensor) -> None:
    """target <- value where `finite` (0-d) says that the norm is; else target keeps its bits.

    Without a look from the host, which hears of a gradient that is not finite two steps later: what
    is in memory is then still the last that was good.
    """
    target.copy_(torch.where(finite, value, target))


def widened(t: Tensor) -> Tensor:
    """t in the dtype that it is computed in: float32, or float64 for float64."""
    return t.to(compute_dtype(t.dtype))


def check_lists(operator: str, **lists: Tensors) -> None:
    """Raise ValueError unless all tensors lie on one device in dtypes that fit and are contiguous.

    The first list may not be empty, and if it holds float64 then everything does.
    """
    first = next(iter(lists.values()))
    if not first:
        raise ValueError(f"{operator}: {next(iter(lists))} is empty: give at least one tensor")
    allowed = (torch.float64,) if first[0].dtype == torch.float64 else KERNEL_DTYPES
    for name, tensors in lists.items():
        for i, t in enumerate(tensors):
            if t.dtype not in allowed:
                dtypes = " or ".join(str(d).removeprefix("torch.") for d in allowed)
                raise ValueError(f"{operator}: {name}[{i}] is {t.dtype}: it has to be {dtypes}")
            if t.device != first[0].device:
                raise ValueError(
                    f"{operator}: {name}[{i}] is on {t.device}, others are on {first[0].device}: "
                    "move it"
                )
            if not t.is_contiguous():
                raise ValueError(
                    f"{operator}: {name}[{i}] has strides {t.stride()}: make it contiguous"
                )


def check_same_shapes(
    operator: str, names: tuple[str, str], first: Tensors, other: Tensors
) -> None:
    """Raise ValueError unless two lists have the same shapes."""
    if [t.shape for t in first] == [t.shape for t in other]:
        return
    if len(first) != len(other):
        raise ValueError(
            f"{operator}: {len(first)} {names[0]} and {len(other)} {names[1]}: one for each"
        )
    i = next(i for i, (a, b) in enumerate(zip(first, other, strict=True)) if a.shape != b.shape)
    raise ValueError(
        f"{operator}: {names[1]}[{i}] is {tuple(other[i].shape)} and {names[0]}[{i}] "
        f"{tuple(first[i].shape)}: they have to be alike"
    )


def check_numbers(operator: str, like: Tensor, rows: bool, scalars: Tensor, norm: Tensor) -> None:
    """Raise ValueError unless `scalars` is a row of numbers (or rows), and `norm` one number."""
    shape = tuple(scalars.shape)
    wanted = (*shape[:1], len(COLUMNS)) if rows else (len(COLUMNS),)
    if shape != wanted or not scalars.is_contiguous():
        raise ValueError(
            f"{operator}: scalars is {shape}: it has to be contiguous, "
            f"({'groups, ' * rows}{len(COLUMNS)})"
        )
    if norm.dim():
        raise ValueError(f"{operator}: norm is {tuple(norm.shape)}: it has to have no dimension")
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    for name, t in {"scalars": scalars, "norm": norm}.items():
        if t.dtype != dtype or t.device != like.device:
            raise ValueError(
                f"{operator}: {name} is {t.dtype} on {t.device}: it has to be {dtype} on "
                f"{like.device}"
            )


def sizes(tensors: Tensors) -> list[int]:
    return [t.numel() for t in tensors]


def codes(tensors: Tensors) -> list[int]:
    return [DTYPE_CODES[t.dtype] for t in tensors]


def chunks(tensors: Tensors) -> int:
    """How many chunks they have together."""
    return sum(-(-t.numel() // CHUNK) for t in tensors)
