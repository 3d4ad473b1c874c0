"""What goes round between ranks: the same step for any number of them, and no factor forgotten."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from pgolf.config import OptimConfig
from pgolf.errors import TrainingError
from pgolf.model import GPT
from pgolf.model.matrices import Matrix, cast_all
from pgolf.ops.operator import OPERATORS
from pgolf.optim.exchange import Exchange
from pgolf.optim.groups import Optimizers
from pgolf.ranks import ALONE, Ranks

from ..model.published import PUBLISHED, small
from ..model.test_forms import batch, fused, with_qat
from ..model.test_gpt_spec import TIME, randomised
from .rank_threads import on_ranks

CONFIG = OptimConfig(ns_dtype="fp32", grad_clip=1.0)
needs_cpp = pytest.mark.skipif(
    bool(OPERATORS["weight_cast"].implementations["cpu"].missing()), reason="no C++ kernels"
)
forms = pytest.mark.parametrize("form", ["plain", pytest.param("cpu", marks=needs_cpp)])


def of(recipe: str, form: str, dtype: torch.dtype = torch.float32) -> GPT:
    model = randomised(small(PUBLISHED[recipe]), dtype)
    return model if form == "plain" else fused(model, form)


def backward(model: GPT, factor: float = 1.0) -> None:
    (factor * model(*batch(model.config))).backward()


@forms
@pytest.mark.parametrize("clip_mask", [None, False, True])
@pytest.mark.parametrize("recipe", PUBLISHED)
def test_gradients_are_those_through_factors_grid_and_cast(recipe, form, clip_mask) -> None:
    """In float64, with late QAT and without, against autograd through the model's own casts."""
    model = of(recipe, form, torch.float64)
    if clip_mask is not None:
        with_qat(model, model.ops["fake_quant"], clip_mask).fill_(1.0)
    backward(model)
    wanted = {p: p.grad.clone() for p in model.parameters()}
    model.zero_grad(set_to_none=True)
    exchange = Exchange(model, ALONE)
    backward(model)
    assert all(m.weight.grad is None for m in model.blocks[0].matrices()), "read as published"
    grads, norm = exchange.reduce()
    assert set(grads) == set(wanted) and not any(p.grad is not None for p in model.parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[p], wanted[p], rtol=1e-9, atol=1e-12, msg=name)
    exact = torch.stack([g.square().sum() for g in wanted.values()]).sum().sqrt()
    torch.testing.assert_close(norm.double(), exact, rtol=1e-6, atol=0)


def train(ranks: Ranks, model: GPT, steps: int, parts: int = 12) -> dict[str, torch.Tensor]:
    """Weights after steps in which every rank sees batches of its own, and what all read last.

    Together ranks see `parts` of them a step.
    """
    model = copy.deepcopy(model)
    exchange = Exchange(model, ranks)
    optimizers = Optimizers(model, CONFIG, model.ops, held=exchange.held)
    for step in range(steps):
        for part in range(parts)[ranks.part(parts)]:
            g = torch.Generator().manual_seed(99 * step + part)
            ids = torch.randint(model.config.vocab_size, (2, TIME + 1), generator=g)
            (model(ids[:, :-1], ids[:, 1:]) / parts).backward()
            exchange.collect()
        optimizers.step(*exchange.reduce(), 0.3, 0.9)
        exchange.publish()
    exchange.gather_weights()
    momenta = exchange.gather(optimizers.state_dict()["momentum"])
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    published = {"published": exchange.published.clone()}
    return weights | {f"momentum of {n}": t.clone() for n, t in momenta.items()} | published


@forms
@pytest.mark.parametrize(
    ("recipe", "world"), [("pr1473", 2), ("pr1473", 3), ("pr531", 4), ("pr478", 12)]
)
def test_any_number_of_ranks_takes_the_same_steps(recipe, form, world) -> None:
    """Twelve have more ranks than some kinds of matrices; all hold bit-equal weights.

    The second step is the one that has momenta and reads what the first published.
    """
    model = of(recipe, form)
    parts = 12 if world == 12 else 2 * world  # twelve ranks have one each, fewer add two up
    alone = train(ALONE, model, 2, parts)
    first, *others = on_ranks(world, lambda ranks: train(ranks, model, 2, parts))
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)
    for name, tensor in alone.items():
        if name != "published":  # whose order the number of ranks decides
            atol = 2e-5 * tensor.abs().max().item() + 1e-7
            torch.testing.assert_close(first[name], tensor, rtol=1e-4, atol=atol, msg=name)


@pytest.mark.parametrize("limit", [0.05, 1e3])
def test_ranks_clip_their_own_gradients(limit) -> None:
    """As the published form of PR 1473: by torch's function, before the mean over ranks."""
    model = of("pr1473", "plain", torch.float64)
    vocabulary = model.config.vocab_size
    batches = [[(ids + rank) % vocabulary for ids in batch(model.config)] for rank in range(3)]

    def own(ranks: Ranks) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        copied = copy.deepcopy(model)
        exchange = Exchange(copied, ranks, limit=limit)
        (copied(*batches[ranks.rank]) / ranks.world).backward()
        grads, norm = exchange.reduce()
        names = {p: n for n, p in copied.named_parameters()}
        return {names[p]: g.clone() for p, g in grads.items()}, norm

    plain = copy.deepcopy(model)
    wanted = {n: torch.zeros_like(p) for n, p in plain.named_parameters()}
    norms = []
    for ids in batches:
        plain.zero_grad()
        plain(*ids).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(plain.parameters(), limit).item())
        for name, p in plain.named_parameters():
            wanted[name] += p.grad / 3
    assert len({*norms}) == 3 and all((n > limit) == (limit < 1) for n in norms)
    whole = torch.stack([g.square().sum() for g in wanted.values()]).sum().sqrt()
    for grads, norm in on_ranks(3, own):
        torch.testing.assert_close(norm.double(), whole, rtol=1e-6, atol=0)
        for name, g in grads.items():
            torch.testing.assert_close(g.double(), wanted[name], rtol=1e-5, atol=1e-9, msg=name)


@forms
@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_a_gradient_of_one_rank_that_is_not_finite_is_everyones(limit, form) -> None:
    """Clipping does not hide it: the step that follows changes nothing. Its own norm says whose."""
    model = of("pr1473", form)

    def run(ranks: Ranks) -> list[bool]:
        copied = copy.deepcopy(model)
        exchange = Exchange(copied, ranks, limit=limit)
        backward(copied, math.inf if ranks.rank else 1.0)
        norm = exchange.reduce()[1]
        return [bool(t.isfinite()) for t in (norm, exchange.own_norm)]

    assert on_ranks(2, run) == [[False, True], [False, False]]


def test_a_rank_alone_has_no_norm_of_its_own() -> None:
    model = of("pr1473", "plain")
    exchange = Exchange(model, ALONE)
    backward(model, 1.0)
    assert exchange.reduce()[1] > 0 and exchange.own_norm == 0


@forms
@pytest.mark.parametrize("side", ["muon", "adamw"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_checkpoint_has_the_state_of_every_parameter(world, side, form) -> None:
    """Whoever owns it: a run that goes on from rank 0's is as one that never stopped."""
    plain, config = of("pr1473", form), replace(CONFIG, side_proj_optimizer=side)

    def step(model: GPT, exchange: Exchange, optimizers: Optimizers, number: int) -> None:
        g = torch.Generator().manual_seed(100 * number + exchange.ranks.rank)
        ids = torch.randint(model.config.vocab_size, (2, TIME + 1), generator=g)
        model(ids[:, :-1], ids[:, 1:]).backward()
        exchange.collect()
        optimizers.step(*exchange.reduce(), 0.3, 0.9)
        exchange.publish()

    def begun(ranks: Ranks, weights: dict[str, torch.Tensor]) -> tuple:
        model = copy.deepcopy(plain)
        model.load_state_dict(weights)
        exchange = Exchange(model, ranks)
        return model, exchange, Optimizers(model, config, model.ops, held=exchange.held)

    def until_the_checkpoint(ranks: Ranks) -> tuple:
        model, exchange, optimizers = run = begun(ranks, plain.state_dict())
        for number in range(2):  # the second changes momenta that are not zero
            step(*run, number)
        exchange.gather_weights()
        saved = copy.deepcopy((model.state_dict(), optimizers.state_dict(exchange.gather)))
        step(*run, 2)
        exchange.gather_weights()
        return saved, model.state_dict()

    results = on_ranks(world, until_the_checkpoint)
    (weights, state), _ = results[0]

    def from_it(ranks: Ranks) -> dict[str, torch.Tensor]:
        model, exchange, optimizers = run = begun(ranks, weights)
        optimizers.load_state_dict(state)
        step(*run, 2)
        exchange.gather_weights()
        return model.state_dict()

    for (_, straight), resumed in zip(results, on_ranks(world, from_it), strict=True):
        for name, weight in straight.items():
            assert torch.equal(resumed[name], weight), name
    assert not state["momentum"].keys() & state["exp_avg"].keys()
    name = "bigram.proj.weight"
    kind = "momentum" if side == "muon" else "exp_avg"
    del state[kind][name]
    with pytest.raises(TrainingError, match=f"lacks .* of 1 parameters, {name} among them"):
        Optimizers(plain, config).load_state_dict(state)


@pytest.mark.parametrize(("world", "qat"), [(3, False), (4, True)])
def test_twenty_steps_stay_together(world, qat) -> None:
    """What summing up in another order costs; from the tenth step on weights are on their grid."""
    plain = of("pr1473", "plain")

    def run(ranks: Ranks) -> tuple[float, dict[str, torch.Tensor], torch.Tensor]:
        model = copy.deepcopy(plain)
        switch = with_qat(model, "reference", False)
        exchange = Exchange(model, ranks)
        optimizers = Optimizers(model, CONFIG, model.ops, held=exchange.held)
        for step in range(20):
            total = torch.zeros(())
            for part in range(world)[ranks.part(world)]:  # one a rank: sums of more are above
                g = torch.Generator().manual_seed(99 * step + part)
                ids = torch.randint(model.config.vocab_size, (2, TIME + 1), generator=g)
                loss = model(ids[:, :-1], ids[:, 1:]) / world
                loss.backward()
                exchange.collect()
                total += loss.detach()
            ranks.all_reduce(total)
            optimizers.step(*exchange.reduce(), 0.05, 0.9)
            switch.fill_(float(qat and step >= 9))
            exchange.publish()
        exchange.gather_weights()
        codes = torch.cat([cast_all([m], torch.float32)[0].flatten() for m in matrices(model)])
        return total.item(), {n: p.detach() for n, p in model.named_parameters()}, codes

    (loss, weights, codes), *others = run(ALONE), *on_ranks(world, run)
    for other_loss, other_weights, other_codes in others:
        assert other_loss == pytest.approx(loss, rel=1e-3 if qat else 1e-6)
        for name, weight in weights.items():
            error = (other_weights[name] - weight).norm() / weight.norm()
            assert error < (1e-3 if qat else 1e-5), name
        # Steps, too, differ by rounding, so that equal codes are nearly equal.
        differ = ~torch.isclose(other_codes, codes, rtol=1e-3, atol=1e-6)
        assert not qat or differ.sum() <= max(1, codes.numel() / 10_000)


def matrices(model: GPT) -> list[Matrix]:
    return [m for block in model.blocks for m in block.matrices()]


@needs_cpp
def test_who_owns_nothing_takes_part() -> None:
    config = small(PUBLISHED["pr1473"], layers=1, ve_layers="0", xsa_layers="all")
    model = fused(randomised(config, torch.float32), "cpu")
    owned = on_ranks(8, lambda ranks: len(Exchange(copy.deepcopy(model), ranks).own))
    assert sorted(owned) == [0, 0, 1, 1, 1, 1, 1, 3]
    results = on_ranks(8, lambda ranks: train(ranks, model, 1))
    alone = train(ALONE, model, 1)
    for name, _ in model.named_parameters():
        torch.testing.assert_close(results[-1][name], alone[name], rtol=1e-4, atol=1e-5)


def test_gradients_of_many_passes_add_up_in_fp32() -> None:
    """In bf16 a hundredth of the sum would be lost in every pass after the first."""
    model = randomised(small(PUBLISHED["pr1473"]), torch.float32)
    model.compute_dtype = torch.bfloat16
    exchange = Exchange(model, ALONE, passes=400)
    assert exchange.gradients.dtype is torch.bfloat16
    for number in range(400):
        for leaf in exchange.leaves.values():
            leaf.grad = torch.full_like(leaf, 1.0 if number == 0 else 2.0**-9)
        exchange.collect()
    for p in exchange.small:
        p.grad = torch.zeros_like(p)
    grads, _ = exchange.reduce()
    for m in exchange.own:
        assert (grads[m.weight].float() - (1 + 399 * 2.0**-9)).abs().max() < 2.0**-7


def test_a_step_without_a_pass_is_refused() -> None:
    exchange = Exchange(randomised(small(PUBLISHED["pr1473"]), torch.float32), ALONE)
    with pytest.raises(ValueError, match="weights have no gradient: run a backward pass first"):
        exchange.reduce()
    model = randomised(small(PUBLISHED["pr1473"]), torch.float32)
    model.compute_dtype = torch.bfloat16
    with pytest.raises(ValueError, match="no gradients were collected: run a backward pass"):
        Exchange(model, ALONE, passes=2).reduce()


def test_momenta_are_gathered_before_any_rank_has_them() -> None:
    """Also by ranks that never have any: all come to the same collectives."""
    model = randomised(small(PUBLISHED["pr1473"]), torch.float32)
    names = [n for n, _ in model.named_parameters() if ".c_" in n or n.endswith("proj.weight")]

    def gathered(ranks: Ranks) -> dict[str, torch.Tensor]:
        return Exchange(copy.deepcopy(model), ranks).gather({})

    for state in on_ranks(12, gathered):
        assert all(not state[n].any() for n in names if n.startswith("blocks"))


@pytest.mark.parametrize("ops", [{}, {"param_update": "cpu"}])
def test_weights_are_published_in_the_dtype_of_activations(ops: dict[str, str]) -> None:
    """And for torch's optimisers gradients come back in that of the weights."""
    model = randomised(small(PUBLISHED["pr1473"]), torch.float32)
    model.compute_dtype = torch.bfloat16
    exchange = Exchange(model, ALONE, ops=ops)
    for block in model.blocks:
        *qkv, out, up, down = (m.weight.bfloat16() for m in block.matrices())
        for actual, wanted in zip(block.published, [torch.cat(qkv), out, up, down], strict=False):
            assert torch.equal(actual, wanted)
    for side in (model.bigram.proj, model.ve_shared.proj):
        assert torch.equal(side.published, side.weight.bfloat16())
    for leaf in exchange.leaves.values():
        leaf.grad = torch.ones_like(leaf)
    for p in exchange.small:
        p.grad = torch.zeros_like(p)
    grads, _ = exchange.reduce()
    dtypes = {grads[m.weight].dtype for m in exchange.own}
    assert dtypes == {torch.bfloat16 if ops else torch.float32}


@needs_cpp
@pytest.mark.parametrize("qat", [False, True])
def test_a_rank_alone_copies_no_matrix(qat: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are cast to where they are read, and gradients taken from where they are."""
    model = of("pr1473", "cpu")
    model.compute_dtype = torch.bfloat16
    if qat:
        with_qat(model, "cpu", clip_mask=True).fill_(1.0)
    monkeypatch.delattr(Exchange, "_fill")
    exchange = Exchange(model, ALONE, ops=model.ops)
    g = torch.Generator().manual_seed(1)
    for leaf in exchange.leaves.values():
        leaf.grad = torch.randn(leaf.shape, generator=g).bfloat16()
    model.tok_emb.weight.grad = torch.zeros_like(model.tok_emb.weight)
    wanted = {}
    for block in model.blocks:
        outs = block.weights(torch.bfloat16)[:4]
        assert all(map(torch.equal, outs, block.published[:4]))
        parameters = [*(m.weight for m in block.matrices()), block.attn_scale, block.mlp_scale]
        upstream = [w.grad for w in block.published[:4]]
        found = torch.autograd.grad(outs, parameters, upstream)
        wanted |= dict(zip(parameters, found, strict=True))
    grads, _ = exchange.reduce()
    for parameter, gradient in wanted.items():
        assert torch.equal(grads[parameter].float(), gradient.float())
    assert all(leaf.grad is None for leaf in exchange.leaves.values())
