"""`python -m bench artifact`: bytes, time and memory of every codec on a model's codes."""

import argparse
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench import schema
from bench.artifact_sources import NOISES, from_path, synthetic, weights_of
from pgolf.artifact.layout import Layout
from pgolf.artifact.pack import encode_form, form_name, forms
from pgolf.artifact.sizes import entropy, integer_bits
from pgolf.child import run_code
from pgolf.config import ArtifactConfig, parse_overrides
from pgolf.errors import PgolfError
from pgolf.progress import Progress

DESCRIPTION = """\
Encode models with every codec and filter, and decode them again. For each: bytes of the file,
seconds to encode, seconds to decode in a fresh process, and by how much that raised the peak of its
memory. One thread. For each matrix: bits a code, against the order-0 entropy of its codes.

A model is an artifact, a run folder (its newest checkpoint is quantised as the run would), or, with
--synthetic, independent numbers in the shapes of a recipe, whose rows and columns have the spread
of rms of a trained demo model. Synthetic codes show sizes and times, not quality.

  bytes, columns         codes of a general codec by rows, by columns
  rans                   the entropy coder for weights
  order-0                what an ideal coder needs if it knows only the frequencies of a matrix's
                         codes
"""
EPILOG = """\
Exit code: 0 done, 2 a bad argument or file.

examples:
  python -m bench artifact runs/demo-seed1337/artifact          codes as they were packed
  python -m bench artifact runs/demo-seed1337 mlp_bits=5        a checkpoint, with five bits
  python -m bench artifact --synthetic pr1473 --codec rans      27 M weights, in a minute or two
  python -m bench artifact runs/*/artifact --json sizes.jsonl   figures to keep, and by tensor
"""

# Run in a process of its own, which has loaded what scoring loads: prints seconds, the bytes by
# which the peak grew, and how many were decoded.
DECODE = """
import sys, time
import torch
import pgolf.artifact.load
from pgolf.artifact.container import read_artifact

def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) << 10

torch.set_num_threads(1)
data = open(sys.argv[1], "rb").read()
before = memory("VmHWM")
began = time.perf_counter()
decoded = read_artifact(data).decoded_bytes
print(time.perf_counter() - began, memory("VmHWM") - before, decoded)
"""


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench artifact", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("arguments", nargs="*", metavar="PATH key=value",
        help="artifacts and run folders, and settings to quantise and pack with")
    add("--synthetic", nargs="+", default=[], metavar="RECIPE",
        help=f"recipes whose shapes are filled with {' and '.join(NOISES)} noise")
    add("--codec", default="auto", choices=("auto", "rans", "zstd", "lzma", "brotli"),
        help="only this one (auto: all)")
    add("--json", type=Path, metavar="FILE", help="write the figures there as well, as JSON lines")
    args = parser.parse_intermixed_args(argv)
    try:
        _run(args, shlex.join(["python", "-m", "bench", "artifact", *argv]))
    except PgolfError as e:
        print(f"python -m bench artifact: {e}", file=sys.stderr)
        return e.exit_code
    return 0


def _run(args: argparse.Namespace, command: str) -> None:
    paths = [argument for argument in args.arguments if "=" not in argument]
    overrides = parse_overrides(argument for argument in args.arguments if "=" in argument)
    if not paths and not args.synthetic:
        raise PgolfError("name artifacts or run folders, or --synthetic RECIPE")
    torch.set_num_threads(1)
    setting = schema.setting(torch.device("cpu"), command, "default")
    config = ArtifactConfig(codec=args.codec)
    lines: list[schema.Setting] = []
    for source, layout in _models(paths, args.synthetic, overrides):
        tensors = list(_tensor_sizes(layout, setting, source))
        sizes = _form_sizes(layout, config, setting, source, tensors)
        print("\n".join(_shown(layout, sizes, tensors)), flush=True)
        lines += [*sizes, *tensors]
    if args.json:
        schema.write_jsonl(args.json, lines)


def _models(
    paths: Sequence[str], recipes: Sequence[str], overrides: dict[str, str]
) -> Iterator[tuple[str, Layout]]:
    for path in paths:
        yield path, from_path(Path(path), overrides)
    for recipe in recipes:
        for noise in NOISES:
            yield f"{recipe}, {noise}", synthetic(recipe, noise, overrides)


def _tensor_sizes(
    layout: Layout, setting: schema.Setting, source: str
) -> Iterator[schema.TensorSize]:
    """A line for each matrix of codes."""
    table, matrices = layout.integers()
    for array, m, bits in zip(table, matrices, integer_bits("rans", table, matrices), strict=True):
        if array.kind == "codes" and m.numel():
            yield schema.TensorSize(
                **asdict(setting), source=source, tensor=str(array.owner), shape=list(m.shape),
                bits=array.bits, entropy_bits=entropy(m), coded_bits=bits / m.numel(),
            )  # fmt: skip


def _form_sizes(
    layout: Layout,
    config: ArtifactConfig,
    setting: schema.Setting,
    source: str,
    tensors: Sequence[schema.TensorSize],
) -> list[schema.FormSize]:
    """A line for each codec and packing."""
    todo, lines = forms(config), []
    ideal = sum(t.entropy_bits * t.shape[0] * t.shape[1] for t in tensors) / 8
    with Progress(source, len(todo), "codecs and packings") as bar:
        for form in todo:
            began = time.perf_counter()
            data = encode_form(layout, *form, config).data
            spent = time.perf_counter() - began
            lines.append(
                schema.FormSize(
                    **asdict(setting), source=source, form=form_name(*form),
                    weights=weights_of(layout), file_bytes=len(data), entropy_bytes=ideal,
                    encode_seconds=spent, **_decoded(data),
                )
            )  # fmt: skip
            bar.update(note=f"{form_name(*form)}: {len(data):,} bytes")
    return sorted(lines, key=lambda line: line.file_bytes)


def _decoded(data: bytes) -> dict[str, Any]:
    """What decoding takes, in a process of its own."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        done = run_code(DECODE, file.name, capture_output=True, check=True)
    seconds, peak, size = map(float, done.stdout.split())
    return {"decode_seconds": seconds, "decoder_bytes": int(peak), "decoded_bytes": int(size)}


def _shown(
    layout: Layout, sizes: Sequence[schema.FormSize], tensors: Sequence[schema.TensorSize]
) -> Iterator[str]:
    """The tables of one model."""
    best, first = sizes[0], tensors[0] if tensors else None
    yield f"\n{best.source}: {best.weights:,} weights, {len(tensors)} matrices of codes"
    yield (
        f"  {'codec':<15} {'bytes':>12} {'to the best':>11} {'encode s':>9} {'decode s':>9} "
        f"{'decoder MB':>10}   decoded {best.decoded_bytes / 1e6:.1f} MB"
    )
    for s in sizes:
        more = 100 * (s.file_bytes / best.file_bytes - 1)
        yield (
            f"  {s.form:<15} {s.file_bytes:>12,} {more:>+10.2f}% {s.encode_seconds:>9.2f} "
            f"{s.decode_seconds:>9.2f} {s.decoder_bytes / 1e6:>10.1f}"
        )
    if first is None:
        return
    coded = sum(t.coded_bits * t.shape[0] * t.shape[1] for t in tensors) / 8
    width = max(len(t.tensor) for t in tensors)
    yield f"\n  {'codes of':<{width}} {'order-0 bits':>13} {'rans bits':>10} {'ratio':>7}   shape"
    for t in tensors:
        yield (
            f"  {t.tensor:<{width}} {t.entropy_bits:>13.4f} {t.coded_bits:>10.4f} "
            f"{t.coded_bits / t.entropy_bits if t.entropy_bits else 1:>7.4f}   "
            f"{t.shape[0]} x {t.shape[1]}"
        )
    yield (
        f"  all codes: order-0 {best.entropy_bytes:,.0f} bytes, rans {coded:,.0f} bytes, "
        f"ratio {coded / best.entropy_bytes if best.entropy_bytes else 1:.4f}"
    )
