"""How kernels are launched: how many of them, with what, past torch's dispatcher or through it; and those
that finish a channel's sums, against torch's BatchNorm."""

from __future__ import annotations

import ctypes
import itertools
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu_on_cpu import GpuOnCpu
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from variants import unit_variant

from scalesnn import functional, layer, neuron, surrogate
from scalesnn.kernels import cpu, cuda, launch, normalisation
from scalesnn.kernels.source import IDENTITY, Variant, constants, fields, pointers, unpacked, variant_source

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
KERNELS = ["statistics", "coefficients", "forward", "backward", "channel_gradients", "normalise_backward"]


def make(momentum: float | None = 0.1, dtype: torch.dtype = torch.float32) -> nn.ModuleList:
    """A BatchNorm of five channels and a neuron."""
    torch.manual_seed(0)
    net = nn.ModuleList([layer.BatchNorm2d(5, momentum=momentum), neuron.LIFNode(backend="auto")])
    net[1].surrogate_function = surrogate.ATan()
    with torch.no_grad():
        net[0].weight.uniform_(0.5, 2)
        net[0].bias.normal_()
    functional.set_step_mode(net, "m")
    return net.to(dtype)


def train(net: nn.ModuleList, steps: int = 1, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Spikes and gradients of the last step, and what BatchNorm tracks."""
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x = (torch.randn(4, 2, 5, 3, 7, generator=generator) * 2 + 1).to(dtype).requires_grad_()
        net.zero_grad()
        spikes = net[0](x, neuron=net[1])
        (spikes * torch.linspace(-1, 1, spikes.numel()).view(spikes.shape)).sum().backward()
        functional.reset_net(net)
    gradients = [x.grad, net[0].weight.grad, net[0].bias.grad]
    return [spikes.detach(), *gradients, *net[0].buffers()]


@pytest.mark.parametrize("momentum", [0.1, None, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_running_statistics_are_torchs(engine: str, momentum: float | None, dtype: torch.dtype) -> None:
    net, of_torch = make(momentum, dtype), nn.BatchNorm2d(5, momentum=momentum).double()
    train(net, 3, dtype)
    for step in range(3):
        x = torch.randn(4, 2, 5, 3, 7, generator=torch.Generator().manual_seed(step)) * 2 + 1
        of_torch(x.to(dtype).double().flatten(0, 1))
    precision = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float64: 1e-12}[dtype]
    for name in ("running_mean", "running_var"):
        ours, right = getattr(net[0], name), getattr(of_torch, name)
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), right, rtol=precision, atol=precision)
    assert int(net[0].num_batches_tracked) == 3


def test_parameters_of_another_type_than_the_input(engine: str) -> None:
    """bfloat16 activations with float32 parameters (autocast), and the other way round."""
    for of_x, of_parameters in itertools.permutations((torch.bfloat16, torch.float32)):
        net, wide = make(dtype=of_parameters), make(dtype=of_parameters).double()
        found = train(net, dtype=of_x)
        net.eval(), wide.eval()
        assert [t.dtype for t in found[1:6]] == [of_x] + [of_parameters] * 4
        x = torch.randn(2, 1, 5, 3, 3, generator=torch.Generator().manual_seed(9)).to(of_x)
        wide[0].load_state_dict(net[0].state_dict())
        wide[0].backend = "torch"
        y, right = net[0](x), wide[0](x.double())
        torch.testing.assert_close(
            y.double(), right, rtol=2e-2 if of_x == torch.bfloat16 else 1e-5, atol=1e-2
        )


@pytest.mark.parametrize("group", ["", "all"])
def test_synchronised_batch_norm_reduces_once_each_way(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reduced = []

    def all_reduce(tensor: Tensor, of: str) -> Tensor:
        reduced.append(tensor.numel())
        return tensor.clone()

    monkeypatch.setattr(normalisation, "all_reduce", all_reduce)
    net, alone = make(), make()
    net[0].group = group
    found, right = train(net), train(alone)
    assert reduced == ([3 * 5 + 1, 3 * 5 + 1] if group else [])
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


class Watch(TorchDispatchMode):
    """A mode that sees what goes through the dispatcher, and changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_through_the_dispatcher_and_past_it_are_the_same(momentum: float | None, dtype: torch.dtype) -> None:
    right = train(make(momentum), 2, dtype)
    with Watch() as watch:
        found = train(make(momentum), 2, dtype)
    for name in ("statistics", "coefficients", "unit", "unit_backward", "channel_gradients"):
        assert f"scalesnn.{name}.default" in watch.seen
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_step_changes_the_version_of_what_batch_norm_tracks() -> None:
    """Or autograd would not notice that statistics it has saved are others now."""
    net = make()
    before = [buffer._version for buffer in net[0].buffers()]
    train(net)
    assert all(buffer._version > old for buffer, old in zip(net[0].buffers(), before, strict=True))


@pytest.mark.parametrize("name", ["weight", "running_var"])
@pytest.mark.parametrize("training", [True, False])
def test_parameters_without_their_values_are_refused(name: str, training: bool) -> None:
    """ZeRO-3 leaves empty parameters between calls: a kernel would read what is not theirs."""
    net = make().train(training)
    getattr(net[0], name).data = torch.empty(0)
    with pytest.raises(ValueError, match="must have 5 values on cpu, got 0 on cpu"):
        net[0](torch.randn(4, 2, 5, 3, 7), neuron=net[1])


def test_packed_arguments_are_the_values_in_their_places() -> None:
    names = [name for name, _ in fields()]
    packed = constants({"steps": 3, "tau": 2.5, "hard_reset": True})
    values = dict(zip(names, unpacked(packed + pointers(("x", "spikes")).pack(7, 9)), strict=True))
    assert {name: value for name, value in values.items() if value} == {
        "steps": 3,
        "tau": 2.5,
        "hard_reset": 1,
        "x": 7,
        "spikes": 9,
    }
    with pytest.raises(KeyError, match="tempo"):
        constants({"tempo": 1})
    with pytest.raises(ValueError, match="order"):
        pointers(("spikes", "x"))


def test_a_kernels_parameters_lie_where_the_host_packs_them() -> None:
    """The compiled kernels say where each parameter lies (EIATTR_KPARAM_INFO of the cubin)."""
    from test_gpu_build import nvrtc_compile

    for name in ("backward", "coefficients"):
        code = variant_source(*unit_variant(name, torch.float32, 4))
        cubin, at, found = nvrtc_compile(code, "sm_90"), -1, set()
        while (at := cubin.find(b"\x04\x17\x0c\x00", at + 1)) >= 0:
            ordinal, offset = (int.from_bytes(cubin[at + 8 + i : at + 10 + i], "little") for i in (0, 2))
            found.add((ordinal, offset))
        assert found == {(i, 8 * i) for i in range(len(fields()) + 1)}


@pytest.fixture
def as_on_a_gpu(shim_folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The whole path of a launch on a GPU, up to the driver's call, in whose place the shim takes the packed
    parameters. Returns the kernels that were launched, in order."""
    if not cuda.HAS_CUPY:
        pytest.skip("CuPy is not installed")
    from cupy_backends.cuda.api import driver

    engine, launched = GpuOnCpu(shim_folder), []

    def launch_kernel(variant: Variant, *arguments: int) -> None:
        (columns, rows, *block, shared, stream, kernel_parameters, extra) = arguments
        assert (block, shared, stream, kernel_parameters) == ([1, cuda.THREADS, 1, 1], 0, 11, 0)
        words = (ctypes.c_void_p * 5).from_address(extra)
        assert [words[0], words[2], words[4]] == [1, 2, None]
        packed = ctypes.string_at(words[1], ctypes.c_size_t.from_address(words[3]).value)
        told = dict(zip([field for field, _ in fields()], unpacked(packed), strict=True))
        again = cuda.variant_of(variant.kernel, variant.dtype, variant.surrogate or IDENTITY, told)
        assert again == variant
        assert cuda.launch_grid(variant, told) == (columns, rows)
        launched.append(variant.kernel)
        engine.call(variant.kernel, variant.dtype, variant.surrogate, packed)

    def function(index: int, variant: Variant) -> Any:
        return SimpleNamespace(kernel=SimpleNamespace(ptr=variant))

    calls = SimpleNamespace(
        Device=lambda index: SimpleNamespace(use=lambda: None), runtime=SimpleNamespace(free=lambda at: None)
    )
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=calls))
    monkeypatch.setattr(driver, "launchKernel", launch_kernel)
    monkeypatch.setattr(cuda, "_function", function)
    monkeypatch.setattr(launch, "index_of", lambda x: 0)
    monkeypatch.setattr(launch, "_multiprocessors", lambda index: 1)
    for module in (normalisation, sys.modules["scalesnn.kernels.ops"]):
        monkeypatch.setattr(module, "index_of", lambda x: 0)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 11, raising=False)
    monkeypatch.setattr(cuda, "_threads", threading.local())
    clear()
    yield launched
    clear()


def clear() -> None:
    """Forget prepared launches."""
    for module in (launch, normalisation, sys.modules["scalesnn.kernels.ops"]):
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


def test_a_gpu_gets_the_right_parameters(as_on_a_gpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = train(make(), 2)
    assert as_on_a_gpu == KERNELS * 2
    with monkeypatch.context() as plain:
        plain.setattr(launch, "on_gpu", lambda tensor: False)
        net = make()
        net[0].backend = net[1].backend = "torch"
        right = train(net, 2)
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_unit_and_step_is_six_launches_and_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither does torch launch anything beside our kernels, nor is a value read back from the device."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    pytest.importorskip("cupy_backends")
    from host_overhead import operators

    engine = GpuOnCpu(Path())
    monkeypatch.setattr(cpu, "call", lambda name, *_: engine.calls.append(name))
    net, x = make(), torch.randn(4, 2, 5, 3, 7, requires_grad=True)

    class Unit(nn.Module):
        inner = net

        def forward(self, x: Tensor) -> Tensor:
            return net[0](x, neuron=net[1])

    found = operators(Unit(), x, torch.ones_like(x))
    assert engine.calls == KERNELS
    assert not found
