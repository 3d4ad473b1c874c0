"""The modules of the transformer: weights in fp32, cast where they are used or before.

Module and parameter names are those of the contest's public scripts that have a tensor a layer;
`public_names` takes their checkpoints and those with banks. Shapes: x (N, T, D), ids (N, T); H
query heads, G key/value heads, d = D/H, F = MLP width.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgolf.config import ModelConfig
from pgolf.model.matrices import Fold, Matrix, cast_all, scaled_rows
from pgolf.ops.factored import Factored
from pgolf.ops.inputs import autocasting
from pgolf.ops.leaky_relu2_mlp import leaky_relu2_mlp
from pgolf.ops.linear_qk_rope import linear_qk_rope
from pgolf.ops.linear_residual import linear_residual
from pgolf.ops.norm_mlp import norm_mlp
from pgolf.ops.product import Product
from pgolf.ops.qk_rope import qk_rope
from pgolf.ops.residual_norm import residual_norm
from pgolf.ops.xsa import xsa
from pgolf.ops.xsa_linear import xsa_linear


class TokenRows(NamedTuple):
    """A row for each token: (N, T, C), or with ids (N, T) those of a table (V, C).

    `order` is what `pgolf.ops.token_sums.shared_orders` gives for the ids, if it is known.
    """

    rows: Tensor
    ids: Tensor | None = None
    order: tuple[Tensor, Tensor] | None = None


# q (N, T, H, d), k and v (N, T, G, d) of a layer -> what its queries see (N, T, H, d).
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class BlockWeights(NamedTuple):
    """The matrices of a block as its forward pass takes them: cast, q, k and v in one.

    `attn_scale` and `mlp_scale` (D,) are what the branches are still to be multiplied by; None
    where that is folded into the rows of `out` and `down`.
    """

    qkv: Tensor  # ((H + 2 G) d, D)
    out: Tensor  # (D, D)
    up: Tensor  # (F, D)
    down: Tensor  # (D, F)
    attn_scale: Tensor | None
    mlp_scale: Tensor | None


class LayerVectors(NamedTuple):
    """The vectors of a block as its forward pass takes them.

    `norm_sums` and `gain_sums` are what `residual_norm` and `qk_rope` leave the sums to that are
    their gradients (`with_deferred_sums`); None: they are summed there.
    """

    mix: Tensor | None  # (2, D) of the state and of x0; None mixes nothing in
    skip_weight: Tensor | None  # (D,) of another layer's state, if it takes one
    gain: Tensor  # (H,) of queries
    norm_sums: Tensor | None = None
    gain_sums: Tensor | None = None
    join: Any = None  # `pgolf.model.joined.Join`, which takes the place of mix and skip_weight


class Attention(nn.Module):
    """Causal self attention with q/k norm, partial RoPE, query gain and optional XSA."""

    def __init__(self, config: ModelConfig, exclusive: bool, ops: Mapping[str, str]):
        super().__init__()
        self.config, self.exclusive, self.ops = config, exclusive, ops
        head = config.dim // config.heads
        self.c_q = Matrix(config.dim, config.dim)
        self.c_k = Matrix(config.kv_heads * head, config.dim)
        self.c_v = Matrix(config.kv_heads * head, config.dim)
        self.proj = Matrix(config.dim, config.dim)
        self.q_gain = nn.Parameter(torch.empty(config.heads))

    def matrices(self) -> list[Matrix]:
        """Queries, keys, values, output."""
        return [self.c_q, self.c_k, self.c_v, self.proj]

    def forward(
        self,
        h: Factored,
        weights: BlockWeights,
        vectors: LayerVectors,
        rope: tuple[Tensor, Tensor],
        value: TokenRows | None,
        attend: Attend,
        as_product: bool,
    ) -> Tensor | Product:
        """h (N, T, D) normed; value (G d columns) goes to v. `as_product`: not multiplied yet."""
        c = self.config
        batch, time, _ = h.y.shape
        added, ids, order = value or (None, None, None)
        # (A script leaves linear_qk_rope out: there it is these two steps.)
        whole = self.ops.get("linear_qk_rope", "reference")
        operands, run, impls = (h.y, weights.qkv), linear_qk_rope, [whole, self.ops["qk_rope"]]
        # Under autocast values may be of another dtype than the product.
        if whole == "reference" or autocasting(h.y.device):
            operands, run, impls = [F.linear(*operands)], qk_rope, impls[1:]
        q, k, *values = run(
            *operands, *rope, vectors.gain, c.heads, c.kv_heads, c.norm_eps, c.qk_norm, added,
            *impls, factor=h.factor, split_v=self.exclusive, sums=vectors.gain_sums,
            value_ids=ids, value_order=order,
        )  # fmt: skip
        y = attend(q, k, values[0])
        if self.exclusive:
            # (A script leaves it out: there it is these two steps.)
            whole = self.ops.get("xsa_linear", "reference")
            if whole != "reference":
                return xsa_linear(y, values[1], weights.out, whole, self.ops["xsa"], as_product)
            y = xsa(y, values[1], self.ops["xsa"])
        y = y.reshape(batch, time, -1)
        return Product(y, weights.out, None) if as_product else F.linear(y, weights.out)


def linear_of_branches(ops: Mapping[str, str]) -> str:
    """What multiplies where a branch of an MLP is added up. (A script leaves `linear_mix` out.)"""
    return ops.get("linear_mix", "reference")


class MLP(nn.Module):
    """Squared (leaky) ReLU MLP."""

    def __init__(self, config: ModelConfig, ops: Mapping[str, str]):
        super().__init__()
        self.ops = ops
        self.fc = Matrix(config.mlp_hidden, config.dim)
        self.proj = Matrix(config.dim, config.mlp_hidden)
        self.slope = config.leaky_slope if config.activation == "leaky_relu2" else 0.0

    def matrices(self) -> list[Matrix]:
        """Up, down."""
        return [self.fc, self.proj]

    def takes_norm(self, device: torch.device) -> bool:
        """Whether the norm before it is left to `norm_mlp`. (A script leaves that out.)"""
        whole = self.ops.get("norm_mlp", "reference") != "reference"
        # Under autocast the state may be of another dtype than the product.
        return whole and self.ops["leaky_relu2_mlp"] == "triton" and not autocasting(device)

    def forward(
        self, h: Factored, weights: BlockWeights, as_product: bool
    ) -> Tensor | Product:
        """h (N, T, D) normed. `as_product`: not multiplied by `down` yet."""
        impl = self.ops["leaky_relu2_mlp"]
        return leaky_relu2_mlp(
            h.y, weights.up, weights.down, self.slope, h.factor, impl, as_product
        )


class Stream(NamedTuple):
    """The residual state x + scale * branch: who takes it adds it up as the first thing it does."""

    x: Tensor
    branch: Tensor | Product | None = None
    scale: Tensor | None = None  # (D,); None is 1

    def added(self) -> "Stream":
        """The same in one tensor."""
        if self.branch is None:
            return self
        scaled = self.branch
        if isinstance(scaled, Product):
            scaled = scaled.multiplied()
        if self.scale is not None:
            scaled = self.scale.to(self.x.dtype) * scaled
        return Stream(self.x + scaled)


class BlockOutput(NamedTuple):
    """What a block makes.

    Attributes:
        total: (N, T, D) its input added up, before the mix with x0: a later block's skip.
        stream: the state after it, whose last branch is left to the next block to add.
    """

    total: Tensor
    stream: Stream


class Block(nn.Module):
    """x_in = mix(x, x0);  x = x_in + a Attn(s norm(x_in));  x = x + b MLP(s norm(x)).

    Where `weight_cast` is a kernel, a and b are folded into the rows of the matrices that the
    branches end in: their gradients then cost no pass over the tokens.

    `published` is None, or weights that are read instead of what `weights` makes in every pass.
    """

    def __init__(self, config: ModelConfig, layer: int, exclusive: bool, ops: Mapping[str, str]):
        super().__init__()
        self.norm = {
            "scale": (layer + 1) ** -0.5 if config.layer_scale else 1.0,
            "eps": config.norm_eps,
            "impl": ops["residual_norm"],
            "linear": linear_of_branches(ops),
        }
        self.ops = ops
        self.published: BlockWeights | None = None
        self.attn = Attention(config, exclusive, ops)
        self.mlp = MLP(config, ops)
        self.attn_scale = nn.Parameter(torch.empty(config.dim))
        self.mlp_scale = nn.Parameter(torch.empty(config.dim))
        self.register_parameter(
            "resid_mix",
            None if config.resid_mix == "off" else nn.Parameter(torch.empty(2, config.dim)),
        )

    def matrices(self) -> list[Matrix]:
        """Queries, keys, values, output, up, down."""
        return [*self.attn.matrices(), *self.mlp.matrices()]

    def fold(self) -> Fold | None:
        """How scales go into the rows of `matrices`; None where they do not."""
        impl = self.ops["weight_cast"]
        scales = [None, None, None, self.attn_scale, None, self.mlp_scale]
        return None if impl == "reference" else Fold(impl, scales)

    def packs(self) -> list[nn.Parameter]:
        """What `weights` is made of."""
        scales = self.fold().scales if self.fold() else ()
        return [*(m.weight for m in self.matrices()), *(s for s in scales if s is not None)]

    def packed(self, qkv: Tensor, out: Tensor, up: Tensor, down: Tensor) -> BlockWeights:
        """Cast matrices, into which scales are folded as `fold` says, with what is left of them."""
        left = (None, None) if self.fold() else (self.attn_scale, self.mlp_scale)
        return BlockWeights(qkv, out, up, down, *left)

    def vectors(self, skip_weight: Tensor | None, own_skip: bool) -> LayerVectors:
        """With the weight (D,) of a skip, if it has one; `own_skip`: of the state before it."""
        mix, weight = self.resid_mix, skip_weight
        if own_skip:  # x + weight x: a factor of the mix
            own, other = (1.0, torch.zeros_like(weight)) if mix is None else mix
            mix, weight = torch.stack(((1 + weight) * own, other)), None
        return LayerVectors(mix, weight, self.attn.q_gain)

    def weights(self, dtype: torch.dtype) -> BlockWeights:
        """The matrices in `dtype`, fake-quantised in late QAT; whether scales are folded in."""
        *qkv, out, up, down = cast_all(self.matrices(), dtype, self.fold())
        return self.packed(torch.cat(qkv), out, up, down)

    def forward(
        self,
        stream: Stream,
        skip: Tensor | None,
        x0: Tensor,
        vectors: LayerVectors,
        rope: tuple[Tensor, Tensor],
        value: TokenRows | None,
        attend: Attend,
    ) -> BlockOutput:
        """What this block makes of the state before it, and of a skip (N, T, D) if it has one."""
        # What comes in is not added up yet: residual_norm adds the last block's branch and the
        # skip, mixes x0 in and norms, in one pass over the tokens; this block's MLP is left to the
        # next one likewise. `total`, the sum before the mix, is what a later block may take for
        # its skip. Scales that `weights` folded in, by the same condition, are not applied again.
        join = vectors.join
        if join is None:
            x, branch, scale = stream
            weights, goes_on = self.published or self.weights(x.dtype), {}
            total, x, h = self._normed(
                "qk_rope", x, branch=branch, branch_scale=scale, skip=skip,
                skip_weight=vectors.skip_weight, x0=x0, mix=vectors.mix, sums=vectors.norm_sums,
                keep_total=True,
            )  # fmt: skip
        else:
            weights, goes_on = join.weights, join.goes_on
            total, x, h = join.enter(stream, skip, self.norm)
        whole = self.mlp.takes_norm(x.device)
        before, behind = ({}, goes_on) if whole else (goes_on, {})
        x, h = self._attended(x, h, weights, before, vectors, rope, value, attend)
        scale = weights.mlp_scale
        as_product = self.norm["linear"] != "reference" and not autocasting(x.device)
        if as_product and scale is not None:
            weights, scale = weights._replace(down=scaled_rows(weights.down, scale)), None
        if whole:
            x, branch = norm_mlp(
                x, weights.up, weights.down, self.mlp.slope, scale=self.norm["scale"],
                eps=self.norm["eps"], factor=h.factor, as_product=as_product,
                impl=self.ops["norm_mlp"], norm_impl=self.norm["impl"], **behind,
            )  # fmt: skip
        else:
            branch = self.mlp(h, weights, as_product)
        return BlockOutput(total, Stream(x, branch, scale))

    def _attended(
        self, x: Tensor, h: Factored, weights: BlockWeights, goes_on: Mapping[str, Any], *seen: Any
    ) -> tuple[Tensor, Factored]:
        """x with what attention makes of h, and its norm; `seen` is what attention takes else."""
        # (A script leaves linear_residual out: there it is these two steps.)
        impl = self.ops.get("linear_residual", "reference")
        # Under autocast the state may be of another dtype than the product.
        if impl == "reference" or autocasting(x.device):
            branch = self.attn(h, weights, *seen, as_product=False)
            return self._normed(
                "leaky_relu2_mlp", x, branch=branch, branch_scale=weights.attn_scale, **goes_on
            )
        if weights.attn_scale is not None:
            weights = weights._replace(out=scaled_rows(weights.out, weights.attn_scale))
        z, w, out = self.attn(h, weights, *seen, as_product=True)
        norm = {"scale": self.norm["scale"], "eps": self.norm["eps"]}
        return linear_residual(
            z, w, x, out=out, factored=True, impl=impl, norm_impl=self.norm["impl"], **norm,
            **goes_on,
        )  # fmt: skip

    def _normed(self, taker: str, x: Tensor, **added: Any) -> tuple:
        """`residual_norm` of this layer; h is factored, unless its taker is plain torch."""
        factored = self.ops[taker] != "reference"
        *others, h = residual_norm(x, **added, **self.norm, factored=factored)
        return (*others, h if factored else Factored(h, None))
