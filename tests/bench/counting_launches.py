"""Runs CUDA implementations on the counting device and writes its log: see test_counting_cuda.py.

    python counting_launches.py LOG
"""

import os
import sys
from pathlib import Path

import torch

from bench.counting.client import Device
from bench.counting.eager import Counted, operators_counted
from pgolf.ops.operator import OPERATORS

NAMES = (
    "xsa", "residual_norm", "qk_rope", "softcap_cross_entropy", "weight_cast", "grad_norm",
    "muon_momentum", "param_update", "part_sums",
)  # fmt: skip


def main(log: Path) -> None:
    os.environ.pop("LD_PRELOAD", None)
    device = Device(log)
    cuda = torch.device("cuda")
    side = torch.cuda.Stream()
    device.note(kind="stream", stream=side.cuda_stream)
    with operators_counted(device):
        for name in NAMES:
            args, kwargs = OPERATORS[name].samples()[0].build(cuda, torch.bfloat16)
            with torch.cuda.stream(side), Counted(device):
                device.note(kind="phase", name=name)
                OPERATORS[name].call(*args, **kwargs, impl="cuda")
                device.note(kind="phase", name="")
    device.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
