"""State dicts of the contest's public scripts as parameters of our model.

Two forms: a tensor a layer, as in PR 414 and most others, whose names are ours; and banks, as in
PR 1019 and PR 1473, which hold like matrices of all layers in one tensor. In a bank of two roles
the first role of all layers comes before the second.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from pgolf.config import ModelConfig
from pgolf.errors import ConfigError
from pgolf.model.gpt import GPT
from pgolf.settings import resolve_layers

BANKS = {
    "qo_bank": ("attn.c_q", "attn.proj"),
    "kv_bank": ("attn.c_k", "attn.c_v"),
    "mlp_up_bank": ("mlp.fc",),
    "mlp_down_bank": ("mlp.proj",),
}
RENAMED = {"backout_lambda": "backout"}
WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
# Follow from settings, or are a script's own record of what it does.
DERIVED = re.compile(r"\.rotary\.(inv_freq|cos|sin)$")
# Techniques of public scripts that our model does not have, by a part of their parameters' names.
LACKING = {
    "mtp_heads": "heads for later tokens",
    "dtg_gate": "gates of tokens",
    "attn_gate": "gates of heads",
    "vr_lambda": "value residuals",
    "value_embeds": "value embeddings without a shared table",
    "skip_gates": "gated skips",
    "smear_gate": "a smear gate that reads its input",
    "resid_lambdas": "residual factors of one number a layer",
    ".bias": "biases",
    "norm.weight": "norms with weights",
}


def unbanked(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with our names, a tensor a layer; derived buffers are left out.

    Raises:
        ConfigError: a bank does not divide into its roles, or a tensor is there twice.
    """
    named: dict[str, Tensor] = {}

    def add(name: str, value: Tensor) -> None:
        if name in named:
            raise ConfigError(f"{name} is in the file twice, alone and in a bank")
        named[name] = value

    for name, value in state.items():
        for wrapper in WRAPPERS:
            name = name.removeprefix(wrapper)
        roles = BANKS.get(name)
        if roles is None:
            if not DERIVED.search(name):
                add(RENAMED.get(name, name), value)
            continue
        if value.ndim != 3 or len(value) % len(roles):
            raise ConfigError(
                f"{name} of shape {_shape(value.shape)} is no bank of {' and '.join(roles)}"
            )
        layers = len(value) // len(roles)
        for i, matrix in enumerate(value):
            add(f"blocks.{i % layers}.{roles[i // layers]}.weight", matrix)
    return named


def settings_of(state: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Any]:
    """The settings that the shapes of an unbanked state imply, as far as they do.

    Those that shapes leave open (such as which layers add a value embedding) are as in `model`
    where that agrees.
    """
    shape = {name: tuple(value.shape) for name, value in state.items()}
    settings: dict[str, Any] = {
        "tied_embedding": "lm_head.weight" not in shape,
        "backout": "backout" in shape,
        "unet_skips": "skip_weights" in shape,
    }
    if len(tok := shape.get("tok_emb.weight", ())) == 2:
        settings["vocab_size"], settings["dim"] = tok
    layers = [int(m[1]) for name in shape if (m := re.match(r"blocks\.(\d+)\.", name))]
    settings["layers"] = 1 + max(layers, default=model.layers - 1)
    heads = shape.get("blocks.0.attn.q_gain", ())
    if len(heads) == 1:
        settings["heads"] = heads[0]
        head = settings.get("dim", model.dim) // heads[0]
        rows = shape.get("blocks.0.attn.c_k.weight", (head * model.kv_heads,))[0]
        settings["kv_heads"] = rows // max(head, 1)
    settings["mlp_hidden"] = shape.get("blocks.0.mlp.fc.weight", (model.mlp_hidden,))[0]
    settings["bigram_buckets"], width = shape.get("bigram.embed.weight", (0, model.bigram_dim))
    settings["bigram_dim"] = width
    settings["ve_dim"] = shape.get("ve_shared.embed.weight", (0, model.ve_dim))[1]
    adding = sum(name.startswith("ve_layer_scales.") for name in shape)
    if adding != len(resolve_layers("ve_layers", model.ve_layers, model.layers)):
        settings["ve_layers"] = f"last:{adding}" if adding else "none"
    for key, name, on in (
        ("smear", "smear.gate", "plain"),
        ("resid_mix", "blocks.0.resid_mix", "identity"),
    ):
        if (name in shape) == (getattr(model, key) == "off"):
            settings[key] = on if name in shape else "off"
    return settings


def from_public(state: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Parameters of a GPT of these settings, by name, from a public script's state dict.

    Raises:
        ConfigError: a parameter is missing, unknown, of another shape or not finite; the message
            lists all of them, and the settings that would fit the file.
    """
    given = unbanked(state)
    with torch.device("meta"):
        wanted = {name: p.shape for name, p in GPT(model).named_parameters()}
    problems: dict[str, int] = {}
    taken = {}
    for name in [*wanted, *(given.keys() - wanted.keys())]:
        value, shape = given.get(name), wanted.get(name)
        if value is not None and shape is not None and value.numel() == shape.numel() == 1:
            value = value.reshape(shape)  # scalars are () here and (1,) there, or the reverse
        problem = _problem(name, value, shape)
        if problem:
            problem = f"{re.sub(r'[0-9]+', '*', name)}: {problem}"
            problems[problem] = problems.get(problem, 0) + 1
        else:
            taken[name] = value
    if problems:
        raise ConfigError(_refusal(problems, settings_of(given, model), model))
    return taken


def _problem(name: str, value: Tensor | None, shape: torch.Size | None) -> str:
    """Why a tensor of the file cannot be a parameter of this shape; '' if it can."""
    if value is None:
        return f"missing in the file, {_shape(shape)} in the model"
    if shape is None:
        lacking = next((what for part, what in LACKING.items() if part in name), None)
        return "not in the model" + (f", which has no {lacking}" if lacking else "")
    if value.shape != shape:
        return f"{_shape(value.shape)} in the file, {_shape(shape)} in the model"
    if not value.is_floating_point() or not torch.isfinite(value).all():
        return "not all finite numbers"
    return ""


def _refusal(problems: Mapping[str, int], fitting: Mapping[str, Any], model: ModelConfig) -> str:
    lines = [f"  {text}" + (f" ({n} of them)" if n > 1 else "") for text, n in problems.items()]
    changes = [
        f"{key}={str(value).lower() if isinstance(value, bool) else value}"
        for key, value in fitting.items()
        if value != getattr(model, key)
    ]
    remedy = (
        f"the file's shapes are those of {' '.join(changes)}: add that, or choose another --recipe"
        if changes
        else "its settings are the recipe's: it is a file of another model"
    )
    return "\n".join(["the weights do not fit the recipe:", *lines, remedy])


def _shape(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape)) or "one number"
