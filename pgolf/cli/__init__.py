"""The command line: `pgolf COMMAND ...`, also `python -m pgolf` and under torchrun.

Each command has a file in this package, with a `main(argv)`. Heavy modules are imported by the
command that needs them, so --help is quick.
"""

import argparse
import os
import sys
from importlib import import_module

from pgolf import __version__
from pgolf.errors import LostRank, PgolfError
from pgolf.progress import print_anything
from pgolf.stop import Stopped, stoppable

EPILOG = """examples:
  pgolf train demo                        train, pack, decode and score a small model here
  pgolf train demo data=FOLDER seed=7     the same on your own shards
  pgolf data prepare --text FILES --out FOLDER
                                          make those shards
  pgolf data fetch --variant sp1024       the contest's data
  torchrun --standalone --nproc_per_node=8 -m pgolf train pr1473
                                          a contest recipe on eight GPUs
  pgolf pack runs/mine --out small budget=1000000
                                          the same weights in so many bytes of code and model
  pgolf submit runs/mine                  the contest's record folder
  pgolf recipes pr1473                    every value of a recipe, with its source
`pgolf COMMAND --help` says more."""

COMMANDS = {
    "train": "train a recipe and score its artifact",
    "eval": "score an artifact in a fresh process",
    "pack": "quantise and pack a run's checkpoint again, with other settings",
    "verify": "check an artifact and list what is in it",
    "submit": "write the contest's record folder from finished runs",
    "import": "make a run folder of a public script's weights",
    "export": "write weights for other programs",
    "sample": "print text from an artifact",
    "data": "prepare, fetch, check training data",
    "recipes": "list recipes and the source of every value",
    "doctor": "what this machine has and what pgolf will use",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pgolf",
        description="Train the best small language model per byte.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"pgolf {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    # Threads that spin while they wait take the core that another thread needs; read by libgomp
    # when torch loads it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    print_anything()
    command = _parser().parse_known_args(argv[:1])[0].command
    module = "import_" if command == "import" else command  # a word of Python's own
    try:
        with stoppable():
            try:
                return import_module(f"pgolf.cli.{module}").main(argv[1:])
            except (LostRank, Stopped) as e:
                # torchrun asks all ranks to end as soon as one has, and that comes at any time.
                lost = e if isinstance(e, LostRank) else e.__context__
                if not isinstance(lost, LostRank):
                    raise
                _print_error(lost)
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(lost.exit_code)  # what is left to tidy up may wait for the others
    except PgolfError as e:
        _print_error(e)
        return e.exit_code
    except KeyboardInterrupt as e:
        print(f"pgolf: {e if isinstance(e, Stopped) else 'stopped'}", file=sys.stderr)
        return getattr(e, "exit_code", 130)
    except BrokenPipeError:  # the reader of a pipe, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _print_error(error: PgolfError) -> None:
    rank = os.environ.get("RANK")
    if not error.quiet:
        print(f"pgolf{f' (rank {rank})' if rank else ''}: error: {error}", file=sys.stderr)
