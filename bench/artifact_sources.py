"""Models for `bench artifact`: artifacts, checkpoints, and synthetic weights."""

import contextlib
import io
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pgolf import roles
from pgolf.artifact.container import read_artifact
from pgolf.artifact.layout import Layout, lay_out
from pgolf.artifact.pack import encode
from pgolf.config import Config
from pgolf.errors import ConfigError
from pgolf.model import GPT
from pgolf.model.init import init_weights
from pgolf.quant.budget import Steps, fill_budget
from pgolf.quant.gptq import Factors
from pgolf.quant.hessians import collect
from pgolf.quant.quantize import QuantizedModel, quantize
from pgolf.ranks import Ranks
from pgolf.recipes import get
from pgolf.submission.script import build_script
from pgolf.training.export import export
from pgolf.training.repack import load_weights, settings
from pgolf.training.run_data import find_dataset
from pgolf.training.run_folder import RunFolder
from pgolf.training.session import Session

CPU = torch.device("cpu")
SEQUENCES, TOKENS = 4, 512  # of the random text that stands for calibration
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
    """An artifact as it is, or the weights of a run's newest checkpoint, packed as the run would.

    Raises:
        PgolfError: it can't be read, or `overrides` do not fit.
    """
    if not path.is_dir():
        if overrides:
            raise ConfigError(f"{path} is quantised already: settings are for runs and recipes")
        return read_artifact(path).layout
    trained, config = settings(path, {**overrides, "codec": "rans"})
    dataset = find_dataset(path, config.data)
    model, _ = load_weights(path, trained, CPU)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "artifact"
        session = Session(config, Ranks(0, 1, CPU), dataset, RunFolder(path, writes=False))
        with contextlib.redirect_stdout(io.StringIO()):  # what packing says
            export(session, model, build_script(config), file)
        return read_artifact(file).layout


def synthetic(recipe: str, noise: str, overrides: Mapping[str, str]) -> Layout:
    """Independent numbers in the shapes of a recipe, with the rows and columns of trained weights.

    A matrix is RMS * row factor * column factor * unit noise, with log-normal factors of SPREADS.
    Where the recipe calibrates, what such a model makes of random tokens stands for text.

    Raises:
        ConfigError: no such recipe, or `overrides` do not fit.
        BudgetError: the recipe fits a budget, and no steps are coarse enough.
    """
    config = get(recipe).config({**overrides, "codec": "rans"})
    model = GPT(config.model, max_length=TOKENS)
    init_weights(model, config.run.seed)
    generator = torch.Generator().manual_seed(config.run.seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and name.endswith(".weight"):
                p.copy_(_weights(name, tuple(p.shape), noise, generator))
    return lay_out(_quantised(model, config, generator).tensors, {"recipe": config.recipe})


def _weights(
    name: str, shape: tuple[int, ...], noise: str, generator: torch.Generator
) -> Tensor:
    w = RMS * torch.randn(shape, generator=generator)
    if noise == "laplacian":  # a Gaussian of exponential variance
        exponential = torch.empty(shape).exponential_(generator=generator)
        w *= exponential.sqrt_()
    group = roles.group(name)
    key = f"mlp.{name.split('.')[-2]}" if group == "mlp" else group
    for axis, spread in enumerate(SPREADS[key]):
        factors = (spread * torch.randn(shape[axis], generator=generator)).exp()
        w *= factors[:, None] if axis == 0 else factors
    return w


def _quantised(model: GPT, config: Config, generator: torch.Generator) -> QuantizedModel:
    state = model.export_state()
    if config.quant.quantizer != "gptq":
        return quantize(state, config.quant)
    tokens = torch.randint(config.model.vocab_size, (SEQUENCES, TOKENS + 1), generator=generator)
    statistics = collect(model, tokens, SEQUENCES * TOKENS)
    factors = Factors(statistics.hessians, config.quant.damping)
    if config.quant.grid != "uniform":
        return quantize(state, config.quant, factors=factors, moments=statistics.moments)
    steps = Steps(state, config.quant, statistics, factors)
    if not config.artifact.fit_to_budget:
        return steps.at(steps.level.at(steps.nominal), progress=True)

    def size(candidate: QuantizedModel) -> int:
        meta = {"recipe": config.recipe}
        return len(encode(candidate, meta, config.artifact, progress=False).data)

    code = len(build_script(config).data)
    fitted, fit = fill_budget(steps, config.artifact.budget_bytes - code, size)
    print(f"{config.recipe}: code {code:,} + model {fit.chosen.size:,} = "
          f"{code + fit.chosen.size:,} bytes of {config.artifact.budget_bytes:,}")  # fmt: skip
    return fitted


def weights_of(layout: Layout) -> int:
    """How many weights a model has."""
    return sum(math.prod(e.shape) for e in layout.header.tensors)
