"""The weights and the data of a finished run, to pack them again with other settings."""

from pathlib import Path

import torch

from pgolf.config import (
    ArtifactConfig,
    Config,
    QuantConfig,
    find_key,
    from_dict,
    with_overrides,
)
from pgolf.data.manifest import Dataset
from pgolf.errors import ConfigError
from pgolf.model import GPT
from pgolf.optim.averaging import Averager
from pgolf.optim.schedule import Schedule
from pgolf.recipes import get
from pgolf.training.run_data import find_dataset, without_shards
from pgolf.training.run_folder import RunFolder, read_config

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
    weights, description = averager.export()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name])
    return model.to(device), f"{path.name}: {description}"


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
