"""Compiles launches for sm_90 without a GPU.

Triton's own JIT does it, with a stand-in for the driver: what it derives from the arguments of a
launch (types, ints that are 1, divisibility by 16) is what it derives on an H100.
"""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from bench import aot_checks, candidates, sass
from bench.aot_cases import cases
from pgolf.triton_kernels.launch import Launch, configs, intercepted


class H100:
    """What the JIT asks its driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_launch(launch: Launch) -> Any:
    """The triton.compiler.CompiledKernel that this launch would start on an H100.

    The same object for launches whose arguments do not differ for the compiler.
    """
    triton.runtime.driver.set_active(H100())
    return launch.kernel.run(
        grid=launch.grid,
        warmup=True,
        **launch.arguments,
        num_warps=launch.config.num_warps,
        num_stages=launch.config.num_stages,
    )


def compile_all(
    kernels: Mapping[str, int], say: Callable[[str, aot_checks.Row], None]
) -> tuple[dict[str, aot_checks.Row], list[str]]:
    """(figures by row name, what is wrong) of what bench/aot_cases.py launches of these kernels.

    With each row of configs.json that a launch picks, and with what bench/candidates.py has. Each
    different result is compiled once, and said. A row has the name of the first case that led to
    it, with a number where that case led to several of one kernel.

    Args:
        kernels: how many rows each has in configs.json.
    """
    rows, failures, seen, reached = {}, [], [], set()
    wanted, case, suffix = kernels.keys(), None, ""

    def handle(launch: Launch) -> None:
        kernel = launch.kernel.__name__
        if kernel not in wanted:
            return
        reached.add((kernel, configs()[kernel].index(launch.config)))
        name = f"{kernel}: {case.name}{suffix}"
        try:
            compiled = compile_launch(launch)
        except Exception as e:  # Triton's, MLIR's and ptxas's errors have no class in common
            text = next(line for line in f"{type(e).__name__}: {e}".splitlines() if line.strip())
            failures.append(f"{name}: does not compile: {text}")
            return
        if any(compiled is other for other in seen):
            return
        seen.append(compiled)
        same = sum(n == name or n.startswith(f"{name} #") for n in rows)
        name += f" #{same + 1}" if same else ""
        rows[name] = _row(kernel, compiled)
        failures.extend(aot_checks.failures(name, kernel, case.dtype == "bf16", rows[name]))
        blocks = launch.config.blocks.get("PER_SM", 1)
        failures.extend(aot_checks.crowded(name, rows[name], launch.config.num_warps, blocks))
        say(name, rows[name])

    with intercepted(handle):
        for case in cases():
            case.call()
        for kernel in sorted(kernels.keys() & candidates.CANDIDATES.keys()):
            for number, candidate in enumerate(candidates.CANDIDATES[kernel], 1):
                wanted, suffix = {kernel}, f", candidate {number}"
                with candidates.taken(kernel, candidate):
                    for case in cases():
                        case.call()
    return rows, failures + aot_checks.unreached(reached, kernels)


def _row(kernel: str, compiled: Any) -> aot_checks.Row:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        (function,) = sass.functions(Path(f.name), compiled.asm["ptx"], "sm_90").values()
    return aot_checks.row(kernel, function, compiled.metadata.shared)
