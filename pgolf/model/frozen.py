"""A copy of a model whose weights are cast once, for passes that train nothing."""

from collections.abc import Mapping

import torch
from torch import Tensor

from pgolf.model.embeddings import Table
from pgolf.model.gpt import GPT
from pgolf.model.masters import Masters
from pgolf.model.matrices import Matrix


def frozen_copy(
    model: GPT,
    state: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    ops: Mapping[str, str] | None = None,
) -> GPT:
    """The same function without late QAT, with matrices and tables in the dtype of activations.

    What is in that dtype already is shared with the model, not copied: do not train it meanwhile.

    Args:
        state: other parameters by name, such as averaged ones; None is the model's own.
        dtype: of activations, matrices and tables; None is the model's.
        ops: operator -> implementation; those that are not named are the reference. Attention is
            the model's where the dtype is, and the reference elsewhere.
    """
    dtype = dtype or model.compute_dtype
    attention = model.ops["attention"] if dtype == model.compute_dtype else "reference"
    with torch.device("meta"):
        copy = GPT(model.config, dtype, 0, {**(ops or {}), "attention": attention})
    cast = {f"{name}.weight" for name, m in copy.named_modules() if isinstance(m, Matrix | Table)}
    state = state or model.export_state()
    copy.load_state_dict(
        {name: t.detach().to(dtype if name in cast else t.dtype) for name, t in state.items()},
        assign=True,
    )
    copy.rope_cos, copy.rope_sin = model.rope_cos, model.rope_sin
    copy.requires_grad_(False)
    for block in copy.blocks:
        block.published = block.weights(dtype)
    if Masters:  # (In a script nobody changes weights.)
        packed = {id(p) for block in copy.blocks for p in block.packs()}
        names = [name for name, p in copy.named_parameters() if id(p) in packed]
        copy.masters = Masters(copy, names, "make the frozen copy anew")
    return copy
