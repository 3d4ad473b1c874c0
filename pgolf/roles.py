"""What a parameter is, by its name: the one place that reads names.

    blocks.3.attn.c_q.weight     matrix   attn     every weight of a block
    bigram.proj.weight           matrix   bigram   and ve_shared.proj.weight: side projections
    tok_emb.weight               table    tok      and lm_head.weight
    bigram.embed.weight          table    bigram
    ve_shared.embed.weight       table    ve
    blocks.3.attn.q_gain         vector   scalars  all that is left
"""

import re

_GROUPS = {"tok_emb": "tok", "lm_head": "tok", "bigram": "bigram", "ve_shared": "ve"}


def kind(name: str) -> str:
    """'matrix', 'table' (read by rows, or the output matrix) or 'vector' (scalars too)."""
    parts = name.split(".")
    if parts[-1] != "weight":
        return "vector"
    if parts[0] == "blocks" or is_side_projection(name):
        return "matrix"
    return "table" if parts[0] in _GROUPS else "vector"


def is_side_projection(name: str) -> bool:
    """Whether this is the matrix between a narrow table and the width of the model."""
    return name in ("bigram.proj.weight", "ve_shared.proj.weight")


def group(name: str) -> str:
    """Part of the model: attn, mlp, tok, bigram, ve, or scalars for all that is no matrix."""
    parts = name.split(".")
    if parts[-1] != "weight":
        return "scalars"
    if parts[0] == "blocks" and parts[2:3] in (["attn"], ["mlp"]):
        return parts[2]
    return _GROUPS.get(parts[0], "scalars")


def without_layer(name: str) -> str:
    """The name that like tensors of all layers have."""
    return re.sub(r"\d+", "", name)
