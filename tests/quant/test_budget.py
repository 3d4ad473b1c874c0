"""Steps of a whole model: shares by what a matrix matters, and a file of the size asked for."""

import pytest
import torch

from pgolf.artifact.pack import encode
from pgolf.config import ArtifactConfig, QuantConfig
from pgolf.errors import ConfigError
from pgolf.quant import budget as budget_module
from pgolf.quant.budget import WINDOW, Steps, expected_loss, fill_budget, fit_lines
from pgolf.quant.gptq import Factors
from pgolf.quant.hessians import Calibration
from pgolf.quant.quantize import tensor_stats
from pgolf.recipes import get

from .gptq_cases import hessian, weights

QUICK = ArtifactConfig(codec="zstd", zstd_level=3)  # rans takes most of a fit of so few weights
NAMES = [f"blocks.{i}.{part}.weight" for i in range(3) for part in ("attn.c_q", "mlp.fc")]


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    made = {n: weights(64, 48, seed=i) for i, n in enumerate(NAMES)}
    return made | {"smear.gate": torch.ones(48)}


@pytest.fixture
def statistics() -> Calibration:
    hessians = {n: hessian(48, seed=i) for i, n in enumerate(NAMES)}
    uneven = torch.linspace(0.5, 1.5, 64)
    moments = {n: 10.0**-i * uneven for i, n in enumerate(NAMES)}
    return Calibration(hessians, moments, 1000)


def steps_of(state, statistics, **settings) -> Steps:
    config = QuantConfig(grid="uniform", small_numel=0, **settings)
    return Steps(state, config, statistics, Factors(statistics.hessians, 0.01))


def size(model) -> int:
    return len(encode(model, {}, QUICK, progress=False).data)


def test_the_file_is_just_within_the_budget(state, statistics) -> None:
    for target in (5_000, 9_000):
        model, fit = fill_budget(steps_of(state, statistics), target, size, progress=False)
        assert size(model) == fit.chosen.size <= target
        beside = fit.finer
        assert fit.chosen.size >= target - target // WINDOW or beside.size > target
        assert f"{target:,}" in fit_lines(fit, target)[0]


def test_it_is_deterministic_and_does_not_depend_on_the_way(state, statistics) -> None:
    models = [
        fill_budget(steps_of(state, statistics), 7_000, size, progress=False)[0] for _ in "ab"
    ]
    steps = steps_of(state, statistics)
    for other in (5_000, 7_000):  # from another setting of the same object
        model, _ = fill_budget(steps, other, size, progress=False)
    for name, q in models[0].tensors.items():
        for m in (models[1], model):
            assert torch.equal(q.data, m.tensors[name].data), name


def test_every_matrix_costs_the_same_for_each_of_its_weights(state, statistics) -> None:
    """Moments that differ by 32 end in losses that hardly do: the water is level."""
    for i, n in enumerate(NAMES):
        statistics.moments[n] = 2.0**-i * torch.linspace(0.5, 1.5, 64)
    steps = steps_of(state, statistics)
    model = steps.at(steps.level.at(steps.nominal))
    losses = [model.stats[n].loss for n in NAMES]
    assert max(losses) < 2 * min(losses)
    flat = Calibration(statistics.hessians, dict.fromkeys(NAMES, torch.ones(64)), 1000)
    ignorant = steps_of(state, flat)
    assert ignorant.level.at(ignorant.nominal) != steps.known


def test_the_shares_are_better_than_equal_steps_at_equal_bytes(state, statistics) -> None:
    fitted, _ = fill_budget(steps_of(state, statistics), 7_000, size, progress=False)
    flat = Calibration(statistics.hessians, dict.fromkeys(NAMES, torch.ones(64)), 1000)
    steps = steps_of(state, flat)
    equal, _ = fill_budget(steps, 7_000, size, progress=False)
    judge = steps_of(state, statistics)
    loss = sum(
        tensor_stats(
            state[n], equal.tensors[n], equal.plans[n], judge.factors[n], statistics.moments[n]
        ).loss
        for n in NAMES
    )
    assert expected_loss(fitted) < 0.5 * loss


def test_only_what_changes_is_quantised_again(state, statistics, monkeypatch) -> None:
    steps = steps_of(state, statistics)
    here = steps.level.at(0.0)
    steps.at(here)
    asked = []
    quantize = budget_module.quantize
    monkeypatch.setattr(
        budget_module, "quantize", lambda *args: asked.append(args[7]) or quantize(*args)
    )
    steps.at(here | {NAMES[2]: here[NAMES[2]] + 1})
    assert asked == [{NAMES[2]}]


def test_a_matrix_that_nothing_depends_on_keeps_the_step_of_its_plan(state, statistics) -> None:
    statistics.moments[NAMES[0]] = torch.zeros(64)
    steps = steps_of(state, statistics)
    model = steps.at(steps.level.at(steps.nominal))
    assert model.tensors[NAMES[0]].data.abs().max() > 0


def test_settings_that_cannot_be_fitted() -> None:
    demo = get("demo")
    with pytest.raises(ConfigError, match="fit_to_budget=true needs grid=uniform"):
        demo.config({"fit_to_budget": "true", "grid": "rows"})
    with pytest.raises(ConfigError, match="needs a budget_bytes above 0"):
        demo.config({"fit_to_budget": "true", "grid": "uniform", "budget_bytes": "0"})


def test_no_matrix_has_a_step(state) -> None:
    nothing = steps_of({n: torch.zeros_like(w) for n, w in state.items()}, Calibration({}, {}, 1))
    with pytest.raises(ConfigError, match="no matrix has a step"):
        fill_budget(nothing, 10_000, size, progress=False)


def test_a_matrix_of_zeros_stays_one(state, statistics) -> None:
    state[NAMES[1]] = torch.zeros(64, 48)
    model, _ = fill_budget(steps_of(state, statistics), 7_000, size, progress=False)
    assert not model.tensors[NAMES[1]].data.any()
