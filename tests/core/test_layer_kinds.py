"""The step-mode layers of one, two and three dimensions against SpikingJelly's, in both step modes."""

import copy

import pytest
import torch
from spikingjelly.activation_based import layer as peer
from torch import nn

from scalesnn import functional, layer, neuron, surrogate
from scalesnn.base import UserError

SAMPLES = {0: (4,), 1: (4, 9), 2: (4, 7, 6), 3: (4, 5, 6, 7)}
KINDS = {
    **{
        f"Conv{d}d": (d, lambda m, d=d: getattr(m, f"Conv{d}d")(4, 6, 3, stride=2, padding=1))
        for d in (1, 2, 3)
    },
    **{
        f"ConvTranspose{d}d": (
            d,
            lambda m, d=d: getattr(m, f"ConvTranspose{d}d")(4, 6, 3, stride=2, padding=1),
        )
        for d in (1, 2, 3)
    },
    **{f"BatchNorm{d}d": (d, lambda m, d=d: getattr(m, f"BatchNorm{d}d")(4)) for d in (1, 2, 3)},
    "BatchNorm1d of features": (0, lambda m: m.BatchNorm1d(4, momentum=None)),
    **{
        f"MaxPool{d}d": (d, lambda m, d=d: getattr(m, f"MaxPool{d}d")(3, stride=2, padding=1))
        for d in (1, 2, 3)
    },
    **{f"AvgPool{d}d": (d, lambda m, d=d: getattr(m, f"AvgPool{d}d")(2)) for d in (1, 2, 3)},
    **{f"AdaptiveAvgPool{d}d": (d, lambda m, d=d: getattr(m, f"AdaptiveAvgPool{d}d")(2)) for d in (1, 2, 3)},
    **{f"Upsample of {d}d": (d, lambda m: m.Upsample(scale_factor=2)) for d in (1, 2, 3)},
    "Upsample, bilinear": (2, lambda m: m.Upsample(scale_factor=2, mode="bilinear", align_corners=True)),
}


def pair(make, step_mode: str) -> tuple[nn.Module, nn.Module]:
    ours, theirs = make(layer).double(), make(peer).double()
    theirs.load_state_dict(ours.state_dict())
    ours.step_mode = theirs.step_mode = step_mode
    return ours, theirs


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_peers(kind, step_mode, training):
    space, make = KINDS[kind]
    ours, theirs = (module.train(training) for module in pair(make, step_mode))
    shape = (3, 2, *SAMPLES[space]) if step_mode == "m" else (3, *SAMPLES[space])
    for seed in range(2):
        x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = ours(a), theirs(b)
        torch.testing.assert_close(y, expected)
        weights = torch.randn_like(expected)
        found = torch.autograd.grad((y * weights).sum(), [a, *ours.parameters()])
        torch.testing.assert_close(
            found, torch.autograd.grad((expected * weights).sum(), [b, *theirs.parameters()])
        )
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("kind", [kind for kind, (space, _) in KINDS.items() if "Upsample" not in kind])
def test_a_repeated_sample_gives_what_its_copies_give(kind):
    space, make = KINDS[kind]
    repeated = pair(make, "m")[0]
    copied = copy.deepcopy(repeated)
    x = torch.randn(2, *SAMPLES[space], dtype=torch.float64)
    y = repeated(functional.repeat_over_time(x, 3))
    torch.testing.assert_close(y, copied(torch.stack([x] * 3)))
    torch.testing.assert_close(repeated.state_dict(), copied.state_dict())


@pytest.mark.parametrize("space", [0, 1, 3])
@pytest.mark.parametrize("with_residual", [False, True])
def test_the_unit_of_other_dimensions_is_norm_plus_residual_then_neuron(space, with_residual):
    unit = nn.ModuleList(
        [
            {0: layer.BatchNorm1d, 1: layer.BatchNorm1d, 3: layer.BatchNorm3d}[space](4),
            neuron.LIFNode(surrogate_function=surrogate.ATan(), v_threshold=0.3),
        ]
    ).double()
    functional.set_step_mode(unit, "m")
    plain = copy.deepcopy(unit)
    plain[0].backend = plain[1].backend = "torch"
    x, residual = torch.randn(2, 3, 5, *SAMPLES[space], dtype=torch.float64)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = unit[0](a, neuron=unit[1], residual=residual if with_residual else None)
    expected = plain[1](plain[0](b) + residual if with_residual else plain[0](b))
    assert 0 < y.mean() < 1
    torch.testing.assert_close(y, expected)
    weights = torch.randn_like(y)
    found = torch.autograd.grad((y * weights).sum(), [a, *unit.parameters()])
    torch.testing.assert_close(
        found, torch.autograd.grad((expected * weights).sum(), [b, *plain.parameters()])
    )
    torch.testing.assert_close(unit[0].state_dict(), plain[0].state_dict())


@pytest.mark.parametrize(
    ("module", "shape", "message"),
    [
        (layer.Conv1d(3, 4, 3), (2, 1, 3, 8), r"expects \[N, C, L\], got .*set_step_mode\(model, 'm'\)"),
        (layer.Conv1d(3, 4, 3, step_mode="m"), (1, 3, 8), r"expects \[T, N, C, L\], got .*\(model, 's'\)"),
        (layer.AvgPool3d(2), (2, 1, 3, 8, 8, 8), r"expects \[N, C, D, H, W\], got .*\(model, 'm'\)"),
        (layer.BatchNorm1d(3, step_mode="m"), (2, 3), r"expects \[T, N, C\] or \[T, N, C, L\], got"),
    ],
)
def test_an_input_of_other_dimensions_is_refused_with_the_cure(module, shape, message):
    with pytest.raises(UserError, match=message):
        module(torch.zeros(shape))


@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_dropout2d_drops_whole_channels_alike_at_every_step(step_mode):
    x = torch.ones(4, 2, 20, 3, 3)
    results = []
    for module in (layer, peer):
        torch.manual_seed(3)
        dropout = module.Dropout2d(0.4, step_mode=step_mode)
        results.append(dropout(x) if step_mode == "m" else torch.stack([dropout(x_t) for x_t in x]))
    assert torch.equal(*results)
    first = results[0][0, :, :, 0, 0]
    assert torch.equal(results[0], first[None, :, :, None, None].expand_as(x))
    torch.testing.assert_close(first.unique(), torch.tensor([0.0, 1 / 0.6]))


def test_identity_is_one_in_any_net_of_either_step_mode():
    net = nn.Sequential(layer.Conv1d(2, 3, 1), layer.Identity(), neuron.IFNode())
    functional.set_step_mode(net, "m")
    assert net(torch.randn(2, 1, 2, 5)).shape == (2, 1, 3, 5)
    assert "step_mode=m" in repr(net[1])
