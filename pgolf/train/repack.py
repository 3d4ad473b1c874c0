"""`pgolf pack`: quantise and pack a run's newest checkpoint again, with other settings."""

import dataclasses
from pathlib import Path

import torch

from pgolf.artifact.container import MAGIC
from pgolf.artifact.foreign import refuse_foreign
from pgolf.config import (
    ArtifactConfig,
    Config,
    QuantConfig,
    find_key,
    from_dict,
    parse_overrides,
    with_overrides,
)
from pgolf.data.manifest import Dataset
from pgolf.device import pick_device
from pgolf.errors import ConfigError
from pgolf.files import claim, writable_file
from pgolf.model import GPT
from pgolf.optim.averaging import Averager
from pgolf.optim.schedule import Schedule
from pgolf.options import SETTINGS, Parser
from pgolf.recipes import get
from pgolf.submission.entry import ARTIFACT
from pgolf.train.export import export
from pgolf.train.ranks import Ranks
from pgolf.train.run_data import find_dataset, without_shards
from pgolf.train.run_folder import RunFolder, read_config

SECTIONS = {"quant": QuantConfig, "artifact": ArtifactConfig}


def load_weights(run: Path, trained: Config, device: torch.device) -> tuple[GPT, str]:
    """The model with the weights that a run exports from its newest checkpoint, and their name.

    Raises:
        DataError: there is no checkpoint that is whole.
    """
    state, path = RunFolder(run, writes=False).load(torch.device("cpu"))
    model = GPT(trained.model, max_length=trained.data.seq_len)
    model.load_state_dict({name: state["model"][name] for name, _ in model.named_parameters()})
    averager = Averager(model, Schedule(trained))
    averager.load_state_dict(state["averager"])
    weights, words = averager.export()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name])
    return model.to(device), f"{path.name}: {words}"


def settings(run: Path, overrides: dict[str, str]) -> tuple[Config, Config]:
    """The settings of a run as it was trained, and those to pack it with.

    Raises:
        ConfigError: an override is not about packing, or lifts the contest's limit.
    """
    trained = from_dict(read_config(run))
    for key in overrides:
        section = find_key(key)[0]
        if section not in SECTIONS:
            raise ConfigError(f"{key}: packing takes keys of {' and '.join(SECTIONS)} only")
    config = with_overrides(trained, overrides)
    get(config.recipe).check_limit(config)
    return trained, config


def open_data(run: Path, config: Config, data: str) -> Dataset:
    """What packing needs to know of a run's data: the shards only where Hessians are taken of them.

    Raises:
        DataError: they are needed, and not found.
    """
    reads_text = config.quant.quantizer == "gptq" and config.quant.calibration == "train"
    if not reads_text and not data and (known := without_shards(run)):
        return known
    return find_dataset(run, config.data, data)


def refuse_to_replace(out: Path) -> None:
    """Raise ConfigError if what stands at `out` is a scored artifact, or none at all."""
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
                        help="replace whatever file stands at --out")  # fmt: skip
    parser.add_argument(
        "overrides", nargs="*", metavar=SETTINGS,
        help="settings to change; data=FOLDER if the run's shards were moved",
    )  # fmt: skip
    args = parser.parse_intermixed_args(argv)

    if args.run.is_file():
        refuse_foreign(args.run)
        raise ConfigError(f"{args.run} is a file: name the run folder that has its checkpoint")
    overrides = parse_overrides(args.overrides)
    data = overrides.pop("data", "")
    trained, config = settings(args.run, overrides)
    device = pick_device(args.device)
    real = writable_file(args.out)
    in_run = real.name == ARTIFACT and (real.parent / "config.json").is_file()
    with claim(real.parent if in_run else real):
        if not args.force:
            refuse_to_replace(args.out)
        dataset = open_data(args.run, config, data)
        model, words = load_weights(args.run, trained, device)
        print(words)
        packed = export(model, config, dataset, Ranks(0, 1, device), args.out, print)
    for tried, size in packed.report.tried.items():
        print(f"  {tried:<16} {size:>12,} bytes")
    limit = config.artifact.budget_bytes
    print(
        f"{args.out}: model {packed.report.total:,} + code {packed.bytes_code:,} = "
        f"{packed.total:,} bytes" + (f" of {limit:,}" if limit else "")
    )
    return 0
