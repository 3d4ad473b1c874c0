"""How `fake_quant` and `weight_cast` call their one C++ and CUDA kernel.

Lists hold an item a matrix: w (R, C) of one dtype with a contiguous last dimension; scale (R,) of
the dtype that w computes in, or None; clip_factor (R,) and bits (0-d), both fp32, or None where
there is no grid. `on` is 0-d fp32, or None if no matrix has a grid.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pgolf.ops.registry import DTYPE_CODES, Run, addresses, compute_dtype

NEEDED = ("weight_cast", "weight_cast_backward")  # functions of pgolf._C


def launchers(run: Run) -> dict[str, Callable]:
    """Forward and backward in the compiled half, by `run_cpp` or `run_cuda`."""

    def forward(
        ws: Sequence[Tensor],
        scales: Sequence[Tensor | None],
        clip_factors: Sequence[Tensor | None],
        bits: Sequence[Tensor | None],
        on: Tensor | None,
        floor: float,
        multiple: int,
        full_range: bool,
        dtype: torch.dtype,
        with_steps: Sequence[bool],
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """The matrices in `dtype`; of those that want them, the steps (R,)."""
        source = ws[0].dtype
        target = dtype if dtype is torch.bfloat16 else compute_dtype(source)
        outs = [w.new_empty(w.shape, dtype=target) for w in ws]
        steps = [
            w.new_empty(w.shape[:1], dtype=compute_dtype(source)) if wanted else None
            for w, wanted in zip(ws, with_steps, strict=True)
        ]
        matrices = [
            (*w.shape, w.data_ptr(), w.stride(0), *addresses(*rest))
            for w, *rest in zip(ws, scales, clip_factors, bits, outs, steps, strict=True)
        ]
        run(
            "weight_cast", ws[0], matrices, *addresses(on), DTYPE_CODES[source],
            DTYPE_CODES[target], floor, multiple, full_range,
        )  # fmt: skip
        return [out.to(dtype) for out in outs], steps

    def backward(
        douts: Sequence[Tensor],
        ws: Sequence[Tensor],
        scales: Sequence[Tensor | None],
        steps: Sequence[Tensor | None],
        bits: Sequence[Tensor | None],
        on: Tensor | None,
        multiple: int,
        full_range: bool,
        clip_mask: bool,
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """dw of every matrix, and of those with a scale its gradient."""
        source = ws[0].dtype
        target = douts[0].dtype
        if target is not torch.bfloat16 and target is not compute_dtype(source):
            target = compute_dtype(source)
            douts = [dout.to(target) for dout in douts]
        dws = [w.new_empty(w.shape) for w in ws]
        dscales = [None if scale is None else scale.new_empty(scale.shape) for scale in scales]
        matrices = [
            (*w.shape, dout.data_ptr(), dout.stride(0), w.data_ptr(), w.stride(0),
             *addresses(*rest))
            for dout, w, *rest in zip(
                douts, ws, scales, steps, bits, dws, dscales, strict=True
            )
        ]  # fmt: skip
        run(
            "weight_cast_backward", ws[0], matrices, *addresses(on), DTYPE_CODES[source],
            DTYPE_CODES[target], multiple, full_range, clip_mask,
        )  # fmt: skip
        return dws, dscales

    return {"forward": forward, "backward": backward}
