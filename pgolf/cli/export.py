"""`pgolf export`: write a run's weights for other programs."""

from pathlib import Path

from pgolf.errors import ConfigError
from pgolf.options import Parser
from pgolf.training.export_weights import export_weights


def main(argv: list[str]) -> int:
    """Write the folder, say what is in it."""
    parser = Parser(
        prog="pgolf export",
        description="Write a run's weights for other programs: model.safetensors, config.json with "
        "the model's settings and the tokenizer. Weights are those of the decoded artifact; of a "
        "run without one, those of its newest checkpoint. Needs pip install 'pgolf[export]'.",
        epilog="example: pgolf export runs/demo-seed1337 --out exported",
    )
    parser.add_argument("run", type=Path, help="run folder, or an artifact")
    parser.add_argument("--format", default="safetensors", choices=("safetensors",))
    parser.add_argument("--out", type=Path, help="folder to write (default: RUN/safetensors)")
    args = parser.parse_args(argv)
    if not args.run.exists():
        raise ConfigError(f"{args.run}: no such run folder or artifact")
    beside = args.run if args.run.is_dir() else args.run.parent
    print(export_weights(args.run, args.out or beside / "safetensors"))
    return 0
