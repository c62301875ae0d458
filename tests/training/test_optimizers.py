"""Schedules and optimizers against torchvision's reference recipe, and weight decay by kind of layer."""

import argparse

import pytest
import torch
import torchvision
from torch import nn

from scalesnn.base import UserError
from scalesnn.training.optimizers import make_optimizer, make_scheduler, parameter_groups


def settings(**given):
    known = {
        "opt": "sgd",
        "lr": 0.1,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "epochs": 12,
        "lr_scheduler": "cosa",
        "lr_warmup_epochs": 3,
        "lr_warmup_method": "linear",
        "lr_warmup_decay": 0.01,
        "lr_step_size": 4,
        "lr_gamma": 0.5,
    }
    return argparse.Namespace(**{**known, **given})


def rates(**given):
    args = settings(**given)
    optimizer = make_optimizer(args, [nn.Parameter(torch.zeros(1))])
    scheduler = make_scheduler(args, optimizer)
    seen = []
    for _ in range(args.epochs):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_cosine_after_linear_warmup():
    seen = rates()
    assert seen[0] == pytest.approx(0.001)
    assert seen[1] == pytest.approx(0.1 * (0.01 + 0.99 / 3))
    for epoch in range(3, 12):
        assert seen[epoch] == pytest.approx(
            0.05 * (1 + torch.cos(torch.tensor((epoch - 3) * torch.pi / 9))).item(), abs=1e-6
        )


def test_step_and_exp_without_warmup():
    assert rates(lr_scheduler="step", lr_warmup_epochs=0)[::4] == pytest.approx([0.1, 0.05, 0.025])
    assert rates(lr_scheduler="exp", lr_warmup_epochs=0)[:3] == pytest.approx([0.1, 0.05, 0.025])


def test_constant_warmup():
    assert rates(lr_warmup_method="constant")[:4] == pytest.approx([0.001, 0.001, 0.001, 0.1])


@pytest.mark.parametrize(("lr_warmup_epochs", "epochs"), [(5, 3), (3, 3), (5, 1)])
def test_more_warmup_than_epochs_still_gives_a_finite_rate(lr_warmup_epochs, epochs):
    seen = rates(lr_warmup_epochs=lr_warmup_epochs, epochs=epochs)
    assert all(0 < rate <= 0.1 for rate in seen)


def test_optimizers_have_the_recipe_s_constants():
    weight = [nn.Parameter(torch.zeros(1))]
    assert make_optimizer(settings(opt="sgd_nesterov"), weight).defaults["nesterov"]
    assert not make_optimizer(settings(), weight).defaults["nesterov"]
    rmsprop = make_optimizer(settings(opt="rmsprop"), weight).defaults
    assert (rmsprop["eps"], rmsprop["alpha"], rmsprop["momentum"]) == (0.0316, 0.9, 0.9)
    assert isinstance(make_optimizer(settings(opt="adamw"), weight), torch.optim.AdamW)
    with pytest.raises(UserError, match="known: sgd"):
        make_optimizer(settings(opt="sgdx"), weight)


def test_normalisation_layers_take_their_own_decay():
    model = torchvision.models.resnet18()
    normal, other = parameter_groups(model, 1e-4, 0.0)
    expected, rest = torchvision.ops._utils.split_normalization_params(model)
    assert {id(p) for p in normal["params"]} == {id(p) for p in expected}
    assert {id(p) for p in other["params"]} == {id(p) for p in rest}
    assert (normal["weight_decay"], other["weight_decay"]) == (0.0, 1e-4)


def test_one_group_without_a_decay_for_normalisation():
    (group,) = parameter_groups(torchvision.models.resnet18(), 1e-4, None)
    assert len(group["params"]) == 62
