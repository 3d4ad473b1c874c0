"""One second step for the sums over tokens of all layers (`pgolf.ops.part_sums`)."""

from collections.abc import Sequence

from torch import Tensor

from pgolf.model.layers import LayerVectors
from pgolf.ops.part_sums import deferred
from pgolf.ops.qk_rope import sums_of as sums_of_gain
from pgolf.ops.residual_norm import sums_of as sums_of_norm


def with_deferred_sums(layers: Sequence[LayerVectors], x0: Tensor, impl: str) -> list[LayerVectors]:
    """The vectors of layers whose kernels leave the second step of their sums to one at the end.

    Args:
        x0: (N, T, D) first embedding.
        impl: of `part_sums`.
    """
    tokens = x0.shape[:-1].numel()
    norms = [sums_of_norm(tokens, None, v.skip_weight, v.mix) for v in layers]
    gains = [sums_of_gain(tokens, v.gain) for v in layers]
    sums = iter(deferred([s for s in (*norms, *gains) if s.parameters], impl))
    norm_sums, gain_sums = (
        [next(sums) if s.parameters else None for s in group] for group in (norms, gains)
    )
    return [
        v._replace(norm_sums=norm, gain_sums=gain)
        for v, norm, gain in zip(layers, norm_sums, gain_sums, strict=True)
    ]
