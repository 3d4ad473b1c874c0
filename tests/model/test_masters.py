"""Packed weights that are older than their masters are an error; ordinary training has none."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch

from pgolf.config import OptimConfig
from pgolf.errors import StaleWeights
from pgolf.model import GPT
from pgolf.model.frozen import frozen_copy
from pgolf.optim.exchange import Exchange
from pgolf.optim.groups import Optimizers, fuses
from pgolf.ranks import ALONE

from ..optim.test_exchange import forms
from .published import PUBLISHED, small
from .test_forms import batch, fused, with_qat
from .test_gpt_spec import randomised

OUT = "blocks.1.attn.proj.weight"


def made(form: str = "plain") -> tuple[GPT, torch.Tensor]:
    """A model with late QAT prepared, and its switch."""
    model = randomised(small(PUBLISHED["pr1473"], layers=2, ve_layers="0"), torch.float32)
    model = model if form == "plain" else fused(model, form)
    return model, with_qat(model, model.ops["fake_quant"], True)


def loss(model: GPT) -> torch.Tensor:
    return model(*batch(model.config))


def in_place(model: GPT) -> None:
    with torch.no_grad():
        model.get_parameter(OUT).add_(1.0)


def loaded(model: GPT) -> None:
    model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()})


def stepped(model: GPT) -> None:
    p = model.get_parameter(OUT)
    p.grad = torch.ones_like(p)
    torch.optim.SGD([p], 0.1).step()
    p.grad = None


@forms
@pytest.mark.parametrize("change", [in_place, loaded, stepped])
def test_a_change_after_publishing_is_an_error(form, change: Callable) -> None:
    model, _ = made(form)
    exchange = Exchange(model, ALONE)
    loss(model)
    change(model)
    for _ in range(2):
        with pytest.raises(StaleWeights, match=r"blocks\.\d.*\.weight was changed.*publish"):
            loss(model)
    exchange.publish()
    loss(model)


@forms
@pytest.mark.parametrize("name", [OUT, "blocks.1.mlp_scale"])
def test_another_tensor_in_a_place_is_an_error_until_all_is_made_anew(form, name) -> None:
    """The optimisers and the exchange have the parameter that was: publishing is no remedy."""
    model, _ = made(form)
    exchange = Exchange(model, ALONE)
    other = {name: 3 * model.get_parameter(name).detach()}
    model.load_state_dict(other, assign=True, strict=False)
    for _ in range(2):
        with pytest.raises(StaleWeights, match=f"^{name} was replaced by .*: make a new Exchange"):
            loss(model)
        exchange.publish()
    fresh, _ = made(form)
    fresh.load_state_dict(other, strict=False)
    Exchange(model, ALONE)
    torch.testing.assert_close(loss(model), loss(fresh), rtol=0, atol=0)


def test_the_message_names_what_changed() -> None:
    model, switch = made("cpu")
    exchange = Exchange(model, ALONE)
    in_place(model)
    with pytest.raises(StaleWeights, match=f"^{OUT} was changed"):
        loss(model)
    exchange.publish()
    with torch.no_grad():
        model.blocks[1].mlp_scale.mul_(2.0)  # is folded into rows
    with pytest.raises(StaleWeights, match=r"^blocks\.1\.mlp_scale was changed"):
        loss(model)
    exchange.publish()
    switch.fill_(1.0)
    with pytest.raises(StaleWeights, match=r"qat_on was changed"):
        loss(model)


@forms
def test_what_passes_read_themselves_may_change(form) -> None:
    """Tables and vectors are not packed; without a pack every pass reads the matrices."""
    model, _ = made(form)
    in_place(model)
    loss(model)
    Exchange(model, ALONE)
    with torch.no_grad():
        model.tok_emb.weight.mul_(0.5)
        model.blocks[0].resid_mix.mul_(0.5)
    loss(model)


@forms
def test_ordinary_training_is_no_change(form) -> None:
    """Steps, an evaluation, averaged weights put in, the switch of late QAT, a restored state."""
    model, switch = made(form)
    exchange = Exchange(model, ALONE)
    averages = {n: p.detach().clone() for n, p in model.named_parameters()}
    taken = averages if fuses(model.ops) else None
    optimizers = Optimizers(model, OptimConfig(ns_dtype="fp32"), model.ops, taken)
    for step in range(4):
        if step == 2:
            switch.fill_(1.0)
            exchange.publish()
        loss(model).backward()
        optimizers.step(*exchange.reduce(), 1.0, 0.9, 0.5)
        exchange.publish()
        with torch.no_grad():
            loss(model)
        with torch.inference_mode():
            loss(model)
    model.load_state_dict(averages, strict=False)
    exchange.publish()
    loss(model)


def pickled(model: GPT) -> GPT:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_copy_has_weights_of_its_own(copied: Callable, frozen) -> None:
    model, _ = made()
    Exchange(model, ALONE)
    model = frozen_copy(model) if frozen else model
    twin = copied(model)
    before = loss(twin)
    in_place(model)
    assert torch.equal(loss(twin), before)
    in_place(twin)
    with pytest.raises(StaleWeights, match=f"^{OUT} was changed"):
        loss(twin)


def test_tensors_that_count_no_changes_are_taken() -> None:
    model, _ = made()
    with torch.inference_mode():
        assert loss(frozen_copy(model)).isfinite()


def test_a_frozen_copy_that_is_loaded_anew_is_an_error() -> None:
    model, _ = made()
    frozen = frozen_copy(model)
    loss(frozen)
    loaded(frozen)
    with pytest.raises(StaleWeights, match="make the frozen copy anew"):
        loss(frozen)


def test_a_compiled_pass_has_no_guard_on_versions() -> None:
    """Its caller asks: it is not compiled anew after a change, nor after publishing."""
    torch._dynamo.reset()
    model, _ = made()
    exchange = Exchange(model, ALONE)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    before = compiled(*batch(model.config))
    with torch._dynamo.config.patch(error_on_recompile=True):
        in_place(model)
        torch.testing.assert_close(compiled(*batch(model.config)), before, rtol=0, atol=0)
        with pytest.raises(StaleWeights):
            model.check_published()
        exchange.publish()
        assert compiled(*batch(model.config)) != before
        model.check_published()
