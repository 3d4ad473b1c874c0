"""Checkpoints of public scripts, in both their forms, compute what the specification says."""

import dataclasses

import pytest
import torch
from torch import Tensor

from pgolf.config import Config, ModelConfig, parse_overrides, with_overrides
from pgolf.errors import ConfigError
from pgolf.model import GPT
from pgolf.model.public_names import from_public

from . import spec_model
from .published import PUBLISHED, small

CONFIG = small(PUBLISHED["pr1473"], backout=True)


def public(config: ModelConfig = CONFIG, seed: int = 0) -> dict[str, Tensor]:
    """A state dict as PR 414's script names it; factors of one number have the shape (1,)."""
    g = torch.Generator().manual_seed(seed)
    layers, dim = config.layers, config.dim
    kv = dim // config.heads * config.kv_heads
    shapes = {
        "tok_emb.weight": (config.vocab_size, dim),
        "bigram.embed.weight": (config.bigram_buckets, config.bigram_dim),
        "bigram.proj.weight": (dim, config.bigram_dim),
        "bigram.scale": (),
        "smear.gate": (dim,),
        "ve_shared.embed.weight": (config.vocab_size, config.ve_dim),
        "ve_shared.proj.weight": (kv, config.ve_dim),
        "ve_shared.scale": (),
        "ve_layer_scales.0": (1,),
        "ve_layer_scales.1": (1,),
        "skip_weights": (layers // 2, dim),
        "backout_lambda": (1,),
    }
    for i in range(layers):
        block = {
            "attn_scale": (dim,),
            "mlp_scale": (dim,),
            "resid_mix": (2, dim),
            "attn.q_gain": (config.heads,),
            "attn.c_q.weight": (dim, dim),
            "attn.c_k.weight": (kv, dim),
            "attn.c_v.weight": (kv, dim),
            "attn.proj.weight": (dim, dim),
            "mlp.fc.weight": (config.mlp_hidden, dim),
            "mlp.proj.weight": (dim, config.mlp_hidden),
        }
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return {name: torch.randn(shape, generator=g) / 2 for name, shape in shapes.items()}


def banked(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights as PR 1019's script keeps them."""

    def stacked(*roles: str) -> Tensor:
        names = [f"blocks.{i}.{role}.weight" for role in roles for i in range(CONFIG.layers)]
        return torch.stack([state[name] for name in names])

    banks = {
        "qo_bank": stacked("attn.c_q", "attn.proj"),
        "kv_bank": stacked("attn.c_k", "attn.c_v"),
        "mlp_up_bank": stacked("mlp.fc"),
        "mlp_down_bank": stacked("mlp.proj"),
    }
    alone = {n: t for n, t in state.items() if ".attn.c_" not in n and ".mlp." not in n}
    return banks | {n: t for n, t in alone.items() if not n.endswith("attn.proj.weight")}


FORMS = {
    "layers": dict,
    "banks": banked,
    "wrapped": lambda state: {f"_orig_mod.{name}": value for name, value in state.items()},
    "with_buffers": lambda s: s | {"blocks.0.attn.rotary.inv_freq": torch.ones(2)},
}


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_those_of_the_specification(form):
    state = public()
    model = GPT(CONFIG, max_length=8)
    model.load_state_dict(from_public(FORMS[form](state), CONFIG), strict=True)
    ids = torch.randint(CONFIG.vocab_size, (2, 7), generator=torch.Generator().manual_seed(1))
    same = {"backout": state["backout_lambda"].squeeze()} | {
        name: value.double() for name, value in state.items()
    }
    expected = spec_model.logits(same, CONFIG, ids)
    with torch.no_grad():
        got = model.logits(model.features(ids))
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


def refused(state: dict[str, Tensor], **changes) -> str:
    with pytest.raises(ConfigError) as error:
        from_public(state, dataclasses.replace(CONFIG, **changes))
    return str(error.value)


def test_all_that_does_not_fit_is_listed_once_with_the_settings_that_would():
    message = refused(public(), mlp_hidden=24, backout=False, ve_layers="none", bigram_buckets=50)
    shapes = "20 x 16 in the file, 24 x 16 in the model (11 of them)"
    assert f"blocks.*.mlp.fc.weight: {shapes}" in message
    assert "backout: not in the model" in message
    assert "mlp_hidden=20" in message and "backout=true" in message
    assert "bigram_buckets=37" in message and "ve_layers=last:2" in message
    assert len(message.splitlines()) < 12


@pytest.mark.parametrize(
    "changes",
    [
        dict(layers=9, ve_layers="last:2"),
        dict(dim=32, heads=8, kv_heads=8),
        dict(vocab_size=30, ve_dim=4, bigram_dim=3),
        dict(smear="off", resid_mix="off", unet_skips=False),
        dict(bigram_buckets=0, tied_embedding=False),
    ],
)
def test_the_settings_it_names_do_fit(changes):
    """They are words of the command line: with them the file is taken."""
    config = dataclasses.replace(CONFIG, **changes)
    remedy = refused(public(), **changes).rpartition("the file's shapes are those of ")[2]
    words = [word.rstrip(":") for word in remedy.split(" add that")[0].split()]
    fitting = with_overrides(Config(model=config), parse_overrides(words)).model
    assert from_public(public(), fitting)


def test_what_the_model_lacks_is_named():
    extra = {"mtp_heads.0.weight": torch.ones(24, 16), "blocks.3.attn.vr_lambda": torch.ones(2)}
    message = refused(public() | extra)
    assert "mtp_heads.*.weight: not in the model, which has no heads for later tokens" in message
    assert "vr_lambda: not in the model, which has no value residuals" in message
    assert "a file of another model" in message


def test_missing_weights_and_numbers_that_are_none():
    state = public()
    del state["smear.gate"]
    state["bigram.scale"] = torch.tensor(float("nan"))
    message = refused(state)
    assert "smear.gate: missing in the file" in message
    assert "bigram.scale: not all finite numbers" in message


def test_a_bank_that_is_none():
    assert "qo_bank of shape 3 x 4 x 4 is no bank" in refused({"qo_bank": torch.ones(3, 4, 4)})
    both = banked(public()) | {"blocks.0.attn.c_q.weight": torch.ones(16, 16)}
    assert "twice" in refused(both)
