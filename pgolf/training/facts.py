"""Facts that every rank of a run has to share: what is compared -> what a rank has, for people."""

import hashlib
import platform
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

import pgolf
from pgolf.config import Config, to_dict
from pgolf.device import cpu_flags, dtype_name
from pgolf.training.provenance import FLAGS
from pgolf.training.run_folder import flat
from pgolf.training.session import Session

# Settings that may differ: places on a rank's own machine, and what only rank 0 or each alone does.
OWN_KEYS = {
    "data.data", "data.tokenizer", "run.out", "run.device", "run.patience", "run.log_every",
    "run.compile_cache",
}  # fmt: skip


def software(config: Config) -> dict[str, str]:
    """Versions, pgolf's own files, settings."""
    try:
        triton = f"triton {metadata.version('triton')}"
    except metadata.PackageNotFoundError:
        triton = "no triton"
    return {
        "Python": f"Python {platform.python_version()}",
        "torch": f"torch {torch.__version__}",
        "triton": triton,
        "pgolf": f"pgolf {pgolf.__version__} with sources of sha256 {_sources()}...",
        **_settings(config),
    }


def data(session: Session) -> dict[str, str]:
    """Shards by name and size, their text, and the settings that were fitted to them."""
    dataset = session.dataset
    shards = {
        path.name: f"{path.name} of {path.stat().st_size:,} bytes"
        for path in (*dataset.train_shards, *dataset.val_shards)
    }
    text = {
        "tokenizer": f"a tokenizer of sha256 {dataset.tokenizer_sha256[:12]}...",
        "corpus": f"a corpus of sha256 {dataset.sha256[:12]}...",
    }
    return shards | text | _settings(session.config)


def hardware(device: torch.device, dtype: torch.dtype, ops: Mapping[str, str]) -> dict[str, str]:
    """The kind of device, the compute dtype, operator -> implementation."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"a CPU with {' '.join(sorted(cpu_flags() & set(FLAGS))) or 'no AVX2'}"
    return {
        "device": name,
        "compute_dtype": f"compute_dtype={dtype_name(dtype)}",
        **{f"ops {name}": f"{name}={impl}" for name, impl in ops.items()},
    }


def _settings(config: Config) -> dict[str, str]:
    shown = {k: f"{k.rpartition('.')[2]}={v}" for k, v in flat(to_dict(config)).items()}
    kind = {"data": "data=FOLDER" if config.data.data else "the embedded corpus"}
    return {k: text for k, text in shown.items() if k not in OWN_KEYS} | kind


@cache
def _sources() -> str:
    """The first digits of a hash of pgolf's source files."""
    root = Path(pgolf.__file__).parent
    # A checkout has a link there, which rglob does not follow.
    files = {path for part in (root, root / "triton_kernels") for path in part.rglob("*.py")}
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]
