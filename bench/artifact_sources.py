"""Models for `bench artifact`: artifacts, checkpoints, and synthetic weights."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pgolf.artifact.container import read_artifact
from pgolf.artifact.layout import lay_out
from pgolf.artifact.table import Layout
from pgolf.config import Config, from_dict, with_overrides
from pgolf.errors import ConfigError
from pgolf.model import GPT
from pgolf.optim.averaging import Averager
from pgolf.optim.schedule import Schedule
from pgolf.quant.policy import category
from pgolf.quant.quantize import quantize
from pgolf.recipes import get
from pgolf.train.run_folder import RunFolder, read_config

# Standard deviations of the logarithms of the rms of rows and of columns: medians over the layers
# of a demo model that was trained for two epochs of its corpus.
SPREADS = {
    "attn": (0.10, 0.09),
    "mlp.fc": (0.59, 0.05),
    "mlp.proj": (0.03, 0.62),
    "tok": (0.41, 0.06),
    "bigram": (0.12, 0.01),
    "ve": (1.43, 0.03),
    "scalars": (0.10, 0.10),
}
RMS = 0.1
NOISES = ("gaussian", "laplacian")


def from_path(path: Path, overrides: Mapping[str, str]) -> Layout:
    """An artifact as it is, or the weights of a run's newest checkpoint, quantised.

    There is no calibration here: where the run says gptq, clips are searched instead. For codes of
    GPTQ name an artifact.

    Raises:
        ArtifactError, ConfigError, StorageError: it can't be read, or `overrides` do not fit.
    """
    if not path.is_dir():
        if overrides:
            raise ConfigError(f"{path} is quantised already: settings are for runs and recipes")
        return read_artifact(path).layout
    trained = from_dict(read_config(path))
    state, _ = RunFolder(path, writes=False).load(torch.device("cpu"))
    model = GPT(trained.model, max_length=trained.data.seq_len)
    names = [name for name, _ in model.named_parameters()]
    model.load_state_dict({name: state["model"][name] for name in names}, strict=True)
    averager = Averager(model, Schedule(trained))
    averager.load_state_dict(state["averager"])
    weights, _ = averager.export()
    return _quantised(weights, with_overrides(trained, overrides))


def synthetic(recipe: str, noise: str, overrides: Mapping[str, str]) -> Layout:
    """Independent numbers in the shapes of a recipe, with the rows and columns of trained weights.

    A matrix is RMS * row factor * column factor * unit noise, with log-normal factors of SPREADS.

    Raises:
        ConfigError: no such recipe, or `overrides` do not fit.
    """
    config = get(recipe).config(overrides)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in GPT(config.model).named_parameters()}
    generator = torch.Generator().manual_seed(config.run.seed)
    weights = {name: _weights(name, shape, noise, generator) for name, shape in shapes.items()}
    return _quantised(weights, config)


def _weights(
    name: str, shape: tuple[int, ...], noise: str, generator: torch.Generator
) -> Tensor:
    w = RMS * torch.randn(shape, generator=generator)
    if len(shape) != 2:
        return w
    if noise == "laplacian":  # a Gaussian of exponential variance
        exponential = torch.empty(shape).exponential_(generator=generator)
        w *= exponential.sqrt_()
    group = category(name)
    key = f"mlp.{name.split('.')[-2]}" if group == "mlp" else group
    for axis, spread in enumerate(SPREADS[key]):
        factors = (spread * torch.randn(shape[axis], generator=generator)).exp()
        w *= factors[:, None] if axis == 0 else factors
    return w


def _quantised(weights: Mapping[str, Tensor], config: Config) -> Layout:
    return lay_out(quantize(weights, config.quant).tensors, {"recipe": config.recipe})


def weights_of(layout: Layout) -> int:
    """How many weights a model has."""
    return sum(math.prod(e.shape) for e in layout.header.tensors)
