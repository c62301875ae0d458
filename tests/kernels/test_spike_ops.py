"""Spikes as bits: packing, convolutions and max-pools that keep bits, and what is known about a tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scalesnn import layer, neuron, surrogate
from scalesnn.kernels import packing, spikes


def saved_bytes(function: Any) -> tuple[Any, int]:
    """What ``function`` returns, and the bytes that autograd keeps for it."""
    storages: dict[int, int] = {}
    alive = []

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function()
    return result, sum(storages.values())


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=4),
    st.integers(1, 8),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_packing_is_exact(shape: list[int], planes: int, dtype: torch.dtype) -> None:
    x = torch.randint(0, 2**planes, shape).to(dtype)
    bits = packing.pack(x, planes)
    assert bits.numel() == planes * -(-x.numel() // 32)
    assert torch.equal(packing.unpack(bits, planes, x.shape, x.stride(), dtype), x)


@pytest.mark.parametrize("size", [1, 31, 32, 33, 255, 256, 257, 1000])
def test_the_gpu_drivers_pack_the_same_bits(
    size: int, gpu_on_cpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randint(0, 8, (size,)).float()
    bits = packing.pack(x, 3)
    assert torch.equal(packing.unpack(bits, 3, x.shape, x.stride(), x.dtype), x)
    assert {"pack", "unpack"} <= set(gpu_on_cpu.calls)
    monkeypatch.undo()
    assert torch.equal(packing.pack(x, 3), bits)


def spike_sequence(T: int = 3, last: bool = False, largest: int = 1) -> Tensor:
    x = torch.randint(0, largest + 1, (T, 2, 6, 9, 7)).float()
    if last:
        x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (T, 2))
    return x


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("largest", [1, 5])
@pytest.mark.parametrize(
    "geometry", [{}, {"stride": 2, "padding": 1}, {"groups": 3, "bias": False, "dilation": 2}]
)
def test_a_convolution_of_spikes_keeps_bits_and_has_torch_gradients(
    last: bool, largest: int, geometry: dict[str, Any]
) -> None:
    conv = layer.Conv2d(6, 12, 3, step_mode="m", **geometry)
    gradients, outputs, kept = [], [], []
    for mark in (True, False):
        torch.manual_seed(0)
        leaf = spike_sequence(last=last, largest=largest).requires_grad_()
        x = leaf * 1.0
        if mark:
            spikes.mark_spikes(x, largest)
        y, size = saved_bytes(lambda x=x: conv(x))
        weights = torch.linspace(-1, 1, y.numel()).view_as(y)
        inputs = [leaf, *conv.parameters()]
        gradients.append(torch.autograd.grad((y * weights).sum(), inputs))
        outputs.append(y.detach())
        kept.append(size - conv.weight.numel() * 4)
    assert torch.equal(*outputs)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    planes = largest.bit_length()
    assert kept[0] <= planes * (leaf.numel() / 8 + 4)
    assert kept[1] >= leaf.numel() * 4


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("largest", [0, 1, 5])
@pytest.mark.parametrize("kernel", [(3, 2, 1), (2, 2, 0)])
def test_max_pool_keeps_bits_of_spikes_and_else_two_bytes_a_maximum(
    last: bool, largest: int, kernel: tuple[int, int, int]
) -> None:
    pool = layer.MaxPool2d(*kernel, step_mode="m")
    plain = torch.nn.MaxPool2d(*kernel)
    a = spike_sequence(last=last, largest=max(largest, 1)).requires_grad_()
    b = a.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y, size = saved_bytes(lambda: pool(spikes.mark_spikes(a * 1.0, largest) if largest else a * 1.0))
    expected = plain(b.flatten(0, 1)).unflatten(0, b.shape[:2])
    assert torch.equal(y, expected)
    assert spikes.is_spikes(y) == largest
    if largest:
        assert size <= largest.bit_length() * (a.numel() / 8 + 4)
    else:
        assert size == y.numel() * 2
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    assert torch.equal(a.grad, b.grad)


def test_only_what_is_known_to_be_spikes_is_kept_as_bits() -> None:
    node = neuron.IFNode(step_mode="m", surrogate_function=surrogate.ATan())
    x = torch.randn(2, 3, 4, 5, 5, requires_grad=True)
    s = node(x)
    assert spikes.is_spikes(s) == 1
    assert spikes.is_spikes(s * 0.5) == 0
    assert spikes.is_spikes(spikes.add(s, s)) == 2
    assert spikes.is_spikes(s + s) == 0
    assert spikes.is_spikes(s.view_as(s)) == 1, "an alias of the same tensor, as ZeRO-3's hooks make"
    assert spikes.is_spikes(s.flatten(0, 1)) == 0
    with torch.no_grad():
        s.mul_(0.5)
    assert spikes.is_spikes(s) == 0
    assert spikes.is_spikes(s.view_as(s)) == 0
    assert spikes.is_spikes(s.data) == 0, "its version is its own"


def test_an_alias_knows_its_bits_when_the_tensor_is_gone() -> None:
    s = neuron.IFNode(step_mode="m")(torch.randn(2, 3, 4, 4, 4, requires_grad=True))
    bits = spikes.bits_of(s)
    alias, longer = s.view_as(s).detach().view_as(s), s[1:]
    del s
    assert bits is not None
    assert spikes.bits_of(alias)[0] is bits[0]
    assert spikes.is_spikes(longer) == 0
    alias.detach().mul_(0.5)
    assert spikes.is_spikes(alias) == 0


def test_bits_of_a_freed_tensor_are_not_taken_for_those_of_its_successor() -> None:
    for _ in range(20):
        s = spikes.mark_spikes(torch.ones(1, 1, 1, 64, 64))
        del s
        assert spikes.is_spikes(torch.full((1, 1, 1, 64, 64), 0.5)) == 0


def test_opcheck() -> None:
    x = torch.randint(0, 2, (4, 3, 6, 6)).float()
    bits = packing.pack(x, 1)
    torch.library.opcheck(torch.ops.scalesnn.pack.default, (x, 1))
    unpack = (bits, 1, list(x.shape), list(x.stride()), torch.float32)
    torch.library.opcheck(torch.ops.scalesnn.unpack.default, unpack)
    pool = (x.clone().requires_grad_(), bits, 1, [3, 3], [2, 2], [1, 1], [1, 1], False)
    torch.library.opcheck(torch.ops.scalesnn.spike_max_pool2d.default, pool)
    weight = torch.randn(5, 3, 3, 3, requires_grad=True)
    conv = (x.clone().requires_grad_(), bits, 1, weight, None, [1, 1], [1, 1], [1, 1], 1)
    torch.library.opcheck(torch.ops.scalesnn.spike_conv2d.default, conv)
    pool = (x.clone().requires_grad_(), [3, 3], [2, 2], [1, 1], [1, 1], False)
    torch.library.opcheck(torch.ops.scalesnn.max_pool2d.default, pool)
