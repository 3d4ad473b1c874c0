"""Which device and dtype a run uses, from what the machine has."""

import re
from pathlib import Path

import torch

from pgolf.errors import ConfigError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def cpu_flags() -> set[str]:
    """Instruction-set flags of this CPU as Linux names them; empty elsewhere."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as f:
            for line in f:
                if line.startswith(("flags", "Features")):
                    return set(line.split(":", 1)[1].split())
    except OSError:
        pass
    return set()


def driver() -> str:
    """The version of NVIDIA's kernel driver, or ''."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return ""
    match = re.search(r"\d+\.\d+(\.\d+)?", text)
    return match[0] if match else text.splitlines()[0]


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of 'auto', 'cpu' or 'cuda'.

    Raises:
        ConfigError: CUDA was asked for and there is none.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device=cuda: torch sees no GPU here; use device=cpu or device=auto")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no GPU: this machine has {torch.cuda.device_count()}; "
            "start torchrun with that many processes"
        )
    return torch.device("cuda", local_rank)


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a compute dtype in settings: bf16 or fp32."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def pick_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The compute dtype of 'auto', 'bf16' or 'fp32', and why."""
    if name != "auto":
        return DTYPES[name], "as asked"
    if device.type == "cuda":
        return torch.bfloat16, "GPU"
    flags = cpu_flags() & {"avx512_bf16", "amx_bf16"}
    if flags:
        return torch.bfloat16, f"this CPU has {' and '.join(sorted(flags))}"
    return torch.float32, "this CPU has neither avx512_bf16 nor amx_bf16"
