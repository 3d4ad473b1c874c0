"""Initial weights, as the published scripts set them (drawn on the CPU: the same on any device)."""

import torch
from torch import Tensor, nn

from pgolf.model.gpt import GPT
from pgolf.model.matrices import Matrix


def _phase(layer: int, layers: int) -> float:
    """PR 478's weight of x in resid_mix: sigmoid(3 (i / (L - 1) - 0.5))."""
    return torch.sigmoid(torch.tensor(3 * (layer / max(layers - 1, 1) - 0.5))).item()


def _orthogonal(weight: Tensor, generator: torch.Generator, gain: float = 1.0) -> None:
    nn.init.orthogonal_(weight, gain=gain, generator=generator)


@torch.no_grad()
def init_weights(model: GPT, seed: int) -> None:
    """Fill every parameter of a model that lies on the CPU.

    Queries, keys, values and MLP up-projections are orthogonal; output projections, the bigram
    table and an untied output matrix start at zero, so the first loss is log(V).
    """
    config = model.config
    g = torch.Generator().manual_seed(seed)
    side_gain = (2 * config.layers) ** -0.5 if config.proj_init == "scaled" else 1.0
    model.tok_emb.weight.normal_(0, config.embed_std, generator=g)
    if model.lm_head is not None:
        model.lm_head.weight.zero_()
    if model.bigram is not None:
        model.bigram.embed.weight.zero_()
        model.bigram.scale.fill_(0.05)
        _init_side(model.bigram.proj, g, side_gain)
    if model.smear is not None:
        model.smear.gate.zero_()
    if model.ve_index:
        model.ve_shared.embed.weight.normal_(0, 0.01, generator=g)
        model.ve_shared.scale.fill_(0.1)
        _init_side(model.ve_shared.proj, g, side_gain)
        for scale in model.ve_layer_scales:
            scale.fill_(1.0)
    if model.skip_weights is not None:
        model.skip_weights.fill_(1.0)
    if model.backout is not None:
        model.backout.fill_(0.2)
    for i, block in enumerate(model.blocks):
        for matrix in (block.attn.c_q, block.attn.c_k, block.attn.c_v, block.mlp.fc):
            _orthogonal(matrix.weight, g)
        for matrix in (block.attn.proj, block.mlp.proj):
            matrix.weight.zero_()
        block.attn.q_gain.fill_(config.qk_gain)
        block.attn_scale.fill_(1.0)
        block.mlp_scale.fill_(1.0)
        if block.resid_mix is not None:
            keep = _phase(i, config.layers) if config.resid_mix == "phase" else 1.0
            block.resid_mix[0].fill_(keep)
            block.resid_mix[1].fill_(1.0 - keep)


def _init_side(matrix: Matrix | None, generator: torch.Generator, gain: float) -> None:
    if matrix is not None:
        _orthogonal(matrix.weight, generator, gain)
