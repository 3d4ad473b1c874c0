"""Muon against a plain float64 loop over single matrices, and on two ranks against one."""

import copy
import inspect
import pickle
import re

import numpy as np
import pytest
import torch

from pgolf.optim import Muon

# square, wide and tall as mlp.fc (rows = 3 columns); three, two and one of a shape, on two ranks
SHAPES = {
    "q": (8, 8),
    "k": (4, 8),
    "fc": (24, 8),
    "o": (8, 8),
    "down": (8, 24),
    "v": (4, 8),
    "third": (8, 8),
}
LR, DECAY = 0.05, 0.3
MOMENTA = (0.5, 0.8, 0.9, 0.9)


def weights() -> dict[str, torch.nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return {n: torch.nn.Parameter(torch.randn(*s, generator=g)) for n, s in SHAPES.items()}


def gradient(name: str, step: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(100 * step + list(SHAPES).index(name))
    return torch.randn(*SHAPES[name], generator=g)


def muon(params: dict[str, torch.nn.Parameter], nesterov: bool = True) -> Muon:
    return Muon(
        params.values(),
        lr=LR,
        momentum=0.0,
        weight_decay=DECAY,
        nesterov=nesterov,
        ns_steps=5,
        ns_dtype=torch.float32,
    )


def short(params, dtype: torch.dtype) -> Muon:
    return Muon(params, LR, momentum=0.0, weight_decay=DECAY, ns_dtype=dtype)


def run(optimiser: Muon, params: dict[str, torch.nn.Parameter]) -> None:
    for step, momentum in enumerate(MOMENTA):
        for name, p in params.items():
            p.grad = gradient(name, step)
        for group in optimiser.param_groups:
            group["momentum"], group["lr"] = momentum, LR / (step + 1)
        optimiser.step()


def by_hand(name: str, nesterov: bool) -> np.ndarray:
    """The specification in float64, one matrix at a time."""
    w = weights()[name].detach().double().numpy()
    buffer = np.zeros_like(w)
    for step, momentum in enumerate(MOMENTA):
        g = gradient(name, step).double().numpy()
        lr = LR / (step + 1)
        buffer = momentum * buffer + g
        x = g + momentum * buffer if nesterov else buffer
        x = x / (np.linalg.norm(x) + 1e-7)
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        rows, columns = w.shape
        w = w * (1 - lr * DECAY) - lr * np.sqrt(max(1, rows / columns)) * x
    return w


@pytest.mark.parametrize("nesterov", [True, False])
def test_several_steps_follow_the_formula(nesterov: bool) -> None:
    params = weights()
    run(muon(params, nesterov), params)
    for name, p in params.items():
        expected = by_hand(name, nesterov)
        np.testing.assert_allclose(
            p.detach().double().numpy(), expected, rtol=0, atol=2e-5, err_msg=name
        )


def test_only_the_up_projection_gets_a_factor() -> None:
    """One step from zero without decay moves every singular direction by lr times the factor."""
    params = {n: torch.nn.Parameter(torch.zeros(*s)) for n, s in SHAPES.items()}
    optimiser = Muon(
        params.values(), 1.0, momentum=0.0, weight_decay=0.0, ns_steps=12, ns_dtype=torch.float32
    )
    for name, p in params.items():
        p.grad = gradient(name, 0)
    optimiser.step()
    for name, p in params.items():
        mean = torch.linalg.svdvals(p.detach()).mean().item()
        assert mean == pytest.approx(3**0.5 if name == "fc" else 1.0, rel=0.2), name


def test_gradients_are_left_as_they_are() -> None:
    for nesterov in (True, False):
        params = weights()
        run(muon(params, nesterov), params)
        for name, p in params.items():
            assert torch.equal(p.grad, gradient(name, len(MOMENTA) - 1)), name


def test_momentum_is_kept_in_fp32_and_round_trips() -> None:
    first, second = weights(), weights()
    optimiser = muon(first)
    run(optimiser, first)
    assert all(s["momentum_buffer"].dtype is torch.float32 for s in optimiser.state.values())
    resumed = muon(second)
    resumed.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    with torch.no_grad():
        for name in second:
            second[name].copy_(first[name])
    run(optimiser, first)
    run(resumed, second)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_bf16_iteration_stays_near_the_fp32_one() -> None:
    exact, rough = weights(), weights()
    run(muon(exact), exact)
    run(short(rough.values(), torch.bfloat16), rough)
    for name in exact:
        assert rough[name].dtype is torch.float32
        change = (exact[name] - weights()[name]).norm()
        assert (rough[name] - exact[name]).norm() < 0.1 * change, name


def test_alone_it_is_called_as_torch_calls_its_own() -> None:
    """Defaults, and without momentum, whose definition differs, the same step."""
    ours, theirs = (inspect.signature(m).parameters for m in (Muon, torch.optim.Muon))
    shared = (ours.keys() & theirs.keys()) - {"params", "ns_coefficients"}
    assert shared == {"lr", "momentum", "weight_decay", "nesterov", "ns_steps"}
    for name in shared:
        assert ours[name].default == theirs[name].default, name
    steps = []
    for kind in (Muon, torch.optim.Muon):
        params = weights()
        for name, p in params.items():
            p.grad = gradient(name, 0)
        kind(params.values(), momentum=0.0).step()
        steps.append(params)
    for name in SHAPES:
        torch.testing.assert_close(steps[0][name], steps[1][name], rtol=0, atol=1e-4)


def test_parameters_without_gradient_are_left_alone() -> None:
    params = weights()
    optimiser = Muon(params.values())
    for name in ("q", "k"):
        params[name].grad = gradient(name, 0)
    optimiser.step()
    before = weights()
    for name, p in params.items():
        assert torch.equal(p, before[name]) == (name not in ("q", "k")), name
    assert len(optimiser.state) == 2


def test_found_inf_of_1_changes_nothing_and_of_0_is_as_none() -> None:
    plain, watched = weights(), weights()
    optimisers = muon(plain), muon(watched)
    run(optimisers[0], plain)
    optimisers[1].found_inf = torch.tensor([0.0])
    run(optimisers[1], watched)
    optimisers[1].found_inf.fill_(1.0)
    for p in watched.values():
        p.grad = torch.full_like(p, float("nan"))
    optimisers[1].step()
    for name in SHAPES:
        states = (o.state[w[name]]["momentum_buffer"]
                  for o, w in zip(optimisers, (plain, watched), strict=True))  # fmt: skip
        assert torch.equal(plain[name], watched[name]) and torch.equal(*states), name


def test_what_is_no_matrix_is_refused_in_words() -> None:
    matrix = torch.nn.Parameter(torch.zeros(3, 4))
    for shape in ((4,), (), (2, 3, 4), (0, 4)):
        odd = torch.nn.Parameter(torch.zeros(shape))
        said = f"{re.escape(str(shape))}: it has to be .R, C. with elements; give others to AdamW"
        with pytest.raises(ValueError, match=f"Muon: parameter 1 is {said}"):
            Muon([matrix, odd])
        with pytest.raises(ValueError, match=f"Muon: bias is {said}"):
            Muon([("w", matrix), ("bias", odd)])
        with pytest.raises(ValueError, match=f"Muon: parameter 0 is {said}"):
            Muon([matrix]).add_param_group({"params": [odd]})


def test_a_closure_is_called_once_with_gradients_and_its_loss_returned() -> None:
    params = weights()
    optimiser, losses = Muon(params.values()), []

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        losses.append(sum(p.square().sum() for p in params.values()))
        losses[-1].backward()
        return losses[-1]

    first, second = optimiser.step(closure), optimiser.step(closure)
    assert [first, second] == losses and second < first
    assert optimiser.step() is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_goes_on_by_itself(copied) -> None:
    params = weights()
    optimiser = muon(params)

    def step(one: Muon, number: int) -> list[torch.Tensor]:
        (group,) = one.param_groups
        for name, p in zip(SHAPES, group["params"], strict=True):
            p.grad = gradient(name, number)
        one.step()
        return [p.detach().clone() for p in group["params"]]

    before = step(optimiser, 0)
    copied_to = copied(optimiser)
    after = step(copied_to, 1)
    assert all(map(torch.equal, before, params.values())), "the original stands still"
    assert all(map(torch.equal, after, step(optimiser, 1)))
    assert all(map(torch.equal, step(copied_to, 2), step(optimiser, 2)))
    states = [one.state_dict()["state"] for one in (optimiser, copied_to)]
    momenta = [[state["momentum_buffer"] for state in of_one.values()] for of_one in states]
    assert all(map(torch.equal, *momenta)) and len(momenta[0]) == len(SHAPES)
