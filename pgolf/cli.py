"""The command line: `pgolf COMMAND ...`, also `python -m pgolf` and under torchrun.

Heavy modules are imported by the command that needs them, so --help is quick.
"""

import argparse
import os
import sys
from collections.abc import Callable

from pgolf import __version__
from pgolf.errors import PgolfError
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


def _train(argv: list[str]) -> int:
    from pgolf.options import SETTINGS, Parser

    parser = Parser(
        prog="pgolf train",
        description="Train a recipe, quantise and pack it, decode the artifact and score it. The "
        "run folder gets config.json, metrics.jsonl, artifact, result.json and report.html.",
        epilog="`pgolf recipes` lists recipes, `pgolf recipes --keys` every key. The contest's "
        "environment names (SEED, DATA_PATH, MAX_WALLCLOCK_SECONDS, ...) work too; the command "
        "line wins. resume=true goes on with the run in out= as its config.json has it: eval.*, "
        "log_every, checkpoint_every and device may be given anew, nothing else. "
        "quick=true tries a recipe out: fewer validation tokens (65536), a stride of "
        "half a sequence, no validation while training, no score of the live weights, 16 sequences "
        "to calibrate; what is given wins, and max_tokens=N shortens training. "
        "example: pgolf train demo layers=6 max_tokens=2e6 out=runs/six",
    )
    parser.add_argument("recipe", help="name of a recipe, such as demo")
    parser.add_argument("overrides", nargs="*", metavar=SETTINGS, help="settings to change")
    args = parser.parse_args(argv)
    from pgolf.config import parse_overrides
    from pgolf.train.start import start

    start(args.recipe, parse_overrides(args.overrides))
    return 0


def _recipes(argv: list[str]) -> int:
    from pgolf.options import Parser

    parser = Parser(
        prog="pgolf recipes", description="List recipes, show one with the source of every value."
    )
    parser.add_argument("recipe", nargs="?", help="show this one")
    parser.add_argument("--keys", action="store_true", help="list every key with its default")
    args = parser.parse_args(argv)
    from pgolf.recipes import show

    if args.keys:
        print(show.list_keys())
    else:
        print(show.show_recipe(args.recipe) if args.recipe else show.list_recipes())
    return 0


def _eval(argv: list[str]) -> int:
    from pgolf.train.scoring import main

    return main(argv)


def _pack(argv: list[str]) -> int:
    from pgolf.train.repack import main

    return main(argv)


def _verify(argv: list[str]) -> int:
    from pgolf.artifact.verify import main

    return main(argv)


def _import(argv: list[str]) -> int:
    from pgolf.train.import_weights import main

    return main(argv)


def _export(argv: list[str]) -> int:
    from pgolf.train.export_weights import main

    return main(argv)


def _submit(argv: list[str]) -> int:
    from pgolf.submission.cli import main

    return main(argv)


def _sample(argv: list[str]) -> int:
    from pgolf.sample import main

    return main(argv)


def _data(argv: list[str]) -> int:
    from pgolf.data.cli import main

    return main(argv)


def _doctor(argv: list[str]) -> int:
    from pgolf.doctor import main

    return main(argv)


COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "train": (_train, "train a recipe and score its artifact"),
    "eval": (_eval, "score an artifact in a fresh process"),
    "pack": (_pack, "quantise and pack a run's checkpoint again, with other settings"),
    "verify": (_verify, "check an artifact and list what is in it"),
    "submit": (_submit, "write the contest's record folder from finished runs"),
    "import": (_import, "make a run folder of a public script's weights"),
    "export": (_export, "write weights for other programs"),
    "sample": (_sample, "print text from an artifact"),
    "data": (_data, "prepare, fetch, check training data"),
    "recipes": (_recipes, "list recipes and the source of every value"),
    "doctor": (_doctor, "what this machine has and what pgolf will use"),
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
    for name, (_, text) in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    # Threads that spin while they wait take the core that another thread needs; read by libgomp
    # when torch loads it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    print_anything()
    args, rest = _parser().parse_known_args(argv[:1])
    rest = argv[1:]
    try:
        with stoppable():
            return COMMANDS[args.command][0](rest)
    except PgolfError as e:
        rank = os.environ.get("RANK")
        where = f" (rank {rank})" if rank else ""
        print(f"pgolf{where}: error: {e}", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt as e:
        print(f"pgolf: {e if isinstance(e, Stopped) else 'stopped'}", file=sys.stderr)
        return getattr(e, "exit_code", 130)
    except BrokenPipeError:  # the reader of a pipe, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
