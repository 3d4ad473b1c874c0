"""What a parameter is, by its name."""

import pytest
import torch

from pgolf import recipes, roles
from pgolf.model import GPT


@pytest.mark.parametrize(
    ("name", "kind", "group"),
    [
        ("blocks.3.attn.c_q.weight", "matrix", "attn"),
        ("blocks.3.mlp.proj.weight", "matrix", "mlp"),
        ("tok_emb.weight", "table", "tok"),
        ("lm_head.weight", "table", "tok"),
        ("bigram.proj.weight", "matrix", "bigram"),
        ("ve_shared.embed.weight", "table", "ve"),
        ("bigram.scale", "vector", "scalars"),
        ("blocks.3.attn.q_gain", "vector", "scalars"),
        ("blocks.3.resid_mix", "vector", "scalars"),
        ("skip_weights", "vector", "scalars"),
    ],
)
def test_kind_and_group(name: str, kind: str, group: str):
    assert (roles.kind(name), roles.group(name)) == (kind, group)


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_matrix_of_a_recipe_is_known(name: str):
    """A weight of two dimensions is a matrix or a table, and nothing else is."""
    config = recipes.get(name).config({"tied_embedding": False})
    with torch.device("meta"):
        parameters = dict(GPT(config.model).named_parameters())
    for parameter, value in parameters.items():
        whole = parameter.endswith(".weight") and value.ndim == 2
        assert (roles.kind(parameter) != "vector") == whole, parameter
        assert (roles.group(parameter) != "scalars") == whole, parameter
