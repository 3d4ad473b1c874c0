"""Weights to stored tensors by the plan, with the error that this costs."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pgolf.config import QuantConfig
from pgolf.errors import TrainingError
from pgolf.progress import Progress
from pgolf.quant.dequantize import QuantizedTensor, dequantize
from pgolf.quant.gptq_lite import clip_factors, quantize_rows
from pgolf.quant.policy import TensorPlan, plan


@dataclass(frozen=True)
class TensorStats:
    """What quantising one tensor did.

    Attributes:
        relative_error: norm of the error as a share of the norm of the weights.
        floor_share: share of rows whose clip was below the floor.
    """

    relative_error: float
    floor_share: float


@dataclass(frozen=True)
class QuantizedModel:
    """Stored tensors by name, in the order of the state dict, with their plans and errors."""

    tensors: dict[str, QuantizedTensor]
    plans: dict[str, TensorPlan]
    stats: dict[str, TensorStats]


def quantize(
    state: Mapping[str, Tensor], config: QuantConfig, progress: bool = True
) -> QuantizedModel:
    """Quantise parameters on the device where they are; the result is on the CPU.

    Args:
        state: parameters by name (no buffers), of any float dtype.

    Raises:
        TrainingError: a weight is not finite, or too large for fp16; names the tensor.
        ConfigError: the settings do not fit these tensors.
    """
    plans = plan(config, {name: tuple(tensor.shape) for name, tensor in state.items()})
    tensors, stats = {}, {}
    with Progress("quantising", len(state), "tensors", enabled=progress) as bar:
        for name, tensor in state.items():
            tensors[name], stats[name] = _quantize_tensor(name, tensor.detach(), plans[name])
            bar.update(note=name)
    return QuantizedModel(tensors, plans, stats)


def _quantize_tensor(
    name: str, tensor: Tensor, how: TensorPlan
) -> tuple[QuantizedTensor, TensorStats]:
    w = tensor.float()
    bad = w.numel() - int(torch.isfinite(w).sum())
    if bad:
        raise TrainingError(
            f"{name} has {bad} of {w.numel()} weights that are not finite: "
            "the training diverged, quantise an earlier checkpoint"
        )
    floor_share = 0.0
    if how.kind == "float16":
        q = QuantizedTensor(w.to(torch.float16).cpu())
        if not torch.isfinite(q.data).all():
            raise TrainingError(f"{name} has weights above fp16's 65504: {w.abs().max():g}")
    else:
        factors = clip_factors(w, how)
        codes, scale = quantize_rows(w, factors, how)
        q = QuantizedTensor(codes.cpu(), how.bits, scale.cpu())
        floor_share = (w.abs().amax(dim=1) * factors < how.floor).float().mean().item()
    return q, TensorStats(relative_error(w, q), floor_share)


def relative_error(w: Tensor, q: QuantizedTensor) -> float:
    """Norm of (decoded - w) as a share of the norm of w; 0 if both are zero."""
    w = w.detach().float().cpu()
    error, norm = torch.linalg.vector_norm(dequantize(q) - w), torch.linalg.vector_norm(w)
    return (error / norm).item() if error else 0.0
