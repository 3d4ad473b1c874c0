"""Stand-ins for the flash-attn packages: their signatures, with plain torch arithmetic inside.

Four families exist. FlashAttention 3 of 2025: plain functions, most parameters required, `causal`
in both. FlashAttention 3 of 2026: custom operators with defaults, `is_causal` in the backward
pass. FlashAttention 2 since 2.7: custom operators whose parameters are all required.
FlashAttention 4 since 4.0.0b4: plain functions of other names with defaults, of which no window is
None; the lse comes only where it is asked for.
Shapes: q, out (N, T, H, d), k, v (N, T, G, d), lse (N, H, T); with cu_seqlens_q, where sequences
begin and end in all tokens, q, out (N T, H, d), k, v (N T, G, d), lse (H, N T).
"""

import inspect
from types import ModuleType
from typing import Any, Optional  # noqa: F401  (named by the signatures)

import torch
from torch import Tensor

from pgolf.ops.attention import PACKAGES

# What a call may leave out or must neutralise: other values change the result. (No window is None
# where that is the default.)
NEUTRAL = {
    "dropout_p": 0.0,
    "window_size_left": -1,
    "window_size_right": -1,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "return_softmax": False,
    "deterministic": False,
    "attention_chunk": 0,
    "num_splits": 1,
    "sm_margin": 0,
}

FA3_PLAIN = (
    "q, k, v, k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, "
    "seqused_k, max_seqlen_q, max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos, "
    "rotary_sin, seqlens_rotary, q_descale, k_descale, v_descale, softmax_scale, causal, "
    "window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True, "
    "scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0",
    "dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, "
    "max_seqlen_q, max_seqlen_k, dq, dk, dv, softmax_scale, causal, window_size=(-1, -1), "
    "softcap=0.0, deterministic=False, sm_margin=0",
)
FA3_OPERATOR = (
    "q: Tensor, k: Tensor, v: Tensor, k_new: Optional[Tensor] = None, "
    "v_new: Optional[Tensor] = None, qv: Optional[Tensor] = None, out_: Optional[Tensor] = None, "
    "cu_seqlens_q: Optional[Tensor] = None, cu_seqlens_k: Optional[Tensor] = None, "
    "max_seqlen_q: Optional[int] = None, max_seqlen_k: Optional[int] = None, "
    "softmax_scale: Optional[float] = None, causal: bool = False, window_size_left: int = -1, "
    "window_size_right: int = -1, attention_chunk: int = 0, softcap: float = 0.0, "
    "num_splits: int = 1, pack_gqa: Optional[bool] = None, sm_margin: int = 0",
    "dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, "
    "cu_seqlens_q: Optional[Tensor] = None, cu_seqlens_k: Optional[Tensor] = None, "
    "max_seqlen_q: Optional[int] = None, max_seqlen_k: Optional[int] = None, "
    "dq: Optional[Tensor] = None, dk: Optional[Tensor] = None, dv: Optional[Tensor] = None, "
    "softmax_scale: Optional[float] = None, is_causal: bool = False, window_size_left: int = -1, "
    "window_size_right: int = -1, softcap: float = 0.0, deterministic: bool = False, "
    "sm_margin: int = 0",
)
FA2_OPERATOR = (
    "q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool, "
    "window_size_left: int, window_size_right: int, softcap: float, "
    "alibi_slopes: Optional[Tensor], return_softmax: bool",
    "dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, "
    "dq: Optional[Tensor], dk: Optional[Tensor], dv: Optional[Tensor], dropout_p: float, "
    "softmax_scale: float, causal: bool, window_size_left: int, window_size_right: int, "
    "softcap: float, alibi_slopes: Optional[Tensor], deterministic: bool, "
    "rng_state: Optional[Tensor] = None",
)
_FA2_LENGTHS = (
    "cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, dropout_p"
)
# Of its own functions for sequences of any length.
FA2_VARLEN = tuple(text.replace("dropout_p", _FA2_LENGTHS, 1) for text in FA2_OPERATOR)
FA4_PLAIN = (
    "q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, "
    "max_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, "
    "softcap=None, window_size_left=None, window_size_right=None, learnable_sink=None, "
    "num_splits=1, pack_gqa=None, return_lse=False, out=None, lse=None",
    "q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, "
    "window_size_left=None, window_size_right=None, cu_seqlens_q=None, cu_seqlens_k=None, "
    "max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, "
    "dv=None, dlse=None",
)
# name of the family -> (implementation, signatures, whether they are custom operators)
FAMILIES = {
    "fa3-plain": ("fa3", FA3_PLAIN, False),
    "fa3-operator": ("fa3", FA3_OPERATOR, True),
    "fa4-plain": ("fa4", FA4_PLAIN, False),
    "fa2-operator": ("fa2", FA2_OPERATOR, True),
}


def _batched(a: dict[str, Any]) -> dict[str, Any]:
    """The arguments with all tokens as one sequence where they stand end to end, and their mask."""
    for name, value in NEUTRAL.items():
        assert a.get(name, value) == a["defaults"].get(name, value), f"{name}={a[name]}"
    assert a.get("causal", a.get("is_causal")) is True
    assert a["q"].stride(-1) == a["k"].stride(-1) == a["v"].stride(-1) == 1
    ends = a.get("cu_seqlens_q")
    time = a["q"].shape[1 if ends is None else 0]
    hidden = torch.ones(time, time, dtype=torch.bool).triu(1)
    if ends is None:
        assert not any(name.startswith("max_seqlen") and a[name] for name in a)
        return a | {"hidden": hidden}
    assert a["cu_seqlens_k"] is ends or torch.equal(a["cu_seqlens_k"], ends)
    lengths = ends.diff()
    assert ends.dtype == torch.int32 and int(ends[0]) == 0 and int(ends[-1]) == time
    assert 0 <= int(lengths.min()) and int(lengths.max()) <= a["max_seqlen_q"] == a["max_seqlen_k"]
    document = torch.arange(len(lengths)).repeat_interleave(lengths)
    hidden |= document[:, None] != document
    named = ("q", "k", "v", "out", "dout", "dq", "dk", "dv", "lse", "softmax_lse")
    return a | {n: a[n][None] for n in named if a.get(n) is not None} | {"hidden": hidden}


def _scores(a: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Masked scores (N, H, T, T), and k and v with one head for each query head."""
    q, k, v = a["q"], a["k"], a["v"]
    share = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(share, 2), v.repeat_interleave(share, 2)
    scores = torch.einsum("nthd,nshd->nhts", q.float(), k.float()) * a["softmax_scale"]
    return scores.masked_fill(a["hidden"], float("-inf")), k.float(), v.float()


def forward_math(a: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, lse, and two outputs nobody needs)."""
    shape, a = a["q"].shape, _batched(a)
    scores, _, v = _scores(a)
    out = torch.einsum("nhts,nshd->nthd", scores.softmax(-1), v).to(a["q"].dtype)
    lse = scores.logsumexp(-1) if a.get("return_lse", True) else None
    if lse is not None and len(shape) == 3:
        lse = lse[0]
    return out.reshape(shape).contiguous(), lse, torch.empty(0), torch.empty(2)


def backward_math(a: dict[str, Any]) -> Tensor:
    """Writes dq, dk, dv in place, as the packages do; returns what nobody needs."""
    assert a["dout"].is_contiguous()
    a = _batched(a)
    scores, k, v = _scores(a)
    lse = a["lse"] if "lse" in a else a["softmax_lse"]
    p = (scores - lse[..., None]).exp()
    dout = a["dout"].float()
    dp = torch.einsum("nthd,nshd->nhts", dout, v)
    rows = (dout * a["out"].float()).sum(-1).transpose(1, 2)[..., None]
    ds = p * (dp - rows) * a["softmax_scale"]
    gradients = (
        torch.einsum("nhts,nshd->nthd", ds, k),
        torch.einsum("nhts,nthd->nshd", ds, a["q"].float()),
        torch.einsum("nhts,nthd->nshd", p, dout),
    )
    for name, gradient in zip(("dq", "dk", "dv"), gradients, strict=True):
        into = a[name]
        into.copy_(gradient.unflatten(2, (into.shape[2], -1)).sum(3))
    return rows.squeeze(-1).clone()


def _function(signature: str, result: str, math: Any) -> Any:
    scope = {"Tensor": Tensor, "Optional": Optional, "math": math, "defaults": {}}
    call = "math({**locals(), 'defaults': defaults})"
    exec(f"def function({signature}) -> {result}:\n    return {call}", scope)
    function = scope["function"]
    scope["defaults"] |= {
        name: p.default
        for name, p in inspect.signature(function).parameters.items()
        if p.default is not inspect.Parameter.empty
    }
    return function


def build(family: str) -> ModuleType:
    """A module with the inner functions of one family."""
    impl, (forward, backward), operator = FAMILIES[family]
    module = ModuleType(family)
    functions = {
        "forward": _function(forward, "tuple[Tensor, Tensor, Tensor, Tensor]", forward_math),
        "backward": _function(backward, "Tensor", backward_math),
    }
    for direction, function in functions.items():
        assert len(inspect.signature(function).parameters) > 8
        if operator:
            function = torch.library.custom_op(
                f"stand_in::{family.replace('-', '_')}_{direction}",
                function,
                mutates_args=() if direction == "forward" else ("dq", "dk", "dv"),
            )
        setattr(module, getattr(PACKAGES[impl], direction), function)
    if family == "fa2-operator":
        for direction, signature in zip(("forward", "backward"), FA2_VARLEN, strict=True):
            result = "tuple[Tensor, Tensor, Tensor, Tensor]" if direction == "forward" else "Tensor"
            math = forward_math if direction == "forward" else backward_math
            named = f"_flash_attn_varlen_{direction}"
            setattr(module, named, _function(signature, result, math))
    return module


MODULES = {family: build(family) for family in FAMILIES}
