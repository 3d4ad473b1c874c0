"""Compiles launches for sm_90 without a GPU.

Triton's own JIT does it, with a stand-in for the driver: what it derives from the arguments of a
launch (types, ints that are 1, divisibility by 16) is what it derives on an H100.
"""

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from bench import sass
from bench.aot_cases import Case
from bench.aot_checks import hard_limits
from pgolf.triton_kernels.launch import Launch, configs, intercepted


class H100:
    """What the JIT asks its driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass
class Report:
    """What was compiled, by row name; what is wrong with it; which configurations were used."""

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    reached: set[tuple[str, int]] = field(default_factory=set)  # (kernel, row of configs.json)


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


def compile_cases(
    cases: Iterable[Case], kernels: Container[str], say: Callable[[str, dict], None]
) -> Report:
    """Compile what the cases launch of `kernels`, each different result once.

    `say(name, row)` is called after each. A row has the name of the first case that led to
    it, with a number where that case led to several of one kernel.
    """
    report, seen = Report(), []
    case = None

    def handle(launch: Launch) -> None:
        kernel = launch.kernel.__name__
        if kernel not in kernels:
            return
        report.reached.add((kernel, configs()[kernel].index(launch.config)))
        name = f"{kernel}: {case.name}"
        try:
            compiled = compile_launch(launch)
        except Exception as e:  # Triton's, MLIR's and ptxas's errors have no class in common
            text = next(line for line in f"{type(e).__name__}: {e}".splitlines() if line.strip())
            report.failures.append(f"{name}: does not compile: {text}")
            return
        if any(compiled is other for other in seen):
            return
        seen.append(compiled)
        same = sum(n == name or n.startswith(f"{name} #") for n in report.rows)
        name += f" #{same + 1}" if same else ""
        row = _row(kernel, case.dtype, launch, sass.cost(compiled))
        report.rows[name] = row
        report.failures += hard_limits(name, row)
        say(name, row)

    with intercepted(handle):
        for case in cases:
            case.call()
    return report


def _row(kernel: str, dtype: str, launch: Launch, cost: sass.Cost) -> dict[str, Any]:
    config = {**launch.config.blocks, "num_warps": launch.config.num_warps}
    return {
        "kernel": kernel,
        "dtype": dtype,
        "config": config | {"num_stages": launch.config.num_stages},
        "registers": cost.registers,
        "shared": cost.shared,
        "stack": cost.stack,
        "local": cost.local,
        "instructions": cost.instructions,
        "ptx": cost.ptx,
    }
