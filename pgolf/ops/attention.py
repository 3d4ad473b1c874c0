"""Causal attention with grouped key/value heads.

    y_h = softmax(q_h k_g^T / sqrt(d) + causal mask) v_g

g = h // (H / G) is the key/value head of query head h, with H query and G key/value heads. With
`borders` the mask leaves a query those keys alone that lie in its own document. The
reference is torch's scaled_dot_product_attention, which `sdpa` names too: scores in the open are
T x T numbers a head, with which no run of `ops=reference` would fit. The implementations are the
packages of github.com/Dao-AILab/flash-attention, behind one opaque operator, which traces under
fullgraph=True whatever their version: their own functions are looked up when it runs. (torch's
own registration of them, activate_flash_attention_impl of torch.nn.attention, is not in torch 2.9
and changes every attention of the process.)
With borders FlashAttention takes the documents as sequences of any length, and on a CPU `varlen`
takes one after the other: what lies between documents is not computed. The reference computes and
masks it. (torch's own form for GPUs, torch.nn.attention.varlen, has other arguments in every
version.)
Shapes: q, y (N, T, H, d), k, v (N, T, G, d), borders (K,) int32. Strides are free.
"""

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pgolf.ops import varlen
from pgolf.ops.choose import beyond, resolve, transformed
from pgolf.ops.derivatives import register_gradient
from pgolf.ops.inputs import Inputs, outside_autocast, without_autocast
from pgolf.ops.launch import DTYPE_CODES, launcher
from pgolf.ops.opaque import opaque
from pgolf.ops.operator import Implementation, Operator, Sample, Work, register
from pgolf.ops.tensors import check_grouped, compute_dtype, nbytes, unit_stride

_INPUTS = Inputs(
    "attention", ("q", "k", "v", "borders"), alike=("q", "k", "v"), matmul=True,
    optional=("borders",),
)  # fmt: skip


def most_documents(impl: str, time: int) -> int:
    """How many documents of a sequence an implementation has room for.

    FlashAttention's launches and its backward pass's memory grow with the room, used or not.
    """
    return min(time, max(64, time // 32)) if impl in PACKAGES else time


@outside_autocast
def reference(q: Tensor, k: Tensor, v: Tensor, borders: Tensor | None = None) -> Tensor:
    """`attention` by torch."""
    # Of torch's kernels the plain one alone knows forward-mode derivatives.
    plain = sdpa_kernel(SDPBackend.MATH) if transformed() else contextlib.nullcontext()
    with plain:
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), _seen(q, borders),
            is_causal=borders is None, enable_gqa=q.size(2) != k.size(2),
        )  # fmt: skip
    return y.transpose(1, 2)


def _seen(q: Tensor, borders: Tensor | None) -> Tensor | None:
    """(N, 1, T, T) bool: the keys that each query sees inside of its document."""
    if borders is None:
        return None
    batch, time = q.shape[:2]
    place = torch.arange(batch * time, device=q.device, dtype=borders.dtype)
    document = torch.searchsorted(borders, place, right=True).view(batch, 1, time)
    return (document[..., None] == document[..., None, :]).tril()


def obstacle(impl: str, size: int, documents: bool = False) -> str:
    """Why `impl` cannot run heads of that size, with borders or without; '' if it can."""
    if impl == "varlen":
        return "" if documents else "it is for documents=true"
    if size % 8:
        return f"it takes heads of a multiple of 8 elements, not {size}"
    return beyond(SIZE_LIMITS, impl, size, "elements a head")


def attention(
    q: Tensor, k: Tensor, v: Tensor, impl: str = "auto", borders: Tensor | None = None
) -> Tensor:
    """Causal attention: what each query sees of the values up to its position.

    Args:
        q: (N, T, H, d).
        k, v: (N, T, G, d), H a multiple of G, of q's dtype and device.
        impl: 'auto', 'reference' or 'sdpa', 'varlen' (CPU), 'fa3', 'fa4', 'fa2' (bf16, fp16; d a
            multiple of 8 and <= 256, for 'fa4' <= 128).
        borders: (K,) int32 of `document_borders`, none of whose documents lies in two sequences:
            a query sees its own document. (Their values are not looked at, the host would wait.)
            None: it sees its whole sequence.

    Returns:
        (N, T, H, d). Of the reference, second derivatives exist inside of
        torch.nn.attention.sdpa_kernel(SDPBackend.MATH).

    Raises:
        TypeError: an argument is no tensor.
        ValueError: shapes, dtypes or devices do not fit; says which and what would.
        RuntimeError: `impl` is not there on this machine, or knows no transform of torch.func.
    """
    q, k, v, borders = _INPUTS(q, k, v, borders)
    check_grouped("attention", ("q", q), ("k", k), ("v", v))
    if k.shape != v.shape:
        raise ValueError(
            f"attention: k is {tuple(k.shape)} and v {tuple(v.shape)}: they have to be the same"
        )
    if borders is not None and (borders.dim(), borders.dtype) != (1, torch.int32):
        raise ValueError(
            f"attention: borders is {borders.dtype} {tuple(borders.shape)}: it has to be int32 (K,)"
        )
    documents = borders is not None or impl == "varlen"
    impl = resolve("attention", impl, q, size=q.size(3), documents=documents)
    if impl == "reference":
        return reference(q, k, v, borders)
    if impl == "varlen" and borders is None:
        borders = q.size(1) * torch.arange(len(q) + 1, dtype=torch.int32, device=q.device)
    return _forward(q, k, v, borders, impl)[0]


# --- the opaque operator --------------------------------------------------------------------------


@opaque("pgolf::attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, borders: Tensor | None, impl: str
) -> tuple[Tensor, Tensor]:
    if not q.numel():  # the packages take no empty batch
        return _results(q, borders)
    with without_autocast(q):
        return launcher("attention", impl, "forward")(*map(unit_stride, (q, k, v)), borders)


def _results(q: Tensor, borders: Tensor | None) -> tuple[Tensor, Tensor]:
    """Empty tensors for y and for the logarithm of the sum of each query's weights.

    Of documents, tokens stand end to end.
    """
    batch, time, heads, _ = q.shape
    shape = (batch, heads, time) if borders is None else (heads, batch * time)
    return q.new_empty(q.shape), q.new_empty(shape, dtype=compute_dtype(q.dtype))


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, borders: Tensor | None, impl: str):
    return _results(q, borders)


@opaque("pgolf::attention_backward", mutates_args=())
def _backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, borders: Tensor | None, y: Tensor, lse: Tensor,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if not q.numel():
        return _gradients(q, k, v)
    q, k, v = map(unit_stride, (q, k, v))
    return launcher("attention", impl, "backward")(dy.contiguous(), q, k, v, borders, y, lse)


def _gradients(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors for dq, dk and dv."""
    return tuple(t.new_empty(t.shape) for t in tensors)


@_backward.register_fake
def _(dy, q, k, v, borders, y, lse, impl):
    return _gradients(q, k, v)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.impl = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradient(ctx: Any, dy: Tensor, dlse: Tensor | None) -> tuple:
    return *_backward(dy, *ctx.saved_tensors, ctx.impl), None, None


register_gradient("attention", _forward, _gradient, _setup_context)


# --- implementations ------------------------------------------------------------------------------


class Package(NamedTuple):
    """Where an implementation is.

    Attributes:
        title: for people.
        module: that has its inner functions.
        forward, backward: their names.
        marker: a parameter of `forward` that versions lack which return other results.
        majors: of the compute capabilities that it has code for, forward and backward.
        gpus: the same for people.
        remedy: how it is installed.
        varlen: what these names have behind `attn_` where sequences differ in length.
    """

    title: str
    module: str
    forward: str
    backward: str
    marker: str
    majors: range
    gpus: str
    remedy: str
    varlen: str = ""


PACKAGES = {
    "fa3": Package(
        "FlashAttention 3", "flash_attn_interface", "_flash_attn_forward", "_flash_attn_backward",
        "num_splits", range(9, 10), "sm_90",
        "build hopper/ of github.com/Dao-AILab/flash-attention",
    ),
    "fa4": Package(
        "FlashAttention 4", "flash_attn.cute.interface", "_flash_attn_fwd", "_flash_attn_bwd",
        "return_lse", range(9, 12), "sm_90 to sm_110",
        # All releases are called betas, which pip takes only where they are named.
        "pip install 'flash-attn-4>=4.0.0b4'",
    ),
    "fa2": Package(
        "FlashAttention 2", "flash_attn.flash_attn_interface", "_flash_attn_forward",
        "_flash_attn_backward", "window_size_left", range(8, 100), "sm_80 or newer",
        "pip install flash-attn --no-build-isolation", "varlen_",
    ),
}  # fmt: skip
DTYPES = (torch.bfloat16, torch.float16)
# Elements of a head. (FlashAttention 4 takes more on some GPUs, by its version.)
SIZE_LIMITS = {"fa3": 256, "fa4": 128, "fa2": 256}


@functools.cache
def _module(impl: str) -> tuple[ModuleType | None, str]:
    """The module of an implementation, or None and why it can't be used."""
    package = PACKAGES[impl]
    try:
        module = importlib.import_module(package.module)
        if package.marker in _parameters(getattr(module, package.forward)):
            return module, ""
        why = f"this version of {package.module} is too old, its inner function differs"
    except ModuleNotFoundError as e:
        why = f"{e.name} is not installed"
    except Exception as e:  # a broken build raises ImportError, OSError, RuntimeError ...
        why = f"{package.module} is installed but fails to import: {e}"
    return None, f"{package.title}: {why} ({package.remedy})"


def _missing(impl: str) -> str:
    """Why an implementation cannot run here; '' if it can."""
    if not torch.cuda.is_available():
        return "torch sees no GPU here"
    major, minor = torch.cuda.get_device_capability()
    package = PACKAGES[impl]
    if major not in package.majors:
        return f"{package.title} needs {package.gpus}, this GPU is sm_{major}{minor}"
    return _module(impl)[1]


@functools.cache
def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    inner = getattr(function, "_init_fn", function)  # what a custom operator wraps
    return inspect.signature(inner).parameters


# What parameters that have no default, in some version, are to be for attention and nothing else;
# others of those are None.
_NEUTRAL = {
    "dropout_p": 0.0, "window_size_left": -1, "window_size_right": -1, "softcap": 0.0,
    "return_softmax": False, "deterministic": False,
}  # fmt: skip


def _call(
    impl: str, function: str, q: Tensor, borders: Tensor | None, time: int, **known: Any
) -> Any:
    """Call an inner function, causal; of `known` it gets what it has a parameter for."""
    if borders is not None:
        function = function.replace("attn_", f"attn_{PACKAGES[impl].varlen}")
        known |= {"cu_seqlens_q": borders, "cu_seqlens_k": borders}
        known |= {"max_seqlen_q": time, "max_seqlen_k": time}
    called = getattr(_module(impl)[0], function)
    known |= {"q": q, "softmax_scale": q.size(-1) ** -0.5, "causal": True, "is_causal": True}
    return called(**{
        name: known.get(name, _NEUTRAL.get(name))
        for name, p in _parameters(called).items()
        if name in known or p.default is inspect.Parameter.empty
    })  # fmt: skip


def _end_to_end(borders: Tensor | None, *tensors: Tensor) -> Sequence[Tensor]:
    """(N T, ..) of (N, T, ..) where there are borders."""
    return tensors if borders is None else [t.flatten(0, 1) for t in tensors]


def _flash(impl: str) -> Implementation:
    package = PACKAGES[impl]

    def forward(q: Tensor, k: Tensor, v: Tensor, borders: Tensor | None) -> tuple[Tensor, Tensor]:
        shape, (q, k, v) = q.shape, _end_to_end(borders, q, k, v)
        known = {"k": k, "v": v, "return_lse": True}
        y, lse, *_ = _call(impl, package.forward, q, borders, shape[1], **known)
        return y.contiguous().view(shape), lse

    def backward(
        dy: Tensor, q: Tensor, k: Tensor, v: Tensor, borders: Tensor | None, y: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradients, time = _gradients(q, k, v), q.size(1)
        q, k, v, y, dy, dq, dk, dv = _end_to_end(borders, q, k, v, y, dy, *gradients)
        _call(
            impl, package.backward, q, borders, time, k=k, v=v, out=y, dout=dy, lse=lse,
            softmax_lse=lse, dq=dq, dk=dk, dv=dv,
        )  # fmt: skip
        return gradients

    functions = {"forward": forward, "backward": backward}
    missing = functools.partial(_missing, impl)
    return Implementation("cuda", DTYPES, functions, missing, package=package.title)


_VARLEN = Implementation(
    "cpu", tuple(DTYPE_CODES), {"forward": varlen.forward, "backward": varlen.backward},
    lambda: "", package="torch",
)  # fmt: skip


def samples() -> list[Sample]:
    """Groupings, head sizes and layouts; the bench sizes are one layer at 1,024 tokens and more."""

    def make(batch: int, time: int, heads: int, groups: int, size: int):
        def build(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
            g = torch.Generator().manual_seed(time)
            qkv = torch.randn(batch, time, heads + 2 * groups, size, generator=g).double()
            # The parts of one packed projection.
            return qkv.to(device, dtype).split((heads, groups, groups), dim=2), {}

        return build

    shapes = {
        "2x7 8/4 64": (2, 7, 8, 4, 64),
        "1x33 4/4 32": (1, 33, 4, 4, 32),
        "1x66 2/1 128": (1, 66, 2, 1, 128),
        "3x1 6/2 80": (3, 1, 6, 2, 80),
        "0x5 4/2 16": (0, 5, 4, 2, 16),
    }
    big = {1024: (1, 1024), 8192: (4, 2048), 98304: (48, 2048)}
    return [Sample(label, make(*s)) for label, s in shapes.items()] + [
        Sample(f"{tokens} tokens", make(*s, 8, 4, 64), bench=True) for tokens, s in big.items()
    ]


def cost(q: Tensor, k: Tensor, v: Tensor, borders: Tensor | None = None) -> tuple[Work, Work]:
    """Forward two products, backward five, as the weights are computed again from q, k and the
    log of their sum; half of each is behind the mask.
    """
    batch, time, heads, size = q.shape
    lengths = [time] * batch if borders is None else borders.diff().tolist()
    product = heads * size * sum(length * (length + 1) for length in lengths)
    lse = 4 * batch * heads * time
    return (
        Work(2 * product, nbytes(q, k, v), nbytes(q) + lse),
        Work(5 * product, nbytes(q, q, q, k, v) + lse, nbytes(q, k, v)),
    )


OPERATOR = register(
    Operator(
        name="attention",
        call=attention,
        reference=reference,
        differentiable=("q", "k", "v"),
        implementations={"varlen": _VARLEN} | {impl: _flash(impl) for impl in PACKAGES},
        preferred={
            "cpu": [
                ("varlen", "torch's, on each document by itself"),
                ("reference", "torch's scaled_dot_product_attention"),
            ],
            "cuda": [
                ("fa3", "FlashAttention 3, written for Hopper"),
                ("fa4", "FlashAttention 4, written for Hopper and Blackwell"),
                ("fa2", "FlashAttention 2"),
                ("reference", "torch's scaled_dot_product_attention"),
            ],
        },
        samples=samples,
        cost=cost,
        obstacle=obstacle,
        aliases={"sdpa": "reference"},
    )
)
