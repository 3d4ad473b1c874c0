"""The model a second time, from the written specification alone: plain, slow, by name of parameter.

No module, no fused attention, no broadcasting trick: loops over rows, positions and heads, and
matrices written out, so that it shares no idea with `pgolf.model` except the formulas. Everything
follows the dtype of the parameters (float64 in the tests).
Letters: B rows, T positions, D model width, H query heads, G key/value heads, d head width,
V vocabulary, L layers.
"""

import dataclasses
import math
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from pgolf.config import ModelConfig
from pgolf.settings import resolve_layers

Params = Mapping[str, Tensor]


def norm(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, no weights."""
    mean_square = (x * x).sum(-1, keepdim=True) / x.shape[-1]
    return x / torch.sqrt(mean_square + eps)


def bigram_index(ids: list[int], buckets: int) -> list[int]:
    """Rows of the bigram table for one row of ids, in Python integers."""
    rows = [buckets - 1]  # position 0 has no predecessor: the last row is kept for it
    for t in range(1, len(ids)):
        rows.append(((36313 * ids[t]) ^ (27191 * ids[t - 1])) % (buckets - 1))
    return rows


def embed(p: Params, cfg: ModelConfig, ids: Tensor) -> Tensor:
    """Token table plus hashed bigram table, before any norm: (B, T) -> (B, T, D)."""
    rows = []
    for row in ids.tolist():
        x = torch.stack([p["tok_emb.weight"][token] for token in row])
        if cfg.bigram_buckets:
            index = bigram_index(row, cfg.bigram_buckets)
            pair = torch.stack([p["bigram.embed.weight"][i] for i in index])
            if cfg.bigram_dim != cfg.dim:
                pair = pair @ p["bigram.proj.weight"].T
            x = x + p["bigram.scale"] * pair
        rows.append(x)
    return torch.stack(rows)


def smear(p: Params, cfg: ModelConfig, x: Tensor, ids: Tensor) -> Tensor:
    """(1 - g) x_t + g x_{t-1}, zeros before the first position (and before a masked BOS)."""
    if cfg.smear == "off":
        return x
    gate = 1 / (1 + torch.exp(-p["smear.gate"]))
    rows = []
    for b in range(x.shape[0]):
        out = []
        for t in range(x.shape[1]):
            first = t == 0 or (cfg.smear == "bos_masked" and int(ids[b, t]) == cfg.bos_id)
            before = torch.zeros_like(x[b, t]) if first else x[b, t - 1]
            out.append((1 - gate) * x[b, t] + gate * before)
        rows.append(torch.stack(out))
    return torch.stack(rows)


def rotation(t: int, width: int, dims: int, base: float) -> Tensor:
    """The (d, d) matrix that RoPE applies to a head vector at position t (half-split pairs)."""
    matrix = torch.eye(width, dtype=torch.float64)
    for j in range(dims // 2):
        angle = t * base ** (-2 * j / dims)
        i = j + dims // 2
        matrix[j, j], matrix[j, i] = math.cos(angle), math.sin(angle)
        matrix[i, j], matrix[i, i] = -math.sin(angle), math.cos(angle)
    return matrix


def head_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention of one head, (T, d) each, one query at a time."""
    out = []
    for t in range(q.shape[0]):
        score = torch.stack([q[t] @ k[s] for s in range(t + 1)]) / math.sqrt(q.shape[1])
        weight = torch.exp(score - score.max().detach())
        out.append((weight / weight.sum()) @ v[: t + 1])
    return torch.stack(out)


def exclude_self(y: Tensor, v: Tensor) -> Tensor:
    """XSA of one head: remove from y (T, d) its part along the value at the same position."""
    out = []
    for t in range(y.shape[0]):
        length = torch.sqrt((v[t] * v[t]).sum())
        n = v[t] / (length if length.item() > 1e-12 else 1e-12)
        out.append(y[t] - (y[t] @ n) * n)
    return torch.stack(out)


def attention(p: Params, cfg: ModelConfig, layer: int, h: Tensor, ve: Tensor | None) -> Tensor:
    """Projections, head norms, RoPE, gain, attention, XSA, output projection for (B, T, D)."""
    prefix = f"blocks.{layer}.attn."
    d = cfg.dim // cfg.heads
    turns = [rotation(t, d, cfg.rope_dims, cfg.rope_base).to(h) for t in range(h.shape[1])]
    rows = []
    for b in range(h.shape[0]):
        q_all, k_all, v_all = (h[b] @ p[f"{prefix}c_{c}.weight"].T for c in "qkv")
        if ve is not None:
            v_all = v_all + ve[b]
        heads = []
        for head in range(cfg.heads):
            group = head // (cfg.heads // cfg.kv_heads)
            q = q_all[:, head * d : (head + 1) * d]
            k = k_all[:, group * d : (group + 1) * d]
            v = v_all[:, group * d : (group + 1) * d]
            if cfg.qk_norm:
                q, k = norm(q, cfg.norm_eps), norm(k, cfg.norm_eps)
            q = torch.stack([turn @ vector for turn, vector in zip(turns, q, strict=True)])
            k = torch.stack([turn @ vector for turn, vector in zip(turns, k, strict=True)])
            y = head_attention(p[f"{prefix}q_gain"][head] * q, k, v)
            if layer in resolve_layers("xsa_layers", cfg.xsa_layers, cfg.layers):
                y = exclude_self(y, v)
            heads.append(y)
        rows.append(torch.cat(heads, dim=1) @ p[f"{prefix}proj.weight"].T)
    return torch.stack(rows)


def mlp(p: Params, cfg: ModelConfig, layer: int, h: Tensor) -> Tensor:
    """Squared (leaky) relu between two matrices."""
    z = h @ p[f"blocks.{layer}.mlp.fc.weight"].T
    slope = cfg.leaky_slope if cfg.activation == "leaky_relu2" else 0.0
    activated = torch.where(z > 0, z * z, (slope * z) * (slope * z))
    return activated @ p[f"blocks.{layer}.mlp.proj.weight"].T


def block(
    p: Params, cfg: ModelConfig, layer: int, x: Tensor, x0: Tensor, ve: Tensor | None
) -> Tensor:
    """x0 mix, then attention and MLP, each scaled per channel and added."""
    prefix = f"blocks.{layer}."
    if cfg.resid_mix != "off":
        mix = p[prefix + "resid_mix"]
        x = mix[0] * x + mix[1] * x0
    scale = 1 / math.sqrt(layer + 1) if cfg.layer_scale else 1.0
    h = norm(x, cfg.norm_eps) * scale
    x = x + p[prefix + "attn_scale"] * attention(p, cfg, layer, h, ve)
    h = norm(x, cfg.norm_eps) * scale
    return x + p[prefix + "mlp_scale"] * mlp(p, cfg, layer, h)


def value_embedding(p: Params, ids: Tensor) -> Tensor:
    """The shared value embedding of every position: (B, T) -> (B, T, G d)."""
    table, matrix = p["ve_shared.embed.weight"], p["ve_shared.proj.weight"]
    rows = [torch.stack([table[token] @ matrix.T for token in row]) for row in ids.tolist()]
    return torch.stack(rows) * p["ve_shared.scale"]


def logits(p: Params, cfg: ModelConfig, ids: Tensor) -> Tensor:
    """Capped logits, (B, T) -> (B, T, V)."""
    if cfg.documents:  # each of them as if it were all
        alone = dataclasses.replace(cfg, documents=False)
        rows = []
        for row in ids:
            starts = [0, *(t for t in range(1, len(row)) if int(row[t]) == cfg.bos_id), len(row)]
            each = [logits(p, alone, row[None, a:b])[0] for a, b in pairwise(starts)]
            rows.append(torch.cat(each))
        return torch.stack(rows)
    x = smear(p, cfg, norm(embed(p, cfg, ids), cfg.norm_eps), ids)
    x0 = x
    ve_layers = resolve_layers("ve_layers", cfg.ve_layers, cfg.layers)
    shared = value_embedding(p, ids) if ve_layers else None
    encoders = cfg.layers // 2
    outputs: list[Tensor] = []  # of blocks, by layer
    for layer in range(cfg.layers):
        j = layer - encoders
        if cfg.unet_skips and 0 <= j < encoders:
            x = x + p["skip_weights"][j] * outputs[encoders - 1 - j]  # last in, first out
        ve = None
        if layer in ve_layers:
            ve = shared * p[f"ve_layer_scales.{ve_layers.index(layer)}"]
        x = block(p, cfg, layer, x, x0, ve)
        outputs.append(x)
    if cfg.backout:
        x = x - p["backout"] * outputs[cfg.layers // 2]
    head = p["tok_emb.weight"] if cfg.tied_embedding else p["lm_head.weight"]
    z = norm(x, cfg.norm_eps) @ head.T
    return cfg.softcap * torch.tanh(z / cfg.softcap) if cfg.softcap else z


def loss(p: Params, cfg: ModelConfig, ids: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats."""
    z = logits(p, cfg, ids)
    total = 0.0
    for b in range(ids.shape[0]):
        for t in range(ids.shape[1]):
            total = total + torch.logsumexp(z[b, t], 0) - z[b, t, int(targets[b, t])]
    return total / ids.numel()
