"""Compile a whole narrow model with ops=auto, forward and backward, and compare it with eager.

    python -m bench.matrix_model [LAYERS]    (started by `python -m bench matrix`)
"""

import json
import sys
import time

import torch

from pgolf.model import GPT
from pgolf.model.gpt import operator_sizes
from pgolf.model.init import init_weights
from pgolf.ops.choose import choose_all
from pgolf.ops.compile import compile_graph
from pgolf.recipes import get

NARROW = {
    "dim": 64, "heads": 4, "kv_heads": 2, "mlp_hidden": 96, "rope_dims": 8, "vocab_size": 256,
    "bigram_buckets": 64, "bigram_dim": 32, "ve_dim": 32, "seq_len": 64, "table_dtype": "fp32",
}  # fmt: skip
CPU, F32 = torch.device("cpu"), torch.float32


def main(layers: int = 11) -> dict[str, object]:
    """What was compiled and how long that took, as `bench/results/matrix.json` has it.

    Raises:
        AssertionError: the compiled model computes something else.
    """
    config = get("pr1473").config({**NARROW, "layers": layers})
    sizes = operator_sizes(config.model, F32, F32)
    chosen = choose_all("auto", "cpu", F32, True, sizes)
    ops = {name: choice.impl for name, choice in chosen.items()}
    model = GPT(config.model, F32, config.data.seq_len, ops)
    init_weights(model, 0)
    ids = torch.randint(
        config.model.vocab_size, (2, config.data.seq_len + 1),
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    batch = ids[:, :-1], ids[:, 1:]
    loss = model(*batch)
    expected = [loss, *torch.autograd.grad(loss, list(model.parameters()))]
    started = time.perf_counter()
    step = compile_graph(model, ops, CPU)
    alone = time.perf_counter()
    loss = step(*batch)
    forward = time.perf_counter()
    actual = [loss, *torch.autograd.grad(loss, list(model.parameters()))]
    ended = time.perf_counter()
    for computed, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(computed, reference, rtol=1e-3, atol=1e-4)
    return {
        "layers": layers,
        "kernels": sorted(name for name, impl in ops.items() if impl != "reference"),
        "operators_s": round(alone - started, 1),
        "forward_s": round(forward - alone, 1),
        "backward_s": round(ended - forward, 1),
    }


if __name__ == "__main__":
    print(json.dumps(main(*map(int, sys.argv[1:]))))
