"""Convolutions of spikes that are looked up, against torch's products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scalesnn import layer
from scalesnn.kernels import cpu, packing, spike_conv, spike_layers, spikes

LAST = torch.channels_last


@pytest.fixture(autouse=True)
def _needs_a_compiler() -> None:
    if not cpu.available():
        pytest.fail("the kernels' tests need a C++ compiler")


def images(*shape: int, dtype: torch.dtype = torch.float64, rate: float = 0.3) -> tuple[Tensor, Tensor]:
    """Spikes [N, C, H, W] in channels_last, and their bits."""
    x = (torch.rand(shape) < rate).to(dtype).contiguous(memory_format=LAST)
    return x, packing.pack(x, 1)


def both(x: Tensor, bits: Tensor, weight: Tensor, bias: Tensor | None, geometry: Any) -> list[list[Tensor]]:
    """Output and gradients: looked up, and torch's."""
    found = []
    grad = None
    for looked_up in (True, False):
        inputs = [t.detach().clone().requires_grad_() for t in (x, weight, bias) if t is not None]
        of_bias = inputs[2] if bias is not None else None
        if looked_up:
            y = spike_layers.spike_conv2d(inputs[0], bits, 1, inputs[1], of_bias, *geometry, 1)
        else:
            y = torch.conv2d(inputs[0], inputs[1], of_bias, *geometry)
        if grad is None:
            grad = torch.randn(y.shape, dtype=y.dtype)
        found.append([y.detach(), *torch.autograd.grad((y * grad).sum(), inputs)])
    return found


pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 11)),
    channels=st.sampled_from([(32, 32), (64, 32), (32, 96), (96, 64)]),
    kernel=pairs,
    stride=pairs,
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.sampled_from([(1, 1), (2, 1), (1, 2)]),
    with_bias=st.booleans(),
    last=st.booleans(),
    seed=st.integers(0, 99),
)
def test_output_and_gradients_are_those_of_products(
    size: tuple[int, int, int],
    channels: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    with_bias: bool,
    last: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    n, h, w = size
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    if h + 2 * padding[0] < reach[0] or w + 2 * padding[1] < reach[1]:
        return
    x, bits = images(n, channels[0], h, w)
    weight = torch.randn(channels[1], channels[0], *kernel, dtype=torch.float64)
    weight = weight.contiguous(memory_format=LAST) if last else weight
    bias = torch.randn(channels[1], dtype=torch.float64) if with_bias else None
    geometry = (list(stride), list(padding), list(dilation))
    assert spike_conv.suits(x, 1, weight, 1)
    found, expected = both(x, bits, weight, bias, geometry)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    assert found[0].is_contiguous(memory_format=LAST)
    assert found[2].stride() == weight.stride(), "autograd takes the gradient without a copy"


@pytest.mark.parametrize("width", [40, 1100])  # several tiles of rows; a row longer than a tile
def test_many_positions_go_in_tiles_and_slabs(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spike_conv, "TURNED", 1)  # 32 positions at a time
    x, bits = images(2, 32, 31, width)
    weight = torch.randn(32, 32, 3, 3, dtype=torch.float64)
    found, expected = both(x, bits, weight, None, ([1, 1], [1, 1], [1, 1]))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_float32_is_as_near_to_float64_as_products_are() -> None:
    x, bits = images(8, 64, 16, 16)
    weight = torch.randn(64, 64, 3, 3, dtype=torch.float64)
    geometry = ([1, 1], [1, 1], [1, 1])
    exact = both(x, bits, weight, None, geometry)[1]
    torch.manual_seed(1)
    grad = torch.randn(exact[0].shape, dtype=torch.float64)

    def errors(dtype: torch.dtype, looked_up: bool) -> list[float]:
        a, w = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        if looked_up:
            y = spike_layers.spike_conv2d(a, bits, 1, w, None, *geometry, 1)
        else:
            y = torch.conv2d(a, w, None, *geometry)
        of_w = torch.autograd.grad((y * grad.to(dtype)).sum(), w)[0]
        pairs = ((y.detach(), exact[0]), (of_w, reference))
        return [float((one.double() - other).abs().max()) for one, other in pairs]

    a, w = x.clone(), weight.clone().requires_grad_()
    reference = torch.autograd.grad((torch.conv2d(a, w, None, *geometry) * grad).sum(), w)[0]
    looked_up, products = errors(torch.float32, True), errors(torch.float32, False)
    assert looked_up[0] <= 2 * products[0]
    assert looked_up[1] <= 4 * products[1]


def test_any_number_of_threads_gives_the_same_bits() -> None:
    x, bits = images(4, 64, 9, 9, dtype=torch.float32)
    weight, grad = torch.randn(64, 64, 3, 3), torch.randn(4, 64, 9, 9)
    geometry = ([1, 1], [1, 1], [1, 1])
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            y = spike_conv.convolve(x.shape, bits, weight, None, *geometry)
            results.append((y, spike_conv.weight_gradient(grad, x.shape, bits, weight, *geometry)))
    finally:
        torch.set_num_threads(threads)
    for y, of_weight in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(of_weight, results[0][1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_spread_as_in_products(bad: float) -> None:
    x, bits = images(1, 32, 4, 4, rate=0.0)
    weight = torch.randn(32, 32, 1, 1, dtype=torch.float64)
    weight[3, 5] = bad
    y = spike_conv.convolve(x.shape, bits, weight, None, [1, 1], [0, 0], [1, 1])
    assert y[:, 3].isnan().all(), "0 * NaN and 0 * inf are NaN"
    assert not y[:, :3].isnan().any()
    grad = torch.zeros(1, 32, 4, 4, dtype=torch.float64)
    grad[0, 7, 2, 1] = bad
    of_weight = spike_conv.weight_gradient(grad, x.shape, bits, weight, [1, 1], [0, 0], [1, 1])
    assert of_weight[7].isnan().all()
    assert of_weight[:7].eq(0).all()


def test_what_does_not_suit() -> None:
    x, bits = images(2, 32, 4, 4, dtype=torch.float32)
    weight = torch.randn(32, 32, 3, 3)
    assert spike_conv.suits(x, 1, weight, 1)
    assert spike_conv.suits(x, 0, weight, 1), "rows of bits, as the unit makes them"
    for other in (
        (x, 2, weight, 1),
        (x, 1, weight[:, :16], 2),
        (x, 1, weight[:16], 1),
        (x.contiguous(), 1, weight, 1),
        (x.bfloat16(), 1, weight.bfloat16(), 1),
        (x, 1, weight.double(), 1),
        (x[:0], 1, weight, 1),
        (images(2, 48, 4, 4)[0], 1, torch.randn(32, 48, 1, 1, dtype=torch.float64), 1),
    ):
        assert not spike_conv.suits(*other)
    with spike_conv.products():
        assert not spike_conv.suits(x, 1, weight, 1)
    with pytest.raises(RuntimeError, match="larger than the images"):
        spike_conv.convolve((1, 32, 2, 2), bits, weight, None, [1, 1], [0, 0], [1, 1])


@pytest.mark.parametrize("record", [True, False])
def test_a_layer_looks_up_what_is_known_to_be_spikes(record: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    convolve = spike_conv.convolve
    monkeypatch.setattr(spike_conv, "convolve", lambda *args: calls.append(1) or convolve(*args))
    conv = layer.Conv2d(32, 64, 3, padding=1, step_mode="m")
    x = images(6, 32, 5, 5, dtype=torch.float32)[0].unflatten(0, (3, 2))
    with torch.set_grad_enabled(record):
        dense = conv(x)
        assert not calls
        torch.testing.assert_close(conv(spikes.mark_spikes(x.clone(), 1)), dense)
        assert calls
        calls.clear()
        conv(spikes.mark_spikes(x.clone(), 2))
        assert not calls, "sums of spikes have more than one plane of bits"


def test_opcheck() -> None:
    x, bits = images(2, 32, 4, 4, dtype=torch.float32)
    weight = torch.randn(32, 32, 3, 3).contiguous(memory_format=LAST).requires_grad_()
    conv = (x.clone().requires_grad_(), bits, 1, weight, None, [1, 1], [1, 1], [1, 1], 1)
    torch.library.opcheck(torch.ops.scalesnn.spike_conv2d.default, conv)
    gradient = (torch.randn(2, 32, 4, 4), bits, list(x.shape), weight.detach(), [1, 1], [1, 1], [1, 1])
    torch.library.opcheck(torch.ops.scalesnn.spike_conv2d_weight.default, gradient)
