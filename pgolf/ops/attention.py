"""Causal attention with grouped key/value heads, behind one function.

    y_h = softmax(q_h k_g^T / sqrt(d) + causal mask) v_g,   g = h // (H / G)

Three backends, tried in this order and decided once: FlashAttention 3 (Hopper), FlashAttention 2
(sm_80 and newer), torch's scaled_dot_product_attention (anywhere). The two flash-attn backends
are opaque operators with fakes, so they trace under fullgraph=True whatever the version of the
package: its own functions are looked up when the operator runs.
Shapes: q (N, T, H, d), k and v (N, T, G, d), result (N, T, H, d).
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.errors import ConfigError
from pgolf.ops.choose import transformed
from pgolf.ops.derivatives import register_gradient

# name -> (module that provides it, least compute capability, what to call it, a parameter of the
# inner forward function that older versions lack: those return their outputs in another order)
FLASH = {
    "fa3": ("flash_attn_interface", (9, 0), "FlashAttention 3", "num_splits"),
    "fa2": ("flash_attn.flash_attn_interface", (8, 0), "FlashAttention 2", "window_size_left"),
}


@functools.cache
def _module(backend: str) -> tuple[ModuleType | None, str]:
    """The backend's module, or None and why it can't be used."""
    name, _, title, marker = FLASH[backend]
    try:
        module = importlib.import_module(name)
        if marker not in _parameters(module._flash_attn_forward):
            return None, f"{title}: this version of {name} is too old, its inner function differs"
        return module, f"{title} ({name})"
    except ModuleNotFoundError as e:
        return None, f"{title}: {e.name} is not installed"
    except Exception as e:  # a broken build raises ImportError, OSError, RuntimeError ...
        return None, f"{title}: {name} is installed but fails to import: {e}"


def _usable(
    backend: str, device: torch.device, dtype: torch.dtype, head_dim: int
) -> tuple[bool, str]:
    """Whether a flash-attn backend can run here, and why."""
    _, capability, title, _ = FLASH[backend]
    if device.type != "cuda":
        return False, f"{title}: needs a GPU, this run is on {device.type}"
    found = torch.cuda.get_device_capability(device)
    # FlashAttention 3 is compiled for Hopper alone: newer architectures do not run sm_90a code.
    if (found[0] != 9) if backend == "fa3" else found < capability:
        return False, f"{title}: needs sm_%d%d, this is sm_%d%d" % (*capability, *found)
    if dtype not in (torch.bfloat16, torch.float16):
        return False, f"{title}: needs bf16 or fp16, this run computes in {dtype}"
    if head_dim % 8 or head_dim > 256:
        return False, f"{title}: needs heads of a multiple of 8 up to 256, these are {head_dim}"
    module, reason = _module(backend)
    return module is not None, reason


def choose(
    device: torch.device, dtype: torch.dtype, wanted: str = "auto", head_dim: int = 64
) -> tuple[str, str]:
    """The backend to use and the reason in words.

    Args:
        wanted: 'auto', or a backend by name.

    Raises:
        ConfigError: a backend was asked for by name and cannot run here.
    """
    rejected = []
    for backend in FLASH:
        if wanted not in ("auto", backend):
            continue
        usable, reason = _usable(backend, device, dtype, head_dim)
        if usable:
            return backend, reason
        if wanted == backend:
            raise ConfigError(f"attention={wanted}: {reason}; use attention=auto")
        rejected.append(reason)
    return "sdpa", "; ".join(["torch scaled_dot_product_attention", *rejected])


def describe() -> str:
    """What `auto` would choose on this machine in bf16, for people."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return choose(device, torch.bfloat16)[1]


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    inner = getattr(function, "_init_fn", function)  # what a custom operator wraps
    return inspect.signature(inner).parameters


def _call(function: Callable[..., Any], causal: bool, **known: Any) -> Any:
    """Call one of flash-attn's inner functions, whose parameters differ between versions.

    Plain functions of older releases name the flag `causal` and give no defaults; custom
    operators of newer ones may name it `is_causal`. Required parameters that we do not use are
    None.
    """
    parameters = _parameters(function)
    known["is_causal" if "is_causal" in parameters else "causal"] = causal
    arguments = {
        name: known.get(name)
        for name, p in parameters.items()
        if name in known or p.default is inspect.Parameter.empty
    }
    return function(**arguments)


def _register(backend: str) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Make the operator pgolf::attention_<backend> with its fake and its gradient."""
    # The values FlashAttention 2 has no defaults for; names that a version lacks are not passed.
    neutral = {"dropout_p": 0.0, "window_size_left": -1, "window_size_right": -1, "softcap": 0.0,
               "return_softmax": False, "deterministic": False}

    @torch.library.custom_op(f"pgolf::attention_{backend}", mutates_args=())
    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse, *_ = _call(
            _module(backend)[0]._flash_attn_forward, True,
            q=q, k=k, v=v, softmax_scale=q.size(-1) ** -0.5, **neutral,
        )
        return out.contiguous(), lse

    @forward.register_fake
    def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        batch, time, heads, _ = q.shape
        return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(
            (batch, heads, time), dtype=torch.float32
        )

    @torch.library.custom_op(f"pgolf::attention_{backend}_backward", mutates_args=())
    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
        _call(
            _module(backend)[0]._flash_attn_backward, True,
            dout=dout.contiguous(), q=q, k=k, v=v, out=out, softmax_lse=lse,
            dq=dq, dk=dk, dv=dv, softmax_scale=q.size(-1) ** -0.5, **neutral,
        )
        return dq, dk, dv

    @backward.register_fake
    def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor):
        return tuple(
            torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)
        )

    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*inputs, *output)

    def gradient(ctx: Any, dout: Tensor, dlse: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return backward(dout, *ctx.saved_tensors)

    register_gradient("attention", forward, gradient, setup_context)
    return forward


_OPERATORS = {backend: _register(backend) for backend in FLASH}


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        is_causal=True, enable_gqa=q.size(2) != k.size(2),
    )
    return out.transpose(1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor, backend: str = "sdpa") -> Tensor:
    """Causal attention by the backend that `choose` named; (N, T, H, d).

    Raises:
        RuntimeError: FlashAttention under torch.func or in forward mode, of which it knows nothing.
    """
    if backend != "sdpa" and transformed():
        raise RuntimeError(
            f"attention: {backend} knows neither torch.func (grad, jvp, vmap) nor forward-mode "
            "derivatives: use the backend 'sdpa'"
        )
    return _sdpa(q, k, v) if backend == "sdpa" else _OPERATORS[backend](q, k, v)[0]
