"""`pgolf pack`: quantise and pack a run's newest checkpoint again, with other settings."""

import dataclasses
from pathlib import Path

from pgolf.artifact.container import MAGIC
from pgolf.artifact.foreign import refuse_foreign
from pgolf.config import parse_overrides
from pgolf.device import pick_device
from pgolf.errors import ConfigError
from pgolf.files import claim, writable_file
from pgolf.options import SETTINGS, Parser
from pgolf.ranks import Ranks
from pgolf.submission.entry import ARTIFACT
from pgolf.submission.script import build_script
from pgolf.training.export import export
from pgolf.training.repack import SECTIONS, load_weights, open_data, settings
from pgolf.training.run_folder import RunFolder
from pgolf.training.session import Session


def refuse_to_replace(out: Path) -> None:
    """Raise ConfigError if the file at `out` is a scored artifact, or no artifact at all."""
    file = writable_file(out)
    if not file.exists():
        return
    if file.name == ARTIFACT and (file.parent / "result.json").is_file():
        raise ConfigError(
            f"{out} is the artifact that {file.parent / 'result.json'} scores: write to another "
            "file, or replace it with --force"
        )
    with open(file, "rb") as f:
        if f.read(len(MAGIC)) != MAGIC:
            raise ConfigError(
                f"{out} exists and is no artifact: write to another file, or replace it with "
                "--force"
            )


def main(argv: list[str]) -> int:
    """Write a new artifact from what a run kept; the run's own files stay as they are."""
    keys = ", ".join(f.name for cls in SECTIONS.values() for f in dataclasses.fields(cls))
    parser = Parser(
        prog="pgolf pack",
        description="Quantise and pack the weights of a run's newest checkpoint again. "
        "budget=BYTES limits code + model; with grid=uniform it is filled.",
        epilog=f"keys: {keys}. examples: pgolf pack runs/demo-seed1337 --out small attn_bits=5 "
        "mlp_bits=5; pgolf pack runs/demo-seed1337 --out tiny grid=uniform budget=1000000; "
        "then pgolf eval tiny data=FOLDER",
    )
    parser.add_argument("run", type=Path, help="run folder with a checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="artifact file to write")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--force", action="store_true",
                        help="replace whatever file is at --out")  # fmt: skip
    parser.add_argument("--data", default="", help="the run's shards, if they were moved")
    parser.add_argument("overrides", nargs="*", metavar=SETTINGS, help="settings to change")
    args = parser.parse_intermixed_args(argv)

    if args.run.is_file():
        refuse_foreign(args.run)
        raise ConfigError(f"{args.run} is a file: name the run folder that has its checkpoint")
    trained, config = settings(args.run, parse_overrides(args.overrides))
    device = pick_device(args.device)
    real = writable_file(args.out)
    in_run = real.name == ARTIFACT and (real.parent / "config.json").is_file()
    with claim(real.parent if in_run else real):
        if not args.force:
            refuse_to_replace(args.out)
        dataset = open_data(args.run, config, args.data)
        model, description = load_weights(args.run, trained, device)
        print(description)
        folder = RunFolder(args.run, writes=False)
        session = Session(config, Ranks(0, 1, device), dataset, folder)
        packed = export(session, model, build_script(config), args.out)
    for tried, size in packed.report.tried.items():
        print(f"  {tried:<16} {size:>12,} bytes")
    limit = config.artifact.budget_bytes
    print(
        f"{args.out}: model {packed.report.total:,} + code {packed.bytes_code:,} = "
        f"{packed.total:,} bytes" + (f" of {limit:,}" if limit else "")
    )
    return 0
