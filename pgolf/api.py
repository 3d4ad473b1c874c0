"""What `import pgolf` offers beside `pgolf.train`; loaded when it is first asked for."""

from os import PathLike
from pathlib import Path
from typing import Any

from pgolf.artifact import load as artifact_load
from pgolf.device import pick_device, pick_dtype
from pgolf.model import GPT


def load_model(
    path: str | PathLike[str], device: str = "auto", dtype: str = "auto"
) -> tuple[GPT, dict[str, Any]]:
    """The model that an artifact holds, decoded, and what the artifact says of itself.

    `model(ids, targets)` is the mean loss in nats of ids and targets (N, T) int64, and
    `model.logits(model.features(ids))` are fp32 logits (N, T, V), T at most `meta["seq_len"]`.
    The weights are frozen; `model.requires_grad_(True)` lets them be trained.

    Args:
        path: an artifact, or the run folder that it lies in.
        device: auto, cpu or cuda.
        dtype: of activations and matmuls: auto (bf16 where the hardware has it), bf16 or fp32.

    Raises:
        ArtifactError: there is none, or it is damaged.
    """
    path = Path(path)
    picked = pick_device(device)
    file = path / "artifact" if path.is_dir() else path
    return artifact_load.load_model(file, picked, pick_dtype(dtype, picked)[0])
