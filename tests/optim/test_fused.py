"""The optimiser step through the operators against torch.optim, and its state in checkpoints."""

import copy
from dataclasses import replace

import pytest
import torch

from pgolf import extension, recipes
from pgolf.config import OptimConfig
from pgolf.model import GPT
from pgolf.ops.choose import choose
from pgolf.ops.grad_norm import grad_norm
from pgolf.ops.operator import OPERATORS
from pgolf.ops.testing import bits_of
from pgolf.optim import fused
from pgolf.optim.groups import Optimizers

from ..ops.cases import implementations
from .test_groups import gradients, model

CPP = dict.fromkeys(fused.OPERATORS, "cpu")
CONFIG = OptimConfig(ns_dtype="fp32", grad_clip=2.0)

needs_cpp = pytest.mark.skipif(
    bool(OPERATORS["param_update"].implementations["cpu"].missing()),
    reason="no C++ kernels",
)


def pair(ops: dict[str, str], **changes: object) -> tuple[GPT, Optimizers]:
    net = model(**changes)
    return net, Optimizers(net, CONFIG, ops)


def run(optimisers: Optimizers, steps: range) -> list[float]:
    norms = []
    for step in steps:
        grads, norm = gradients(optimisers, step, 0.1)
        optimisers.step(grads, norm, 0.5 + step / 20, 0.9)
        norms.append(norm.item())
    return norms


def close(first: GPT, second: GPT, rtol: float = 1e-4, atol: float = 2e-5) -> None:
    for (name, p), q in zip(first.named_parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@needs_cpp
@pytest.mark.parametrize("one", [*fused.OPERATORS, ""])
def test_twenty_steps_are_those_of_torch(one: str) -> None:
    """With one kernel, the others in plain torch, and with all of them."""
    ops = {one: "cpu"} if one else CPP
    (torchs, theirs), (net, ours) = pair({}, table_dtype="fp32"), pair(ops, table_dtype="fp32")
    assert ours.fused and not theirs.fused
    assert run(ours, range(20)) == pytest.approx(run(theirs, range(20)), rel=1e-5)
    close(net, torchs)


@needs_cpp
def test_rows_are_normed_and_safety_counts() -> None:
    config = replace(CONFIG, ns_row_norm=True, ns_coefficients="polar_express")
    nets = [model(table_dtype="fp32") for _ in range(3)]
    for net, ops, how in zip(nets, ({}, CPP, CPP), (config, config, CONFIG), strict=True):
        run(Optimizers(net, how, ops), range(3))
    close(nets[0], nets[1])
    with pytest.raises(AssertionError):
        close(nets[0], nets[2])


@needs_cpp
def test_tables_in_bf16_stay_near() -> None:
    (torchs, theirs), (net, ours) = pair({}), pair(CPP)
    run(ours, range(3))
    run(theirs, range(3))
    close(net, torchs, rtol=2**-6, atol=2**-11)
    state = ours.adamw.state[net.tok_emb.weight]
    assert state["exp_avg"].dtype is torch.bfloat16


@needs_cpp
@pytest.mark.parametrize("kinds", [(CPP, CPP), (CPP, {}), ({}, CPP)], ids=["ours", "out", "in"])
def test_state_goes_on(kinds: tuple[dict, dict]) -> None:
    """Also from the operators to torch.optim, and the other way."""
    (before, first), (after, second) = (pair(ops, table_dtype="fp32") for ops in kinds)
    run(first, range(3))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    after.load_state_dict(before.state_dict())
    run(first, range(3, 6))
    run(second, range(3, 6))
    if kinds[0] == kinds[1]:
        assert all(map(torch.equal, before.parameters(), after.parameters()))
    close(before, after)


@needs_cpp
def test_numbers_that_are_there_are_what_a_step_takes() -> None:
    (net, optimisers), (same, others) = pair(CPP), pair(CPP)
    for step in range(2):
        sent = torch.tensor(others.numbers(0.25, 0.8))
        optimisers.step(*gradients(optimisers, step), 0.25, 0.8)
        others.step(*gradients(others, step), 1.0, 0.95, sent=sent)
        assert all(map(torch.equal, net.parameters(), same.parameters()))


@needs_cpp
def test_averages_follow() -> None:
    net = model()
    averages = {n: torch.full(p.shape, 7.0) for n, p in net.named_parameters()}
    optimisers = Optimizers(net, CONFIG, CPP, averages)
    exact = {n: t.double() for n, t in averages.items()}
    for step, rate in enumerate((0.0, 1.0, 0.25)):
        optimisers.step(*gradients(optimisers, step), 1.0, 0.9, rate)
        for n, p in net.named_parameters():
            exact[n] += rate * (p.detach().double() - exact[n])
            torch.testing.assert_close(averages[n].double(), exact[n], rtol=1e-5, atol=1e-6)


def bits(optimisers: Optimizers) -> list[torch.Tensor]:
    """Of weights, momenta and moments."""
    states = [s for o in (optimisers.muon, optimisers.adamw) for s in o.state.values()]
    kept = [t for s in states for name, t in s.items() if name != "step"]
    return [bits_of(t) for t in (*optimisers.params, *kept)]


@pytest.mark.parametrize(("bad", "which", "clip"), [("nan", 0, 2.0), ("inf", -1, 0.0)])
@pytest.mark.parametrize("impl", [*implementations(OPERATORS["param_update"]), "torch"])
def test_a_gradient_that_is_not_finite_is_as_no_step(impl, bad, which, clip) -> None:
    """One of Muon's or of AdamW's leaves all of them as they were, and they go on from there."""
    ops = {} if impl == "torch" else dict.fromkeys(fused.OPERATORS, impl)
    config = OptimConfig(ns_dtype="fp32", grad_clip=clip)
    hit, twin = (Optimizers(model(), config, ops) for _ in range(2))
    assert bool(hit.fused) == bool(ops)
    for optimisers in (hit, twin):
        run(optimisers, range(2))
    before = bits(hit)
    grads, _ = gradients(hit, 2)
    grads[hit.params[which]].view(-1)[0] = float(bad)
    hit.step(grads, grad_norm(list(grads.values()), "reference")[0], 1.0, 0.9)
    assert all(map(torch.equal, bits(hit), before))
    if hit.fused:  # The host does not know, and counts the step: only AdamW's biases tell of it.
        assert hit.fused.count == 3
        hit.fused.count = 2
    for optimisers in (hit, twin):
        run(optimisers, range(3, 5))
    after = bits(hit)
    assert all(map(torch.equal, after, bits(twin)))
    assert not any(map(torch.equal, after, before))


def test_a_parameter_without_gradient_is_named() -> None:
    _, optimisers = pair({"grad_norm": "reference", "param_update": "cpu"})
    grads, norm = gradients(optimisers, 0)
    del grads[optimisers.params[3]]
    with pytest.raises(ValueError, match="1 parameters .*, blocks.0.attn.c_k.weight among"):
        optimisers.step(grads, norm, 1.0, 0.9)


class Recorder:
    """Stands in for the module of CUDA kernels: keeps what is launched, and does nothing."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple]] = []

    def build_info(self) -> dict:
        return {"cuda": True, "cudart": "emulated"}

    def __getattr__(self, name: str):
        return lambda *args: self.calls.append((name, args))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch):
    stand_in = Recorder()
    monkeypatch.setenv(extension.CUDA_VARIABLE, "a stand-in")
    monkeypatch.setattr(extension, "cuda", lambda: stand_in)
    yield stand_in
    choose.cache_clear()


def test_all_of_pr1473_is_three_calls(recorder: Recorder, monkeypatch) -> None:
    """Two launches for the norm, one for the momentum, one for the update: all fits one list.

    (csrc/cuda/multi_tensor.cuh holds 406 parameters in the arguments of a launch, 580 matrices.)
    """
    config = recipes.get("pr1473").config()
    choose.cache_clear()
    kernels = dict.fromkeys(fused.OPERATORS, "cuda")
    optimisers = Optimizers(GPT(config.model), config.optim, kernels)
    monkeypatch.setattr(fused, "newton_schulz_all", lambda stacks, **options: stacks)
    grads = {p: torch.empty_like(p) for p in optimisers.params}
    norm, _ = grad_norm(list(grads.values()), "cuda")
    optimisers.step(grads, norm, 1.0, 0.9)
    assert [name for name, _ in recorder.calls] == [f"{name}_cuda" for name in fused.OPERATORS]
    (gradients, *_), (matrices, *_), (params, *_) = (args for _, args in recorder.calls)
    assert len(gradients) == len(params) == len(optimisers.params) <= 406
    assert len(matrices) == 66
