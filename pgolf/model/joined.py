"""Layers that are joined by products which nobody writes, where all of their kernels run.

Before the attention of layer i, with x and the branch of the MLP from the layer before it, stands

    x_in = mix0 (x + branch + w skip) + mix1 x0

With the gradient G of x_in those of mix0 x, mix0 branch, (mix0 w) skip and mix1 x0 are all G. So
mix0 goes into the rows of the matrix that the branch ends in, and the three states go on as
products with vectors (`joined_norm`). What made a state makes the sums for its vector too, where
its numbers are at hand: the norm before the MLP for x, the layer that a skip comes from, one kernel
for x0 and the G of all layers (`scaled_copies`). No sum before the mix is written but those that
are skips, and such layers alone write another gradient than G. `resid_mix` and `skip_weights` get
theirs from these vectors by autograd.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pgolf.model.layers import BlockWeights, LayerVectors, Stream
from pgolf.ops.factored import Factored
from pgolf.ops.inputs import autocasting
from pgolf.ops.joined_norm import joined_norm
from pgolf.ops.norm_mlp import sums_of as sums_of_mlp
from pgolf.ops.part_sums import Sums, deferred
from pgolf.ops.qk_rope import sums_of as sums_of_gain
from pgolf.ops.residual_norm import residual_norm
from pgolf.ops.residual_norm import sums_of as sums_of_norm
from pgolf.ops.scaled_copies import scaled_copies
from pgolf.ops.scaled_copies import sums_of as sums_of_copies
from pgolf.ops.stacked import rows_of, stacked
from pgolf.ops.weight_cast import weight_cast_all

if TYPE_CHECKING:
    from pgolf.model.gpt import GPT


class Join(NamedTuple):
    """How a block takes the state before it, and hands on the one before its MLP.

    Attributes:
        weights: of the block, in whose `down` is the next layer's factor.
        x0: (N, T, D) copy of the first embedding that stands for the product with `x0_scale` (D,).
        x_scale: (D,) of x; None in the first layer, and where the sum is a later layer's skip.
        skip_scale: (D,) of a skip, if it takes one.
        mix: (2, D) where the sum is a later layer's skip; else None.
        total_scale: (D,) that layer's factor of it.
        sums: what takes the gradients of mix[0] and total_scale.
        goes_on: the same of the state before the MLP: x_in_scale and sums of `residual_norm` or
            `norm_mlp`.
    """

    weights: BlockWeights
    x0: Tensor
    x0_scale: Tensor
    x_scale: Tensor | None
    skip_scale: Tensor | None
    mix: Tensor | None
    total_scale: Tensor | None
    sums: Tensor | None
    goes_on: dict[str, Any]

    def enter(
        self, stream: Stream, skip: Tensor | None, norm: dict[str, Any]
    ) -> tuple[Tensor | None, Tensor, Factored]:
        """The sum, where it is a skip, x_in and h. norm: scale, eps, impl and linear."""
        if self.mix is not None:
            return residual_norm(
                stream.x, branch=stream.branch, x0=self.x0, mix=self.mix, x0_is_product=True,
                total_scale=self.total_scale, keep_total=True, factored=True, sums=self.sums,
                **norm,
            )  # fmt: skip
        if self.x_scale is None:
            return None, *joined_norm([self.x0], [self.x0_scale], **norm)
        terms, factors = [stream.branch, stream.x], [None, self.x_scale]
        if skip is not None:
            terms, factors = [*terms, skip], [*factors, self.skip_scale]
        return None, *joined_norm([*terms, self.x0], [*factors, self.x0_scale], **norm)


def joins(model: "GPT", device: torch.device) -> bool:
    """Whether the layers of a model whose kernels run have what is joined here.

    Under autocast a state is of another dtype than the products that it is joined with.
    """
    mixes = all(block.resid_mix is not None for block in model.blocks)
    kernels = model.ops["scaled_copies"] != "reference" and not autocasting(device)
    return mixes and kernels and model.backout is None


class _Vectors(NamedTuple):
    """Factors by layer, of those that have one.

    Attributes:
        own: mix[0] of those whose sums are skips.
        of_x: of the state before the last MLP.
        folded: the same once more, for the matrix that this MLP ends in.
        of_skip: of a skip.
    """

    own: dict[int, Tensor]
    of_x: dict[int, Tensor]
    folded: dict[int, Tensor]
    of_skip: dict[int, Tensor]
    of_x0: Tensor  # (layers, D)


def _vectors(model: "GPT") -> _Vectors:
    """Made of all layers at once: every operation is a launch."""
    count, encoder = len(model.blocks), model.encoder
    own, other = stacked([block.resid_mix for block in model.blocks]).unbind(1)
    first = max(encoder, 1)  # layers before it are skips of later ones
    of_x, of_skip = own[first:], own[:0]
    if encoder:  # x + w x: a factor of the mix
        weights = model.skip_weights
        of_x = torch.cat(((1 + weights[:1]) * of_x[:1], of_x[1:]))
        of_skip = weights[1:] * own[encoder + 1 : 2 * encoder]
    # (Two gradients of one row would be added up in a launch of their own, for each of the rows.)
    parts = {"own": own[1:first], "of_x": of_x, "folded": of_x, "of_skip": of_skip}
    begins = {"own": 1, "of_x": first, "folded": first, "of_skip": encoder + 1}
    # x0 is the state before the first layer.
    table = torch.cat((own[:1] + other[:1], other[1:], *parts.values()))
    of_x0, table = table.split([count, table.size(0) - count])
    rows = iter(rows_of(table) if count > 1 else [])
    factors = {
        name: {begins[name] + i: next(rows) for i in range(part.size(0))}
        for name, part in parts.items()
    }
    return _Vectors(**factors, of_x0=of_x0)


def with_joins(model: "GPT", layers: Sequence[LayerVectors], x0: Tensor) -> list[LayerVectors]:
    """The vectors of layers, each with its `Join`."""
    count, tokens, encoder = len(layers), x0.shape[:-1].numel(), model.encoder
    own, of_x, folded, of_skip, of_x0 = _vectors(model)
    weights = [block.published or block.weights(x0.dtype) for block in model.blocks]
    downs = weight_cast_all(
        [weights[i - 1].down for i in folded], list(folded.values()),
        impl=model.ops["weight_cast"], dtype=x0.dtype,
    ) if folded else []  # fmt: skip
    for i, down in zip(folded, downs, strict=True):
        weights[i - 1] = weights[i - 1]._replace(down=down)
    # The factors of sums that are skips, for the layers that take them.
    partners = {i: of_skip[2 * encoder - i] for i in own}
    part = sums_of_norm(tokens, x_in_scale=of_x0[0]).parts

    def sums_of_x(i: int, factor: Tensor) -> Sums:  # of the state before the MLP of layer i - 1
        if model.blocks[i - 1].mlp.takes_norm(x0.device):
            return sums_of_mlp(tokens, factor)
        return Sums(part, [factor])

    wanted = [
        sums_of_copies(tokens, of_x0),
        *(sums_of_gain(tokens, v.gain) for v in layers),
        *(sums_of_x(i, factor) for i, factor in of_x.items()),
        *(Sums(part, [own[i], partner]) for i, partner in partners.items()),
    ]
    of_copies, *others = deferred(wanted, model.ops["part_sums"])
    gains, others = others[:count], others[count:]
    goes_on = {
        i - 1: {"x_in_scale": factor, "sums": sums}
        for (i, factor), sums in zip(of_x.items(), others[: len(of_x)], strict=True)
    }
    of_sums = dict(zip(partners, others[len(of_x) :], strict=True))
    copies = scaled_copies(x0, of_x0, of_copies, model.ops["scaled_copies"])
    return [
        v._replace(
            gain_sums=gains[i],
            join=Join(
                weights[i], copies[i], of_x0[i], of_x.get(i), of_skip.get(i),
                model.blocks[i].resid_mix if i in partners else None, partners.get(i),
                of_sums.get(i), goes_on.get(i, {}),
            ),
        )
        for i, v in enumerate(layers)
    ]  # fmt: skip
