"""The transformer of the four published systems, every technique switchable by ModelConfig.

Forward pass: embed (+ bigram), norm, smear; blocks with U-Net skips; norm; capped logits.
Shapes: ids and targets (N, T) int64, x (N, T, D), logits (.., V).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pgolf.config import ModelConfig
from pgolf.device import DTYPES
from pgolf.model.deferred_sums import with_deferred_sums
from pgolf.model.embeddings import BigramHash, SmearGate, Table, ValueEmbedding
from pgolf.model.joined import joins, with_joins
from pgolf.model.layers import Block, LayerVectors, Stream, TokenRows, linear_of_branches
from pgolf.model.masters import Masters
from pgolf.ops.attention import attention, most_documents
from pgolf.ops.embed_smear import embed_smear
from pgolf.ops.operator import OPERATORS
from pgolf.ops.qk_rope import rope_table
from pgolf.ops.residual_norm import residual_norm
from pgolf.ops.softcap_cross_entropy import softcap_cross_entropy, softcap_logits
from pgolf.ops.token_sums import shared_orders
from pgolf.ops.varlen import document_borders
from pgolf.settings import resolve_layers


def operator_sizes(
    config: ModelConfig, dtype: torch.dtype, ns_dtype: torch.dtype
) -> dict[str, dict[str, Any]]:
    """What the limits of operators are about, by operator: arguments of their `obstacle`.

    Args:
        dtype: of activations.
        ns_dtype: of Muon's iteration.
    """
    head, group = config.dim // config.heads, config.heads // config.kv_heads
    table = DTYPES[config.table_dtype]
    return {
        "attention": {"size": head, "documents": config.documents},
        "embed_smear": {"width": config.dim, "table": table, "dtype": dtype},
        "qk_rope": {"size": head},
        "linear_qk_rope": {
            "size": head, "heads": config.heads, "kv_heads": config.kv_heads,
            "pairs": config.rope_dims // 2, "width": config.dim,
        },
        "xsa": {"size": head, "share": group},
        "xsa_linear": {
            "size": head, "share": group, "heads": config.heads, "width": config.dim
        },
        "residual_norm": {"width": config.dim},
        "linear_residual": {"width": config.dim, "inner": config.dim},
        "linear_mix": {"width": config.dim, "inner": config.mlp_hidden},
        "norm_mlp": {"width": config.dim, "hidden": config.mlp_hidden},
        "softcap_cross_entropy": {"columns": config.vocab_size},
        "muon_momentum": {"dtype": ns_dtype},
        "newton_schulz": {"dtype": ns_dtype},
    }


class GPT(nn.Module):
    """A decoder-only language model; parameters are empty until `init_weights` or a load.

    Args:
        config: the model's section of a run's configuration.
        compute_dtype: dtype of activations and matmul inputs; losses are fp32.
        max_length: longest sequence that will be asked for.
        ops: operator -> implementation; those that are not named are the reference.
    """

    def __init__(
        self,
        config: ModelConfig,
        compute_dtype: torch.dtype = torch.float32,
        max_length: int = 2048,
        ops: Mapping[str, str] | None = None,
    ):
        super().__init__()
        self.ops = dict.fromkeys(OPERATORS, "reference") | dict(ops or {})
        self.masters: Masters | None = None  # of what blocks have `published`
        self.config, self.compute_dtype = config, compute_dtype
        table_dtype = DTYPES[config.table_dtype]
        kv_dim = config.dim // config.heads * config.kv_heads
        xsa_layers = resolve_layers("xsa_layers", config.xsa_layers, config.layers)
        self.ve_index = resolve_layers("ve_layers", config.ve_layers, config.layers)
        self.encoder = config.layers // 2 if config.unet_skips else 0

        self.tok_emb = Table(config.vocab_size, config.dim, table_dtype)
        self.lm_head = (
            None if config.tied_embedding else Table(config.vocab_size, config.dim, table_dtype)
        )
        self.bigram = (
            BigramHash(config.bigram_buckets, config.bigram_dim, config.dim, table_dtype)
            if config.bigram_buckets
            else None
        )
        self.smear = SmearGate(config.dim) if config.smear != "off" else None
        if self.ve_index:
            self.ve_shared = ValueEmbedding(config.vocab_size, config.ve_dim, kv_dim, table_dtype)
            self.ve_layer_scales = nn.ParameterList(torch.empty(()) for _ in self.ve_index)
        self.register_parameter(
            "skip_weights",
            nn.Parameter(torch.empty(self.encoder, config.dim)) if self.encoder else None,
        )
        self.register_parameter(
            "backout", nn.Parameter(torch.empty(())) if config.backout else None
        )
        self.blocks = nn.ModuleList(
            Block(config, i, i in xsa_layers, self.ops) for i in range(config.layers)
        )
        cos, sin = rope_table(max_length, config.rope_dims, config.rope_base)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)

    @property
    def head_weight(self) -> Tensor:
        """(V, D) rows that logits are taken from."""
        return (self.tok_emb if self.lm_head is None else self.lm_head).weight

    def orders(
        self, ids: Tensor, bigram_ids: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor] | None]:
        """Tokens by id, for the gradients of all tables; None where kernels do not share them."""
        impl = self.ops["embed_smear"]
        if impl not in ("cpu", "cuda") or not self.ve_index or not torch.is_grad_enabled():
            return None, None
        tables = [(ids, self.config.vocab_size)]
        if bigram_ids is None:
            return shared_orders(tables, impl)[0], None
        # (Those of bigrams are one table's only, but here they cost no launch.)
        order, of_bigrams = shared_orders([*tables, (bigram_ids, self.config.bigram_buckets)], impl)
        return order, of_bigrams

    def embed(self, ids: Tensor) -> Tensor:
        """First residual state (N, T, D): normed and smeared."""
        return self.embed_and_order(ids)[0]

    def embed_and_order(self, ids: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """`embed`, and the order of the tokens that other tables' gradients share."""
        c = self.config
        bigram = bigram_ids = scale = gate = starts = None
        own = ids == c.bos_id if c.documents else None
        if self.bigram is not None:
            bigram, bigram_ids, _ = self.bigram(ids, self.compute_dtype, own)
            scale = self.bigram.scale
        if self.smear is not None:
            gate = self.smear.gate
            starts = ids == c.bos_id if c.smear == "bos_masked" else own
        order, bigram_order = self.orders(ids, bigram_ids)
        x0 = embed_smear(
            ids, self.tok_emb.weight, bigram, scale, gate, starts, c.norm_eps, self.compute_dtype,
            self.ops["embed_smear"], bigram_ids=bigram_ids, order=order, bigram_order=bigram_order,
        )  # fmt: skip
        return x0, order

    def features(self, ids: Tensor) -> Tensor:
        """Final normed state (N, T, D)."""
        rope = self.rope_cos[: ids.size(1)], self.rope_sin[: ids.size(1)]
        attend = partial(self.attend, borders=self.borders(ids))
        x0, order = self.embed_and_order(ids)
        return self.trunk(ids, x0, rope, attend, order)

    def borders(self, ids: Tensor) -> Tensor | None:
        """Of the documents that attention stays inside of; None where it does not."""
        if not self.config.documents:
            return None
        return document_borders(ids == self.config.bos_id, self.most_documents(ids.size(1)))

    def most_documents(self, time: int) -> int:
        """How many a sequence of that length may hold; 0: any number, as they do not count."""
        return most_documents(self.ops["attention"], time) if self.config.documents else 0

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, borders: Tensor | None = None
    ) -> Tensor:
        """Causal attention over whole sequences or documents, the same in every layer."""
        return attention(q, k, v, self.ops["attention"], borders)

    def trunk(
        self,
        ids: Tensor,
        x0: Tensor,
        rope: tuple[Tensor, Tensor],
        attend: Callable[[int, Tensor, Tensor, Tensor], Tensor],
        order: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """`features` of embedded tokens.

        Args:
            x0: (N, T, D) from `embed_and_order`, or `embed`.
            rope: cos and sin (T, r/2) of the positions.
            attend: (layer, q, k, v) -> what the queries see: what a key/value cache takes over.
            order: from `embed_and_order`.
        """
        c = self.config
        if not torch.compiler.is_compiling():
            self.check_published()
        values: dict[int, TokenRows] = {}  # by layer
        if self.ve_index:
            embedded = self.ve_shared(ids, x0.dtype, self.ve_layer_scales)
            embedded = [
                r if r.ids is None else r._replace(order=order) for r in embedded
            ]
            values = dict(zip(self.ve_index, embedded, strict=True))
        skips: list[Tensor] = []
        middle = None
        stream, vectors = Stream(x0), self.vectors(x0)
        for i, block in enumerate(self.blocks):
            skip = None if vectors[i].skip_weight is None else skips.pop()
            total, stream = block(
                stream, skip, x0, vectors[i], rope, values.pop(i, None), partial(attend, i)
            )
            if 0 < i < self.encoder:
                skips.append(total)
            if self.backout is not None and i == c.layers // 2:
                stream = stream.added()
                middle = stream.x
        x, branch, scale = stream
        return residual_norm(
            x, branch=branch, branch_scale=scale, skip=middle,
            skip_weight=None if middle is None else -self.backout.expand(c.dim),
            eps=c.norm_eps, impl=self.ops["residual_norm"], linear=linear_of_branches(self.ops),
        )[1]  # fmt: skip

    def vectors(self, x0: Tensor) -> list[LayerVectors]:
        """Of all blocks, whose second half takes the skips of the first, the last one first."""
        layers = []
        for i, block in enumerate(self.blocks):
            back = i - self.encoder
            weight = self.skip_weights[back] if 0 <= back < self.encoder else None
            layers.append(block.vectors(weight, own_skip=weight is not None and back == 0))
        # (Where weight_cast folds no branch scales in, their gradients are sums over tokens too. A
        # script leaves operators out that it has no kernels for.)
        kernels = ("part_sums", "residual_norm", "qk_rope", "weight_cast")
        running = [name for name in kernels if self.ops.get(name, "reference") != "reference"]
        if len(running) < len(kernels) or not torch.is_grad_enabled():
            return layers
        if joins(self, x0.device):
            return with_joins(self, layers, x0)
        return with_deferred_sums(layers, x0, self.ops["part_sums"])

    def logits(self, x: Tensor) -> Tensor:
        """Capped logits (.., V) in fp32 of features x (.., D)."""
        return softcap_logits(x, self.head_weight.to(x.dtype), self.config.softcap)

    def forward(self, ids: Tensor, targets: Tensor, last: int = 0) -> Tensor:
        """Mean loss in nats, or with last > 0 the losses (N, last) of the last positions."""
        x = self.features(ids)
        if last:
            x, targets = x[:, -last:], targets[:, -last:]
        losses = softcap_cross_entropy(
            x.reshape(-1, x.size(-1)),
            self.head_weight.to(x.dtype),
            targets.reshape(-1),
            self.config.softcap,
            reduction="none" if last else "mean",
            impl=self.ops["softcap_cross_entropy"],
        )
        return losses.view(targets.shape) if last else losses

    def check_published(self) -> None:
        """Raise StaleWeights if a parameter was changed after passes' weights were made of it.

        A pass that is not compiled asks this itself.
        """
        if self.masters is not None:
            self.masters.check()

    def export_state(self) -> dict[str, Tensor]:
        """Parameters by name: what an artifact stores. Buffers of QAT are not among them."""
        return {name: p.detach() for name, p in self.named_parameters()}
