"""GPTQ against the textbook in float64, its invariances, and what it does with bad Hessians."""

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st

from pgolf.codecs.rans_encode import code_lengths, magnitude_bits
from pgolf.config import QuantConfig
from pgolf.errors import ConfigError, TrainingError
from pgolf.quant import gptq
from pgolf.quant import quantize as module
from pgolf.quant.dequantize import QuantizedTensor, dequantize
from pgolf.quant.gptq import Factors
from pgolf.quant.gptq_uniform import Costs
from pgolf.quant.quantize import QuantizedModel, quantize
from pgolf.quant.step_grid import exact_index
from pgolf.ranks import Ranks
from tests.quant.gptq_cases import hessian, obq, row_error, weights

NAME = "blocks.0.attn.c_q.weight"
LARGEST = {"4": 7, "5": 15, "6": 31, "7": 63, "8": 127, "8/4": 127}


def settings(**more) -> QuantConfig:
    return QuantConfig(**{"small_numel": 0, "clip_search": "max", **more})


def run(w: torch.Tensor, h: torch.Tensor, config: QuantConfig, **more) -> QuantizedTensor:
    model = quantize({NAME: w}, config, False, Factors({NAME: h}, config.damping), **more)
    return model.tensors[NAME]


def total_error(w: torch.Tensor, q: QuantizedTensor, h: torch.Tensor) -> float:
    return row_error(w, dequantize(q), h).sum()


def steps_of(q: QuantizedTensor) -> np.ndarray:
    """(R, C) step of every code."""
    columns = torch.ones(q.shape[1]) if q.columns is None else q.columns
    return q.steps.double().numpy()[:, None] * columns.double().numpy()


def textbook(w, h, config: QuantConfig, step: np.ndarray, largest: int) -> np.ndarray:
    """Codes of the better of OBQ and rounding to nearest, by row."""

    def code_of(x, r, j):
        return np.clip(np.round(x / step[r, j]), -largest, largest)

    codes = obq(w, h, config.damping, code_of, lambda code, r, j: code * step[r, j])
    live = w.numpy() * (h.diagonal() != 0).numpy()
    rounded = np.clip(np.round(live / step), -largest, largest)
    better = row_error(w, codes * step, h) <= row_error(w, rounded * step, h)
    return np.where(better[:, None], codes, rounded)


@pytest.mark.parametrize("grid", ["rows", "uniform"])
@pytest.mark.parametrize("bits", ["4", "6"])
@pytest.mark.parametrize(
    ("columns", "damping", "dead"), [(24, 0.01, 0), (40, 0.1, 3), (1, 0.01, 0), (33, 1e-3, 0)]
)
def test_codes_are_those_of_the_textbook(monkeypatch, grid, bits, columns, damping, dead):
    monkeypatch.setattr(gptq, "BLOCK", 7)  # blocks that do not divide the columns
    w, h = weights(6, columns, seed=columns), hessian(columns, seed=columns)
    h[:dead], h[:, :dead] = 0, 0
    config = settings(grid=grid, attn_bits=bits, damping=damping)
    q = run(w, h, config)
    largest = LARGEST[bits] if grid == "rows" else 127
    assert torch.equal(
        q.data.double(), torch.tensor(textbook(w, h, config, steps_of(q), largest))
    )
    assert not q.data[:, :dead].any()


def test_multiples_and_full_range_are_those_of_the_grid():
    w, h = weights(8, 30), hessian(30)
    config = settings(attn_bits="8/4", clip_search="row", clip_percentiles="0.9", damping=0.1)
    codes = run(w, h, config).data.int()
    assert not (codes[codes.abs() < 127] % 4).any()
    config = settings(attn_bits="4", clip_search="row", clip_percentiles="0.8", full_range=True)
    codes = run(w, h, config).data
    assert (codes.min(), codes.max()) == (-8, 7)


def test_uniform_steps_follow_the_cholesky_diagonal():
    h = hessian(50)
    q = run(weights(9, 50), h, settings(grid="uniform"))
    order = h.diagonal().argsort(descending=True)
    damped = h.double() + 0.01 * h.diagonal().double().mean() * torch.eye(50)
    inverse = torch.linalg.inv(damped[order][:, order])
    diagonal = torch.linalg.cholesky(inverse).mT.diagonal()
    expected = diagonal / diagonal.log().mean().exp()
    ratio = q.columns.double()[order] / expected
    assert (ratio.log2().abs() <= 1 / 32 + 1e-3).all(), "the nearest of 16 steps to the octave"
    assert q.columns.max() / q.columns.min() > 4, "the columns must differ for this to test"


def test_matrices_with_the_same_inputs_have_the_same_columns():
    h = hessian(32)
    names = [f"blocks.0.attn.c_{x}.weight" for x in "qkv"]
    state = {n: weights(8 * (i + 1), 32, seed=i) for i, n in enumerate(names)}
    factors = Factors(dict.fromkeys(names, h), 0.01)
    model = quantize(state, settings(grid="uniform"), False, factors)
    columns = torch.stack([model.tensors[n].columns for n in names])
    coarser = columns > columns.amin(dim=0)
    assert coarser.float().mean() < 0.5
    largest = torch.stack([model.tensors[n].data.abs().amax(dim=0) for n in names])
    assert (largest[coarser] > 100).all(), "coarser only where codes would not fit"
    assert factors[names[0]] is factors[names[2]], "factored once"


@given(
    seed=st.integers(0, 2**16), rows=st.integers(1, 5), columns=st.integers(1, 20),
    rank=st.integers(1, 30), spread=st.floats(0, 3), grid=st.sampled_from(["rows", "uniform"]),
    bits=st.sampled_from(["4", "5", "8"]), clip=st.sampled_from(["row", "max"]),
)  # fmt: skip
def test_never_worse_than_rounding_to_nearest(seed, rows, columns, rank, spread, grid, bits, clip):
    h, w = hessian(columns, seed, rank, spread), weights(rows, columns, seed)
    config = settings(grid=grid, attn_bits=bits, clip_search=clip, damping=1e-3)
    q = run(w, h, config)
    step = steps_of(q)
    largest = 127 if grid == "uniform" else LARGEST[bits]
    rounded = np.clip(np.round(w.double().numpy() / step), -largest, largest)
    ours, nearest = row_error(w, dequantize(q), h), row_error(w, rounded * step, h)
    slack = 1e-5 * np.square(step).sum(axis=1) * h.diagonal().sum().item()
    assert (ours <= nearest + slack).all()


def test_each_row_takes_the_clip_with_the_least_error():
    w, h = weights(60, 48) ** 3, hessian(48)
    candidates = {"clip_percentiles": ("0.9", "0.97", "1"), "clip_widths": ("1.5", "2.5")}
    both = {key: ",".join(values) for key, values in candidates.items()}
    best = row_error(w, dequantize(run(w, h, settings(clip_search="row", **both))), h)
    single = []
    for percentile in candidates["clip_percentiles"]:
        q = run(w, h, settings(clip_search="row", clip_percentiles=percentile))
        single.append(row_error(w, dequantize(q), h))
    for width in candidates["clip_widths"]:
        both = {"clip_percentiles": "1", "clip_widths": width}
        q = run(w, h, settings(clip_search="row", **both))
        single.append(row_error(w, dequantize(q), h))
    np.testing.assert_allclose(best, np.min(single, axis=0), rtol=1e-4)
    assert len(np.unique(np.argmin(single, axis=0))) > 2, "rows must disagree for this to test"


def test_a_clip_for_the_matrix_is_the_best_single_one():
    w, h = weights(30, 48) ** 3, hessian(48)
    more = {"clip_search": "matrix", "attn_bits": "4"}
    q = run(w, h, settings(clip_percentiles="0.9,0.97,1", **more))
    single = [
        total_error(w, run(w, h, settings(clip_percentiles=p, **more)), h)
        for p in ("0.9", "0.97", "1")
    ]
    assert total_error(w, q, h) == pytest.approx(min(single), rel=1e-4)


@pytest.mark.parametrize("grid", ["rows", "uniform"])
def test_steps_are_on_the_grid_unless_the_published_rules_are_asked_for(grid: str):
    w, h = weights(20, 40), hessian(40)
    w[3] = 0
    q = run(w, h, settings(grid=grid, clip_search="row"))
    assert exact_index(q.steps) is not None
    assert q.columns is None or exact_index(q.columns) is not None
    for published in ({"min_step": 1.0}, {"clip_search": "matrix"}):
        assert exact_index(run(w, h, settings(**{"clip_search": "row", **published})).steps) is None


def test_a_row_that_is_too_wide_for_the_step_gets_a_coarser_one():
    w, h = weights(20, 40), hessian(40)
    w[7] *= 100
    q = run(w, h, settings(grid="uniform", width=0.5))
    assert q.steps.unique().numel() == 2 and q.steps[7] == q.steps.max()
    assert q.data[7].abs().max() >= 120 and q.bits == 8
    narrow = run(weights(20, 40), h, settings(grid="uniform", width=150.0))
    assert narrow.bits == 4 and narrow.data.abs().max() <= 7


def test_explicit_steps():
    w, h = weights(20, 40), hessian(40)
    factors = Factors({NAME: h}, 0.01)
    for step in (0.2, 0.5):
        q = quantize({NAME: w}, settings(grid="uniform"), False, factors, steps={NAME: step})
        steps = q.tensors[NAME].steps
        assert steps.float().log2().allclose(torch.tensor(step).log2(), atol=1 / 32 + 1e-3)
    for config, name in ((settings(), NAME), (settings(grid="uniform"), "tok_emb.weight")):
        with pytest.raises(ConfigError, match=name):
            quantize({NAME: w}, config, False, factors, steps={name: 0.1})


def test_rows_that_matter_more_get_finer_steps():
    w, h = weights(20, 40), hessian(40)
    moments = torch.rand(20, generator=torch.Generator().manual_seed(0)) ** 4
    factors, config = Factors({NAME: h}, 0.01), settings(grid="uniform", width=100.0)
    plain = quantize({NAME: w}, config, False, factors)
    model = quantize({NAME: w}, config, False, factors, {NAME: moments})
    moment = moments + 0.01 * moments.mean()
    expected = (moment.log().mean() - moment.log()) / 2 / math.log(2)
    ratio = model.tensors[NAME].steps.float() / plain.tensors[NAME].steps.float()
    assert (ratio.log2() - expected).abs().max() < 1 / 32 + 1e-3
    assert expected.max() - expected.min() > 3, "the rows must differ for this to test"
    loss = 0.5 * moments.double().numpy() @ row_error(w, dequantize(model.tensors[NAME]), h)
    assert model.stats[NAME].loss == pytest.approx(loss, rel=1e-4)
    assert plain.stats[NAME].loss is None
    unused = quantize({NAME: w}, config, False, factors, {NAME: torch.zeros(20)})
    assert torch.equal(unused.tensors[NAME].steps, plain.tensors[NAME].steps)


def two_layers() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A state and Hessians: shapes that repeat, shared inputs, and tensors that have none."""
    state, hessians = {}, {}
    for i in range(3):
        shared = hessian(24, seed=i)
        for x, rows in zip("qkv", (24, 12, 12), strict=True):
            name = f"blocks.{i}.attn.c_{x}.weight"
            state[name], hessians[name] = weights(rows, 24, seed=ord(x) + i), shared
        name = f"blocks.{i}.mlp.proj.weight"
        state[name], hessians[name] = weights(24, 48, seed=i), hessian(48, seed=9 + i)
    return state | {"tok_emb.weight": weights(40, 24), "backout": torch.tensor(0.1)}, hessians


def assert_same(a: QuantizedModel, b: QuantizedModel) -> None:
    assert list(a.tensors) == list(b.tensors)
    for name, q in a.tensors.items():
        for one, other in zip(vars(q).values(), vars(b.tensors[name]).values(), strict=True):
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, name
        assert a.stats[name] == b.stats[name], name


@pytest.mark.parametrize("grid", ["rows", "uniform"])
def test_batches_and_names_change_nothing(monkeypatch, grid: str):
    state, hessians = two_layers()
    config = settings(grid=grid, clip_search="row", rate_weight=0.1)
    whole = quantize(state, config, False, Factors(hessians, 0.01))
    assert_same(whole, quantize(state, config, False, Factors(hessians, 0.01)))
    monkeypatch.setattr(module, "BATCH", 1)
    single = quantize(state, config, False, Factors(hessians, 0.01))
    assert_same(whole, single)


@pytest.mark.parametrize("grid", ["rows", "uniform"])
def test_columns_in_any_order_give_the_same_codes(grid: str):
    w, h = weights(12, 30), hessian(30)
    config = settings(grid=grid, clip_search="row")
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    q, mixed = run(w, h, config), run(w[:, order], h[order][:, order], config)
    assert torch.equal(q.data[:, order], mixed.data) and torch.equal(q.steps, mixed.steps)


def _rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    state, hessians = two_layers()
    for grid in ("rows", "uniform"):
        model = quantize(
            state, settings(grid=grid), False, Factors(hessians, 0.01),
            ranks=Ranks(rank, world, torch.device("cpu")),
        )
        torch.save(model, f"{folder}/{grid}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_share_the_work_and_have_the_codes_of_one(tmp_path: Path):
    # The server of forks imports all that ranks need, which takes longer than their work.
    mp.get_context("forkserver").set_forkserver_preload([__name__])
    mp.start_processes(_rank, args=(2, str(tmp_path)), nprocs=2, start_method="forkserver")
    state, hessians = two_layers()
    for grid in ("rows", "uniform"):
        alone = quantize(state, settings(grid=grid), False, Factors(hessians, 0.01))
        for rank in range(2):
            model = torch.load(tmp_path / f"{grid}-{rank}.pt", weights_only=False)
            assert_same(alone, model)


def test_work_is_dealt_out_evenly():
    jobs = [["a"], ["b"], ["c"], ["d"], ["e"]]
    cost = {"a": 5.0, "b": 1.0, "c": 3.0, "d": 4.0, "e": 2.0}
    ranks = [Ranks(rank, 2, torch.device("cpu")) for rank in range(2)]
    parts = [module._dealt_out(jobs, lambda n: cost[n[0]], r) for r in ranks]
    assert sorted(sum(parts, [])) == sorted(jobs)
    assert [sum(cost[n[0]] for n in part) for part in parts] == [8.0, 7.0]


def test_entropy_constrained_rounding_trades_error_for_bits():
    w, h = weights(200, 100), hessian(100, spread=0.3)
    bits, errors = [], []
    for rate_weight in (0.0, 0.05, 0.2):
        q = run(w, h, settings(grid="uniform", width=40.0, rate_weight=rate_weight))
        bits += code_lengths([q.data.numpy()], [0])
        errors.append(total_error(w, q, h))
    assert bits[0] > 1.005 * bits[1] > 1.01 * bits[2]
    assert errors[0] < errors[1] < errors[2]


def test_the_cheapest_code_is_chosen_by_its_row_and_column():
    g = torch.Generator().manual_seed(0)
    codes = (torch.randn(2, 30, 20, generator=g) * torch.rand(20, generator=g) * 6).round().char()
    t = 4 * torch.randn(2, 20, generator=g)
    chosen = Costs(codes).cheapest(t, 7, 0.2)
    for matrix, numbers, ours in zip(codes, t, chosen, strict=True):
        contexts, bits = magnitude_bits(matrix.mT.numpy())
        for r, x in enumerate(numbers.tolist()):
            costs = {c: (x - c) ** 2 + 0.2 * bits[contexts[r, 7], abs(c)]
                     for c in (math.floor(x), math.ceil(x), 0)}  # fmt: skip
            assert ours[r] == min(costs, key=costs.get)
    assert (chosen != t.round()).any(), "bits must decide somewhere for this to test"


def test_lite_leaves_hessians_alone():
    w, h = weights(20, 40), hessian(40)
    config = settings(quantizer="lite", clip_search="row")
    q = run(w, h, config)
    assert torch.equal(q.data, quantize({NAME: w}, config, False).tensors[NAME].data)


def bad_hessians() -> dict[str, torch.Tensor]:
    indefinite = hessian(20)
    indefinite -= 2 * torch.linalg.eigvalsh(indefinite)[-1] * torch.eye(20)
    with_nan = hessian(20)
    with_nan[3, 4] = torch.nan
    return {"indefinite": indefinite, "nan": with_nan, "zero": torch.zeros(20, 20)}


@pytest.mark.parametrize("kind", list(bad_hessians()))
def test_a_hessian_that_cannot_be_used_is_named_and_clips_are_searched(kind: str):
    w, h = weights(8, 20), bad_hessians()[kind]
    config = settings(clip_search="row")
    with pytest.warns(UserWarning, match=f"{NAME}.*only clips are searched"):
        q = run(w, h, config)
    assert torch.equal(q.data, quantize({NAME: w}, config, False).tensors[NAME].data)


def test_more_damping_mends_a_hessian_and_says_so():
    w, h = weights(8, 20), hessian(20)
    h -= (torch.linalg.eigvalsh(h)[0] + 0.05 * h.diagonal().mean()) * torch.eye(20)
    with pytest.warns(UserWarning, match=f"{NAME}.*damping=0.1 is used for 0.01"):
        q = run(w, h, settings())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(q.data, run(w, h, settings(damping=0.1)).data)


def test_a_weight_that_is_not_finite_is_refused():
    w = weights(8, 20)
    w[2, 3] = torch.nan
    with pytest.raises(TrainingError, match=NAME):
        run(w, hessian(20), settings())


def test_error_by_the_hessian_is_reported_as_it_is():
    w, h = weights(8, 20), hessian(20)
    for quantizer in ("gptq", "lite"):
        config = settings(quantizer=quantizer, attn_bits="4")
        model = quantize({NAME: w}, config, False, Factors({NAME: h}, 0.01))
        expected = total_error(w, model.tensors[NAME], h) / row_error(w, 0 * w, h).sum()
        assert model.stats[NAME].hessian_error == pytest.approx(expected, rel=1e-4)
    assert quantize({NAME: w}, config, False).stats[NAME].hessian_error is None
