"""`pgolf pack`: quantise and pack a run's newest checkpoint again, with other settings."""

import argparse
import dataclasses
from pathlib import Path

import torch

from pgolf.config import (
    ArtifactConfig,
    QuantConfig,
    find_key,
    from_dict,
    parse_overrides,
    with_overrides,
)
from pgolf.data.manifest import Dataset
from pgolf.errors import ConfigError
from pgolf.model import GPT
from pgolf.optim.averaging import Averager
from pgolf.optim.schedule import Schedule
from pgolf.recipes import get
from pgolf.train.finish import pack_to_budget
from pgolf.train.run_folder import RunFolder, read_config

SECTIONS = {"quant": QuantConfig, "artifact": ArtifactConfig}


def main(argv: list[str]) -> int:
    """Write a new artifact from what a run kept; the run's own files stay as they are."""
    keys = ", ".join(f.name for cls in SECTIONS.values() for f in dataclasses.fields(cls))
    parser = argparse.ArgumentParser(
        prog="pgolf pack",
        description="Quantise and pack the weights of a run's newest checkpoint again.",
        epilog=f"keys: {keys}. example: pgolf pack runs/demo-seed1337 --out small attn_bits=5 "
        "mlp_bits=5; then pgolf eval small --data FOLDER",
    )
    parser.add_argument("run", type=Path, help="run folder with a checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="artifact file to write")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(argv)

    trained = from_dict(read_config(args.run))
    overrides = parse_overrides(args.overrides)
    for key in overrides:
        section = find_key(key)[0]
        if section not in SECTIONS:
            raise ConfigError(f"{key}: packing takes keys of {' and '.join(SECTIONS)} only")
    config = with_overrides(trained, overrides)
    get(config.recipe).check_limit(config)
    dataset = Dataset.open(config.data.data, config.data.tokenizer or None)

    state, path = RunFolder(args.run, writes=False).load(torch.device("cpu"))
    model = GPT(config.model, max_length=config.data.seq_len)
    model.load_state_dict(
        {name: state["model"][name] for name, _ in model.named_parameters()}, strict=True
    )
    averager = Averager(model, Schedule(trained))
    averager.load_state_dict(state["averager"])
    weights, words = averager.export()
    print(f"{path.name}: {words}")
    packed = pack_to_budget(weights, config, dataset, args.out)
    for tried, size in packed.report.tried.items():
        print(f"  {tried:<12} {size:>12,} bytes")
    limit = config.artifact.budget_bytes
    print(
        f"{args.out}: model {packed.report.total:,} + code {packed.bytes_code:,} = "
        f"{packed.total:,} bytes" + (f" of {limit:,}" if limit else "")
    )
    return 0
