"""A run's weights for other programs: a safetensors file and a config.json."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgolf.artifact.container import read_artifact
from pgolf.config import from_dict
from pgolf.errors import ConfigError
from pgolf.extras import safetensors
from pgolf.files import atomic_folder
from pgolf.training.repack import load_weights
from pgolf.training.run_folder import read_config


def weights_of(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Weights by name, what describes their model, and which weights they are, in words.

    Those of the decoded artifact (fp32) if there is one, as they are what is scored; otherwise
    those that the newest checkpoint would export, in the dtypes of training.

    Args:
        path: a run folder, or an artifact.
    """
    artifact = path / "artifact" if path.is_dir() else path
    if artifact.is_file():
        decoded = read_artifact(artifact)
        return decoded.state_dict(), decoded.meta, f"decoded from {artifact}"
    trained = from_dict(read_config(path))
    model, description = load_weights(path, trained, torch.device("cpu"))
    meta = {
        "model": dataclasses.asdict(trained.model),
        "seq_len": trained.data.seq_len,
        "recipe": trained.recipe,
        "seed": trained.run.seed,
    }
    return model.export_state(), meta, f"{description} of {path}, not quantised"


def export_weights(path: Path, out: Path) -> str:
    """Write the folder `out`: model.safetensors, config.json, tokenizer.model. Says what is in it.

    Raises:
        ConfigError: `out` exists, or the library safetensors does not.
    """
    library = safetensors()
    if out.exists():
        raise ConfigError(f"{out} exists: choose another folder with --out")
    state, meta, description = weights_of(path)
    with atomic_folder(out) as folder:
        content = library.save({n: t.contiguous() for n, t in state.items()}, {"format": "pt"})
        (folder / "model.safetensors").write_bytes(content)
        config = json.dumps({**meta, "weights": description}, indent=2)
        (folder / "config.json").write_text(config + "\n")
        tokenizer = (path if path.is_dir() else path.parent) / "tokenizer.model"
        if tokenizer.is_file():
            shutil.copyfile(tokenizer, folder / tokenizer.name)
    count = sum(t.numel() for t in state.values())
    return f"{out}: {count:,} weights {description}"
