"""The parts of `python -m bench gpu`, the most valuable first, and their summaries."""

import importlib.util
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import losses, parts
from bench.parts import ROOT, Command, Part
from pgolf import extension
from pgolf.errors import DataError
from pgolf.ops import operator

NAMES = (
    "data", "build", "tests", "attention", "step", "ops", "memcheck", "synccheck", "racecheck",
    "train", "tune",
)  # fmt: skip
PYTHON = (sys.executable, "-m")
TESTS = ("tests/ops/test_gpu.py",)
TEST_SECONDS = 30  # of one test

ATTENTION = ("fa3", "fa4", "fa2")  # beside torch's own

# The first is timed in any case, then each beside it: all kernels, one alone, all but one.
# Attention is the same in all of them.
PLAIN = "reference,attention=auto"
CHOICES = (
    PLAIN, "auto",
    *(f"{PLAIN},{name}=auto" for name in ("leaky_relu2_mlp", "xsa", "newton_schulz", "fake_quant")),
    *(f"auto,{name}=reference"
      for name in ("residual_norm", "qk_rope", "leaky_relu2_mlp", "softcap_cross_entropy")),
    "triton",
)  # fmt: skip
# Of weights, gradients and states, which the record has in fp32.
FP32_OPERATORS = (
    "param_update", "muon_momentum", "grad_norm", "part_sums", "weight_cast", "fake_quant",
)  # fmt: skip
# All others but attention, for which `attention` is a part: first what a step spends most time in.
_FIRST = (
    "leaky_relu2_mlp", "residual_norm", "qk_rope", "softcap_cross_entropy", "xsa", "newton_schulz",
)  # fmt: skip
OPERATORS = (
    *_FIRST, *(n for n in operator.OPERATORS if n not in {*_FIRST, *FP32_OPERATORS, "attention"})
)  # fmt: skip
TUNED = ("leaky_relu2_mlp", "newton_schulz")
SAMPLES = ("98304", "bank", "matrices", "pr1473", "1536x512", "512x1536", "512x512")


class Sizes(NamedTuple):
    """How large everything is.

    Attributes:
        gpu: whether there is one; else its place is taken by what runs without.
        settings: of the recipe.
        steps: of a run of `pgolf train`.
        step: arguments of `bench step`.
        ops, attention: arguments of `bench ops`, by the names of the files they write.
    """

    gpu: bool
    settings: tuple[str, ...]
    steps: int
    step: Command
    ops: Mapping[str, Command]
    attention: Mapping[str, Command]


TIMED = ("--sample", *SAMPLES, "--mode", "forward", "backward", "--seconds", "1")
OURS = ("--providers", "eager", "triton", "cuda", "peers", *TIMED)
# One GPU's share of the record's batch on eight.
RECORD = Sizes(
    gpu=True, settings=("batch_tokens=98304",), steps=20,
    step=("--ops", *CHOICES, "--compile", "on", "--rounds", "20", "--profile", "3"),
    ops={"ops": ("--op", *OPERATORS, "--dtype", "bf16", *OURS),
         "ops-fp32": ("--op", *FP32_OPERATORS, "--dtype", "fp32", *OURS)},
    attention={"attention": ("--op", "attention", "--providers", "eager", *ATTENTION, *TIMED)},
)  # fmt: skip
TINY = Sizes(
    gpu=False,
    settings=(
        "device=cpu", "layers=1", "dim=32", "heads=2", "kv_heads=1", "mlp_hidden=48", "ve_dim=16",
        "rope_dims=8", "bigram_buckets=64", "bigram_dim=16", "ve_layers=none", "seq_len=64",
        "batch_tokens=256", "compute_dtype=fp32", "val_tokens=256", "stride=64",
        "calibration_sequences=4",
    ),
    steps=3,
    step=("--ops", "reference", "auto", "--compile", "off", "--rounds", "2", "--profile", "1"),
    ops={"ops": ("--op", "xsa", "--providers", "eager", "cpu", "--sample", "1024 tokens",
                 "--mode", "forward", "--rounds", "3", "--device", "cpu")},
    attention={"attention": ("--op", "attention", "--providers", "eager", *ATTENTION, "--sample",
                             "1024", "--mode", "forward", "--rounds", "3", "--device", "cpu")},
)  # fmt: skip


class Place(NamedTuple):
    """Where results, and what they are made from, lie; `adopted`: as bench.bundle.adopt says."""

    out: Path
    scratch: Path
    sizes: Sizes
    adopted: bool | None = None

    @property
    def data(self) -> str:
        return f"data={self.scratch / 'data'}"

    def lines(self, name: str) -> list[dict[str, Any]]:
        """A part's JSON lines; none if it has not come to them."""
        texts = [file.read_text(encoding="utf-8") for file in parts.results(self.out, name)]
        return [json.loads(line) for text in texts for line in text.splitlines()]


def all_parts(place: Place) -> list[Part]:
    """Every part that applies here."""
    sizes = place.sizes
    gpu = [_build(place), *_sanitized(place), _tune(place)] if sizes.gpu else [_emulated(place)]
    parts = [_data(place), _tests(place), _ops(place, "attention", sizes.attention, 15),
             _step(place), _ops(place, "ops", sizes.ops, 70), _train(place), *gpu]  # fmt: skip
    return sorted(parts, key=lambda part: NAMES.index(part.name))


def _file(place: Place, name: str) -> Command:
    return ("--json", str(place.out / f"{name}.jsonl"))


def _data(place: Place) -> Part:
    folder = str(place.scratch / "data")
    return Part("data", 10, lambda _: [(*PYTHON, "bench.synthetic", folder)], needed=True)


def _build(place: Place) -> Part:
    """Compile the extension, if there is none with code for this GPU, or one of older sources."""
    capability = torch.cuda.get_device_capability()
    module = extension.cuda()
    outdated = (
        module is None
        or extension.no_code_for(capability, extension.driver_cuda())
        or place.adopted is False
        or (place.adopted is None
            and _changed(ROOT / "csrc") > Path(module.__file__).stat().st_mtime)
    )  # fmt: skip
    command = (sys.executable, "setup.py", "-q", "build_ext", "--inplace")
    arch = f"{capability[0]}.{capability[1]}" + "a" * (capability == (9, 0))
    env = {"PGOLF_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": arch}
    commands = [command] if outdated else []
    return Part("build", 60 if outdated else 1, lambda _: commands, env=env, needed=True)


def _changed(folder: Path) -> float:
    """When the newest file of a folder was written."""
    return max(file.stat().st_mtime for file in folder.rglob("*") if file.is_file())


def _tests(place: Place) -> Part:
    def has(module: str) -> bool:
        return importlib.util.find_spec(module) is not None

    if has("pytest_timeout"):
        limit = ("--timeout", str(TEST_SECONDS), "--timeout-method", "thread")
    else:  # pytest's own, which ends the process of a test that hangs
        limit = ("-o", f"faulthandler_timeout={TEST_SECONDS}",
                 "-o", "faulthandler_exit_on_timeout=true")  # fmt: skip
    workers = min(8, os.cpu_count() or 1) if place.sizes.gpu else 0
    parallel = ("-n", str(workers)) if has("xdist") else ()
    command = (
        *PYTHON, "pytest", "-q", "-m", "gpu", *TESTS, *parallel, *limit, "-p", "no:cacheprovider",
        "-p", "bench.outcomes", "--outcomes", str(place.out / "tests.jsonl"),
    )  # fmt: skip

    def says() -> list[str]:
        lines = place.lines("tests")
        counted = Counter(line["outcome"] for line in lines)
        failed = [line["test"] for line in lines if line["outcome"] == "failed"]
        more = [f"and {len(failed) - 8} more"] * (len(failed) > 8)
        total = ", ".join(f"{n} {outcome}" for outcome, n in sorted(counted.items()))
        return [total or "no test has run", *(f"failed: {name}" for name in failed[:8]), *more]

    missing = "" if has("pytest") else "pytest is not installed"
    return Part("tests", 90, lambda _: [command], says, missing=missing)


def _step(place: Place) -> Part:
    def commands(seconds: float) -> list[Command]:
        arguments = ("pr1473", place.data, *place.sizes.settings, *place.sizes.step)
        limit = ("--seconds", f"{0.9 * seconds:.0f}")
        return [(*PYTHON, "bench", "step", *arguments, *limit, *_file(place, "step"))]

    def says() -> list[str]:
        return [_step_line(line) for line in place.lines("step")]

    return Part("step", 160, commands, says)


def _step_line(line: dict[str, Any]) -> str:
    key = "host_ms" if line["phases"]["forward"]["gpu_ms"] is None else "gpu_ms"
    times = ", ".join(f"{name} {line['phases'][name][key]:.1f}"
                      for name in ("forward", "backward", "optimizer"))  # fmt: skip
    host = sum(phase["host_ms"] for phase in line["phases"].values())
    peak = f", {line['peak_bytes'] / 1e9:.1f} GB" if line["peak_bytes"] else ""
    profile = line["profile"]
    seen = profile and profile["step_us"]  # 0 where the profiler saw no kernel
    idle = f", idle {100 * profile['idle_us'] / profile['step_us']:.0f} %" if seen else ""
    speed = line["first_ms"] / line["median_ms"]
    loss = "; ITS LOSS IS NOT FINITE" if line["loss"] is None else ""
    return (
        f"{line['ops']}: {line['median_ms']:.1f} ms, {speed:.3f}x ({times}, host {host:.1f}{peak}"
        f"{idle}){loss}"
    )


def _ops(place: Place, name: str, arguments: Mapping[str, Command], share: float) -> Part:
    """Operators alone; attention is no kernel of pgolf, and differs between machines."""
    commands = [(*PYTHON, "bench", "ops", *each, *_file(place, file))
                for file, each in arguments.items()]  # fmt: skip

    def says() -> list[str]:
        """For each operator, sample and mode, the share of the floor that is reached."""
        rows: dict[str, list[str]] = {}
        for line in place.lines(name):
            what = f"{line['operator']} {line['sample']} {line['mode']}"
            rows.setdefault(what, []).append(
                f"{line['provider']} {line['median_ms']:.3g} ms {line['percent_of_floor']:.0f}%"
            )
        return [f"{what}: {', '.join(cells)}" for what, cells in rows.items()]

    return Part(name, share, lambda _: commands, says)


def _sanitizer() -> str | None:
    """compute-sanitizer, where it is."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which(f"{home}/bin/compute-sanitizer")


def _sanitized(place: Place) -> list[Part]:
    program = _sanitizer()
    missing = "no compute-sanitizer on PATH or in $CUDA_HOME/bin: it comes with the CUDA toolkit"

    def part(tool: str, share: float, *arguments: str) -> Part:
        command = (program or "compute-sanitizer", "--tool", tool, "--error-exitcode", "1",
                   "--target-processes", "all", *PYTHON, "bench.gpu_kernels", *arguments,
                   *_file(place, tool))  # fmt: skip

        def says() -> list[str]:
            log = place.out / f"{tool}.log"
            output = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
            summary = [line for line in output.splitlines() if "ERROR SUMMARY" in line][-1:]
            return [f"{len(place.lines(tool))} calls begun", *summary]

        # Tensors that share a block of the caching allocator may overrun into each other unseen.
        env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return Part(tool, share, lambda _: [command], says, env, "" if program else missing)

    # Triton's reductions write the same word from several warps, which racecheck calls a hazard.
    return [part("memcheck", 45), part("synccheck", 20), part("racecheck", 20, "--impl", "cuda")]


def _emulated(place: Place) -> Part:
    """In a rehearsal: the program that the sanitizers watch, on kernels that a CPU runs."""
    command = (*PYTHON, "bench.gpu_kernels", "--device", "cpu", "--op", "xsa", "--impl", "cuda",
               *_file(place, "memcheck"))  # fmt: skip

    def says() -> list[str]:
        return [f"{len(place.lines('memcheck'))} calls begun"]

    missing = "" if extension.emulates_cuda() else f"{extension.CUDA_VARIABLE} names no emulator"
    return Part("memcheck", 20, lambda _: [command], says, missing=missing)


def _train(place: Place) -> Part:
    runs = {ops: place.scratch / f"run-{ops}" for ops in ("reference", "auto")}
    torchrun = (*PYTHON, "torch.distributed.run", "--standalone", "--nproc_per_node=1")
    steps = place.sizes.steps
    settings = (place.data, *place.sizes.settings, f"max_steps={steps}", "log_every=1",
                "quick=true")  # fmt: skip
    device = ("--device", "cuda" if place.sizes.gpu else "cpu")
    packed = str(place.scratch / "packed")
    # A run counts the bytes of its code at its end, by which it has logged its losses.
    packs = importlib.util.find_spec("python_minifier") is not None
    commands = [
        (*torchrun, "-m", "pgolf", "train", "pr1473", *settings, f"ops={ops}", f"out={run}")
        for ops, run in runs.items()
    ] + [
        (*PYTHON, "bench.losses", *map(str, runs.values()), "--steps", str(steps),
         *_file(place, "train")),
    ]  # fmt: skip
    if packs:
        commands += [
            (*PYTHON, "pgolf", "pack", str(runs["auto"]), "--out", packed, *device),
            (*PYTHON, "pgolf", "verify", packed),
            (*PYTHON, "pgolf", "eval", packed, "--data", str(place.scratch / "data"), *device),
        ]

    def says() -> list[str]:
        with suppress(DataError):  # of a part that was cut off before it compared them
            losses.compare([*runs.values()], place.out / "train.jsonl")
        return [
            f"step {line['step']}: reference {line['losses'][0]:.4f}, auto {line['losses'][1]:.4f}"
            for line in place.lines("train")
            if line["step"] in (1, 2, 5, 10, steps)
        ] + ["not packed: pip install python-minifier"] * (not packs)

    # Each run may take half, so that the packing of one takes no time of the other.
    return Part("train", 100, lambda _: commands, says, until=(0.45, 0.9),
                unjudged=0 if packs else len(runs))  # fmt: skip


def _tune(place: Place) -> Part:
    commands = [
        (*PYTHON, "bench", "tune", name, "--dry-run", "--sample", *SAMPLES,
         *_file(place, f"tune-{name}"))
        for name in TUNED
    ]  # fmt: skip

    def says() -> list[str]:
        rows: dict[str, list[dict[str, Any]]] = {}
        for line in place.lines("tune"):
            if line["ms"] is not None:
                rows.setdefault(f"{line['kernel']}[{line['row']}]", []).append(line)
        lines = []
        for name, tried in rows.items():
            best = min(tried, key=lambda line: line["ms"])
            lines.append(
                f"{name}: {tried[0]['ms']:.4g} ms, best of {len(tried)} {best['ms']:.4g} ms: "
                f"{best['blocks']}, {best['num_warps']} warps, {best['num_stages']} stages"
            )
        return lines

    until = [(i + 1) / len(TUNED) for i in range(len(TUNED))]
    return Part("tune", 20, lambda _: commands, says, endless=True, until=until)
