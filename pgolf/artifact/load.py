"""From an artifact's bytes to a model that can score or generate text."""

from pathlib import Path
from typing import Any

import torch

from pgolf.artifact.container import read_artifact
from pgolf.config import ModelConfig, check_model
from pgolf.errors import ArtifactError, ConfigError
from pgolf.fields import section_from_dict
from pgolf.model import GPT
from pgolf.model.gpt import operator_sizes
from pgolf.ops.choose import choose_all


def load_model(
    path: Path | str, device: torch.device, dtype: torch.dtype
) -> tuple[GPT, dict[str, Any]]:
    """The decoded model and the artifact's metadata.

    Raises:
        ArtifactError: the file is damaged, or its tensors are not those of its model section.
    """
    artifact = read_artifact(path)
    try:
        config = section_from_dict(ModelConfig, artifact.meta.get("model"))
        check_model(config)
        length = artifact.meta["seq_len"]
        if not isinstance(length, int) or not 0 < length <= 65536:
            raise ConfigError(f"seq_len={length!r}: expected 1 to 65536")
        for key in ("corpus", "tokenizer_sha256"):
            if not isinstance(artifact.meta.get(key), str):
                raise ConfigError(f"{key} is missing")
        with torch.device("meta"):
            shapes = {n: tuple(p.shape) for n, p in GPT(config).named_parameters()}
    except (ConfigError, KeyError, TypeError, ValueError, RuntimeError) as e:
        raise ArtifactError(f"{path}: metadata does not describe a model: {e}") from e
    stored = {n: t.shape for n, t in artifact.tensors.items()}
    if stored != shapes:
        wrong = sorted(
            n for n in stored.keys() | shapes.keys() if stored.get(n) != shapes.get(n)
        )[0]
        raise ArtifactError(
            f"{path}: tensor {wrong} is {stored.get(wrong, 'missing')}, "
            f"the model needs {shapes.get(wrong, 'no such tensor')}"
        )
    sizes = operator_sizes(config, dtype, dtype)
    ops = choose_all("", device.type, dtype, False, sizes, ["attention"])
    model = GPT(config, dtype, length, {name: choice.impl for name, choice in ops.items()})
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        for name, value in artifact.state_dict().items():
            parameters[name].copy_(value)
    return model.to(device).requires_grad_(False), artifact.meta
