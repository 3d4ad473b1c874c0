"""`python -m bench COMMAND`: each command is the module of that name in this folder."""

import argparse
import importlib
import os
import sys

from pgolf.progress import print_anything

COMMANDS = {
    "ops": "time operators: eager, compiled, our kernels, public peers, and the floor",
    "operators": "the operators as a table: formula, shapes, kernels, what auto takes",
    "step": "time training steps of a recipe with each choice of operators",
    "decode": "time the generation of text, with key/value caches and without",
    "count": "count launches, bytes and memory of a recipe on a stand-in for an H100",
    "tune": "look for faster configurations of Triton kernels on this GPU, and write the table",
    "aot": "compile every Triton and CUDA kernel: registers, shared memory, spills, instructions",
    "artifact": "bytes, time and memory of every codec on a model's codes, against their entropy",
    "quality": "quantise a run's weights in every way: bytes, and what it costs in bits per byte",
    "matrix": "what runs with each torch and triton that pgolf is for",
    "gpu": "all that only a GPU can show: tests, the record's step, compute-sanitizer, times",
    "bundle": "what a machine with a GPU and without a network needs for that",
}


def main(argv: list[str]) -> int:
    """Run one command; returns the exit code."""
    # As `pgolf` does, and before torch is imported: threads that wait must not spin.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    print_anything()
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Microbenchmarks and counts of pgolf's operators and codecs.",
        epilog="`python -m bench COMMAND --help` says more.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    args, _ = parser.parse_known_args(argv[:1])
    return importlib.import_module(f"bench.{args.command}").main(argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
