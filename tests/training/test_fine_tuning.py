"""--freeze and --lr-scale: what learns and how fast, frozen BatchNorms on every path, and refusals."""

import copy

import pytest
import torch
from small_runs import SMALL, refusal
from torch import nn

from scalesnn import functional, surrogate
from scalesnn.base import UserError
from scalesnn.memory.policy import Policy, apply_policy
from scalesnn.model.sew_resnet import sew_resnet18
from scalesnn.model.train_imagenet_example import SResNetTrainer
from scalesnn.training.fine_tuning import freeze, rate_factors
from scalesnn.training.optimizers import parameter_groups


def net(**settings):
    torch.manual_seed(2)
    made = sew_resnet18(num_classes=3, surrogate_function=surrogate.ATan(), step_mode="m", **settings)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.0)
    return made


def gradients(model, x):
    functional.reset_net(model)
    model.train()
    loss = model(x).mean(0).square().sum()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("policy", ["none", "layer", pytest.param("block", marks=pytest.mark.long), "time:1"])
@pytest.mark.parametrize(
    "patterns", [["conv1.*", "bn1.*", "layer1.*"], ["*.bn?.*", "bn1.*", "*.downsample.1.*"]]
)
def test_frozen_batchnorms_are_exact_on_every_path(policy, patterns):
    """Against plain torch, where the same BatchNorms are put into evaluation mode by hand."""
    x = functional.repeat_over_time(torch.rand(2, 3, 32, 32), 2)
    model = net()
    plain = copy.deepcopy(model)
    freeze(model, patterns)
    apply_policy(model, Policy.parse(policy))
    functional.set_backend(plain, "torch")
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(dict(model.named_parameters())[name].requires_grad)
    plain.train = lambda mode=True: plain
    frozen = [
        name
        for name, m in model.named_modules()
        if isinstance(m, nn.BatchNorm2d) and not m.weight.requires_grad
    ]
    for name in frozen:
        plain.get_submodule(name).eval()
    loss, found = gradients(model, x)
    expected_loss, expected = gradients(plain, x)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert list(found) == list(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item())
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(dict(model.named_buffers())[name], buffer, rtol=1e-4, atol=1e-5)
    model.eval().train()
    assert [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and not m.training] == frozen


def test_a_batchnorm_of_which_a_part_learns_goes_on_collecting():
    model = net()
    freeze(model, ["bn1.bias", "layer1.0.conv1.*"])
    model.train()
    assert all(module.training for module in model.modules())


def test_a_copy_stays_frozen_by_itself():
    model = net()
    freeze(model, ["bn1.*"])
    twin = copy.deepcopy(model)
    twin.train()
    assert not twin.bn1.training
    assert twin.bn1.train.__self__ is twin.bn1


def test_groups_by_rate_and_decay_and_the_optimizer_s_first():
    model = net()
    freeze(model, ["layer2.*"])
    rates = {n: 0.1 * f for n, f in rate_factors(model, ["layer1.*=0.5", "layer1.0.*=0.1", "fc.*=2"]).items()}
    groups = parameter_groups(model, 1e-4, 0.0, rates)
    names = {p: n for n, p in model.named_parameters()}
    found = [(g.get("lr"), g["weight_decay"], sorted(names[p] for p in g["params"])) for g in groups]
    assert [f[:2] for f in found] == [
        (None, 0.0),
        (None, 1e-4),
        (0.2, 1e-4),
        (0.05, 0.0),
        (0.05, 1e-4),
        (pytest.approx(0.01), 0.0),
        (pytest.approx(0.01), 1e-4),
    ]
    assert found[2][2] == ["fc.bias", "fc.weight"]
    assert found[6][2] == ["layer1.0.conv1.weight", "layer1.0.conv2.weight"]
    every = [name for f in found for name in f[2]]
    assert sorted(every) == sorted(n for n in names.values() if not n.startswith("layer2."))


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("layer1", "the nearest: 'layer1.*'"),
        ("layer9.*", "the nearest: 'layer4.*', "),
        ("fc.wieght", "the nearest: 'fc.weight'"),
        ("backbone.*", "the nearest: "),
    ],
)
def test_a_pattern_that_matches_nothing_names_what_is_near(pattern, near):
    for ask in (lambda: freeze(net(), [pattern]), lambda: rate_factors(net(), [f"{pattern}=0.1"])):
        with pytest.raises(UserError) as caught:
            ask()
        assert f"{pattern}: no parameter has such a name; " in str(caught.value)
        assert near in str(caught.value)


def train(images, folder, *words):
    trainer = SResNetTrainer()
    line = [*SMALL, "--data-path", str(images), "--output-dir", str(folder), *map(str, words)]
    trainer.main(trainer.get_args_parser().parse_args(line))
    return trainer


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--reference", "nowhere"], "--reference nowhere: no such file, and none of the shipped ones: "),
        (["--freeze", "layer7.*"], "--freeze layer7.*: no parameter has such a name; the nearest: 'layer"),
        (["--freeze", "*"], "--freeze * leaves no parameter to train"),
        (["--lr-scale", "fc.*"], "expected PATTERN=FACTOR such as 'layer1.*=0.1', got 'fc.*'"),
        (["--lr-scale", "fc.*=fast"], "expected PATTERN=FACTOR"),
        (["--lr-scale", "fc.*=0"], "must be above 0; what shall not learn takes --freeze"),
        (["--lr-scale", "head.*=0.1"], "--lr-scale head.*: no parameter has such a name; the nearest: "),
        (["--freeze", "fc.*", "--freeze", "bn1.*"], "--freeze is given twice: give all its values after one"),
        (["--freeze=fc.*", "--freeze=bn1.*"], "--freeze is given twice"),
    ],
)
def test_refusals_are_one_line(images, tmp_path, capsys, words, said):
    assert said in refusal(capsys, train, images, tmp_path, *words)


def test_a_run_says_what_learns_and_a_recipe_may_set_it(images, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("freeze: ['conv1.*', 'bn1.*', 'layer[12].*']\nlr_scale: ['layer?.*=0.1']\nlr: 0.02\n")
    words = ["--config", recipe, "--run-name", "a", "--lr-warmup-epochs", 0, "--spike-metrics-every", 1]
    first = train(images, tmp_path, *words, "--max-steps", "1", "--reference", "sew_resnet34")
    said = capsys.readouterr().out
    assert "for this run's 4 the linear rule gives --lr 0.0015625, and not 0.02" in said
    assert "frozen     30 of 62 parameters, " in said
    assert "10 BatchNorms keep their running statistics" in said
    assert "rates      0.02 for 2 parameters, 0.002 for 30 parameters" in said
    before = {k: v.clone() for k, v in first.run.strategy.module.state_dict().items()}
    second = train(images, tmp_path, "--resume", tmp_path / "a", "--max-steps", "2")
    rates = [group["lr"] for group in second.run.strategy.optimizer.param_groups]
    assert rates[1] == pytest.approx(0.1 * rates[0])
    after = second.run.strategy.module.state_dict()
    kept = [k for k in after if torch.equal(before[k], after[k])]
    frozen = ("conv1.", "bn1.", "layer1.", "layer2.")
    assert [k for k in kept if not k.startswith(frozen)] == []
    assert [k for k in after if k.startswith(frozen) and k not in kept] == []
    with pytest.raises(SystemExit, match="2"):
        train(images, tmp_path, "--resume", tmp_path / "a", "--freeze", "bn1.*", "--max-steps", "3")
    assert "start anew from its weights with --init-from" in capsys.readouterr().err
