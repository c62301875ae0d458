"""ops.unit against a float64 oracle and against torch: the CPU's build of the kernels and the GPU's."""

from __future__ import annotations

import pytest
import torch
from gpu_on_cpu import GpuOnCpu
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import NEURONS, Neuron, run
from torch import Tensor

from scalesnn import neuron, surrogate
from scalesnn.kernels import cuda, normalisation, ops, packing
from scalesnn.kernels.records import UnitInputs
from scalesnn.kernels.source import Variant

N = None
NAMES = [f"{n.charge}{'-soft' * (n.v_reset is None)}{'-learned' * n.learned}" for n in NEURONS]


def safe_input(setting: Neuron, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Currents whose charges stay clear of the threshold, so that rounding turns no spike."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(*shape, dtype=torch.float64, generator=generator) * 1.5
    return x.to(dtype)


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    actual, expected = actual.detach(), expected.detach()
    assert actual.shape == expected.shape
    if not expected.numel():
        return
    scale = max(float(expected.abs().max()), 1e-3)
    assert float((actual.double() - expected.double()).abs().max()) <= tolerance * scale


def unit(
    x: Tensor, setting: Neuron, decay: Tensor | None = N, v: Tensor | None = N, **kwargs: object
) -> tuple:
    return ops.unit(UnitInputs(x, v=v, decay=decay, with_bits=True, neuron=setting.parameters, **kwargs))


@pytest.mark.parametrize("setting", NEURONS, ids=NAMES)
@pytest.mark.parametrize("T", [1, 5, 33, 70])  # 33 and 70: two and three chunks in the backward sweep
def test_neuron_and_gradients_equal_the_oracle_in_float64(engine: str, setting: Neuron, T: int) -> None:
    if engine != "cpu" and T == 5 and setting.learned:
        T = 8
    x = safe_input(setting, T, 2, 3, 5, 3).requires_grad_()
    v = (torch.randn(2, 3, 5, 3, dtype=torch.float64) * 0.3).requires_grad_()
    decay = torch.tensor(0.45, dtype=torch.float64, requires_grad=True) if setting.learned else None
    expected_s, expected_v = run(setting, x, v, decay)
    s, v_seq, _ = unit(x, setting, decay, v, v_every_step=True)
    assert torch.equal(s, expected_s)
    close(v_seq, expected_v, 1e-14)
    weights = torch.randn_like(s), torch.randn_like(v_seq)
    inputs = [x, v] + ([decay] if decay is not None else [])
    got = torch.autograd.grad((s * weights[0]).sum() + (v_seq * weights[1]).sum(), inputs)
    want = torch.autograd.grad((expected_s * weights[0]).sum() + (expected_v * weights[1]).sum(), inputs)
    for one, other in zip(got, want, strict=True):
        close(one, other, 1e-12)


@pytest.mark.parametrize("cls", [neuron.IFNode, neuron.LIFNode, neuron.ParametricLIFNode])
@pytest.mark.parametrize("v_reset", [0.0, -0.3, None])
@pytest.mark.parametrize("T", [1, 4, 70, 128])
def test_float32_equals_plain_torch_bit_for_bit(cls: type, v_reset: float | None, T: int) -> None:
    kwargs = {
        "v_reset": v_reset,
        "surrogate_function": surrogate.ATan(),
        "step_mode": "m",
        "store_v_seq": True,
    }
    fused, plain = cls(**kwargs), cls(backend="torch", **kwargs)
    x = torch.randn(T, 3, 37)
    assert torch.equal(fused(x), plain(x))
    assert torch.equal(fused.v_seq, plain.v_seq)
    assert fused.v.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("setting", NEURONS[2:4], ids=NAMES[2:4])
def test_half_precision_input_keeps_a_float32_membrane(
    engine: str, dtype: torch.dtype, setting: Neuron
) -> None:
    x = safe_input(setting, 6, 2, 41, dtype=dtype).requires_grad_()
    s, v, _ = unit(x, setting)
    wide = x.detach().float().requires_grad_()
    expected_s, expected_v, _ = unit(wide, setting)
    assert (s.dtype, v.dtype) == (dtype, torch.float32)
    assert torch.equal(s.float(), expected_s)
    assert torch.equal(v, expected_v)
    s.sum().backward()
    expected_s.sum().backward()
    assert torch.equal(x.grad, wide.grad.to(dtype))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("v_reset", [0.0, None])
def test_what_is_not_a_number_spreads_as_in_torch(engine: str, value: float, v_reset: float | None) -> None:
    node = neuron.IFNode(step_mode="m", surrogate_function=surrogate.ATan(), v_reset=v_reset)
    plain = neuron.IFNode(
        step_mode="m", surrogate_function=surrogate.ATan(), v_reset=v_reset, backend="torch"
    )
    x = torch.randn(4, 1, 40)
    x[1, 0, 7] = value
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    s, expected = node(a), plain(b)
    torch.testing.assert_close(s, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(node.v, plain.v, rtol=0, atol=0, equal_nan=True)
    s.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(a.grad, b.grad, equal_nan=True)


def normalised(x: Tensor, weight: Tensor, bias: Tensor, repeats: int = 1) -> UnitInputs:
    """A unit without a neuron, normalised by the batch's statistics."""
    sums = normalisation.statistics(x.detach(), repeats)
    of_norm = (weight.detach(), bias.detach(), N, N, N, 1e-5, 0.1)
    affine, statistics = normalisation.coefficients(sums, x.dtype, *of_norm)
    return UnitInputs(x, affine, statistics, weight, bias, repeats=repeats)


def batch_norm_unit(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, setting: Neuron
) -> tuple:
    """The unit as BatchNorm2d calls it in training mode."""
    u = normalised(x, weight, bias)
    return ops.unit(u._replace(residual=residual, with_bits=True, neuron=setting.parameters))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", [(3, 2, 5, 3, 7), (40, 1, 33, 2, 2), (2, 2, 33, 4, 5)])
def test_batch_norm_unit_and_gradients(
    engine: str, channels_last: bool, with_residual: bool, shape: tuple[int, ...]
) -> None:
    setting = NEURONS[2]
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = safe_input(setting, *shape)
    residual = torch.randn(shape, dtype=torch.float64)
    if channels_last:
        x, residual = (
            t.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, shape[:2])
            for t in (x, residual)
        )
    residual = residual.requires_grad_() if with_residual else None
    x.requires_grad_()
    weight = (torch.rand(shape[2], dtype=torch.float64) + 0.5).requires_grad_()
    bias = torch.randn(shape[2], dtype=torch.float64, requires_grad=True)
    s, v, _ = batch_norm_unit(x, weight, bias, residual, setting)
    y = torch.nn.functional.batch_norm(x.flatten(0, 1), None, None, weight, bias, training=True).view_as(x)
    expected_s, expected_v = run(setting, y if residual is None else y + residual, 0.0, None)
    assert torch.equal(s, expected_s)
    assert s.flatten(0, 1).is_contiguous(memory_format=memory_format)
    close(v, expected_v[-1], 1e-12)
    weights = torch.randn_like(s), torch.randn_like(v)
    inputs = [x, weight, bias] + ([residual] if residual is not None else [])
    got = torch.autograd.grad((s * weights[0]).sum() + (v * weights[1]).sum(), inputs)
    want = torch.autograd.grad((expected_s * weights[0]).sum() + (expected_v[-1] * weights[1]).sum(), inputs)
    for one, other in zip(got, want, strict=True):
        close(one, other, 1e-11)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_repeated_step_is_the_same_as_its_copies(engine: str, channels_last: bool) -> None:
    T, setting = 5, NEURONS[3]
    once = torch.randn(2, 6, 3, 5, dtype=torch.float64)
    if channels_last:
        once = once.contiguous(memory_format=torch.channels_last)
    results = []
    for repeats in (1, T):
        x = once.clone(memory_format=torch.preserve_format).requires_grad_()
        x_seq = x.unsqueeze(0) if repeats > 1 else x.unsqueeze(0).repeat(T, 1, 1, 1, 1)
        ones = torch.ones(6, dtype=torch.float64)
        u = normalised(x_seq, ones, 0 * ones, repeats)
        s, v, _bits = ops.unit(u._replace(with_bits=True, neuron=setting.parameters))
        ((s * torch.arange(1.0, T + 1).view(-1, 1, 1, 1, 1)).sum() + v.sum()).backward()
        results.append((s.detach(), v.detach(), x.grad, u.affine, u.statistics))
    assert torch.equal(results[0][0], results[1][0])
    for one, other in zip(results[0][1:], results[1][1:], strict=True):
        close(one, other, 1e-12)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 6), st.integers(0, 3), st.integers(1, 40), st.integers(1, 6), st.booleans(),
    st.sampled_from(["float32", "bfloat16", "float64"]), st.integers(0, 7),
)  # fmt: skip
def test_any_shape_equals_the_oracle(
    T: int, batch: int, C: int, W: int, last: bool, dtype: str, which: int
) -> None:
    """Spikes of any size and layout, odd ones and empty ones too, in the arithmetic of the dtype."""
    setting = NEURONS[which]
    x = torch.randn(T, batch, C, 3, W).to(getattr(torch, dtype))
    if last:
        x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (T, batch))
    wide = x.double() if dtype == "float64" else x.float()
    decay = torch.tensor(0.4, dtype=wide.dtype) if setting.learned else None
    s, v, bits = unit(x, setting, decay)
    expected_s, expected_v = run(setting, wide, 0.0, decay if decay is not None else None)
    if (
        not setting.learned and setting.charge != "integrate"
    ):  # the oracle multiplies where the kernel divides
        agree = (s.to(wide.dtype) == expected_s).double().mean() if s.numel() else torch.ones(())
        assert agree > 0.99
    else:
        assert torch.equal(s.to(wide.dtype), expected_s)
        close(v, expected_v[-1], 1e-5)
    assert s.shape == x.shape
    assert torch.equal(packing.unpack(bits, 0, s.shape, s.stride(), s.dtype), s)


@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_statistics_survive_a_large_mean(engine: str, mean: float) -> None:
    x = (torch.randn(7, 3, 33, 4, 5, dtype=torch.float64) + mean).float()
    sums = normalisation.statistics(x)
    affine, statistics = normalisation.coefficients(sums, x.dtype, N, N, N, N, N, 0.0, N)
    wide = x.double()
    torch.testing.assert_close(affine[0].double(), wide.mean((0, 1, 3, 4)), rtol=1e-6, atol=1e-6)
    variance = 1 / statistics[:-1]
    torch.testing.assert_close(variance, wide.var((0, 1, 3, 4), unbiased=False), rtol=2e-6, atol=0)
    assert statistics[-1] == x.numel() / 33


def test_learned_decay_has_the_same_gradient_in_every_run(engine: str) -> None:
    setting = NEURONS[6]
    x = torch.randn(4, 3, 700)
    gradients = set()
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        decay = torch.tensor(0.4, requires_grad=True)
        unit(x, setting, decay)[0].sum().backward()
        gradients.add(decay.grad.item())
    torch.set_num_threads(1)
    assert len(gradients) == 1


def test_opcheck() -> None:
    opcheck = torch.library.opcheck
    x = torch.randn(3, 2, 4, 3, 3, requires_grad=True)
    residual = torch.randn(3, 2, 4, 3, 3, requires_grad=True)
    weight, bias = (torch.randn(4, requires_grad=True) for _ in range(2))
    u = normalised(x, weight, bias)._replace(residual=residual, neuron=NEURONS[3].parameters)
    opcheck(torch.ops.scalesnn.unit.default, u.flat())
    v, learned = torch.zeros(2, 4, 3, 3, requires_grad=True), torch.tensor(0.4, requires_grad=True)
    plain = UnitInputs(x, v=v, decay=learned, v_every_step=True, neuron=NEURONS[6].parameters)
    opcheck(torch.ops.scalesnn.unit.default, plain.flat())
    plain = UnitInputs(x.detach(), neuron=NEURONS[1].parameters)
    opcheck(torch.ops.scalesnn.unit_backward.default, (torch.randn_like(x), N, True, *plain.flat()))
    x, weight, bias = x.detach(), weight.detach(), bias.detach()
    opcheck(torch.ops.scalesnn.statistics.default, (x, 1))
    sums = normalisation.packed_sums(normalisation.statistics(x))
    running = (torch.zeros(4), torch.ones(4), torch.tensor(0))
    opcheck(torch.ops.scalesnn.coefficients.default, (sums, weight, bias, *running, 1e-5, 0.1, torch.float32))
    opcheck(
        torch.ops.scalesnn.running_coefficients.default, (*running[:2], weight, bias, 1e-5, torch.float32)
    )
    rows = torch.randn(2, 3, 4, dtype=torch.float64)
    opcheck(
        torch.ops.scalesnn.channel_gradients.default,
        (rows, u.affine, u.statistics, 1, "", torch.float32, True, False),
    )
    grads = torch.randn(3, 2, 4, 3, 3)
    opcheck(torch.ops.scalesnn.normalise_backward.default, (grads, x, u.affine, torch.randn(2, 4)))
    opcheck(torch.ops.scalesnn.normalise_backward_.default, (grads, x, u.affine, torch.randn(2, 4)))


@pytest.mark.parametrize("shape", [(3, 2, 41), (2, 1, 64), (1, 1, 5)])
def test_bits_are_the_spikes_and_nothing_after_them(engine: str, shape: tuple[int, ...]) -> None:
    s, _, bits = unit(safe_input(NEURONS[0], *shape), NEURONS[0])
    assert 0 < s.sum() < s.numel()
    rows = torch.nn.functional.pad(s.flatten(1), (0, -s[0].numel() % 32)).unflatten(1, (-1, 32))
    expected = (rows.long() << torch.arange(32)).sum(-1)
    assert torch.equal(bits.long() & 0xFFFFFFFF, expected)
    assert torch.equal(packing.unpack(bits, 0, list(s.shape), list(s.stride()), s.dtype), s)


@pytest.mark.parametrize("size", [1, 32, 77])
@pytest.mark.parametrize("planes", [1, 3])
def test_whole_numbers_are_packed_by_planes(engine: str, size: int, planes: int) -> None:
    generator = torch.Generator().manual_seed(size)
    x = torch.randint(0, 2**planes, (size,), generator=generator).float()
    bits = packing.pack(x, planes)
    for plane in range(planes):
        ones = torch.nn.functional.pad(x.long() >> plane & 1, (0, -size % 32)).unflatten(0, (-1, 32))
        assert torch.equal(bits[plane].long() & 0xFFFFFFFF, (ones << torch.arange(32)).sum(-1))
    assert torch.equal(packing.unpack(bits, planes, [size], [1], torch.float32), x)


@pytest.mark.parametrize("v_reset", [0.0, -0.25, None])
def test_a_charge_that_equals_the_threshold_fires_and_resets(engine: str, v_reset: float | None) -> None:
    kwargs = {"v_reset": v_reset, "surrogate_function": surrogate.ATan(), "step_mode": "m"}
    fused = neuron.IFNode(store_v_seq=True, **kwargs)
    plain = neuron.IFNode(store_v_seq=True, backend="torch", **kwargs)
    a = torch.full((6, 1, 40), 0.5, requires_grad=True)
    b = a.detach().clone().requires_grad_()
    s, expected = fused(a), plain(b)
    assert torch.equal(s, expected)
    assert s[1].all() if v_reset is None else s.any()
    assert torch.equal(fused.v_seq, plain.v_seq)
    weights = torch.randn_like(s)
    (s * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("T", [3, 40])
def test_normalisation_without_a_neuron_has_torch_gradients(engine: str, T: int, training: bool) -> None:
    x = torch.randn(T, 2, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(T, 2, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    weight = (torch.rand(5, dtype=torch.float64) + 0.5).requires_grad_()
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    u = normalised(x, weight, bias)
    mean, variance = x.detach().mean((0, 1, 3, 4)), x.detach().var((0, 1, 3, 4), correction=0)
    if not training:
        affine = normalisation.running_coefficients(mean, variance, weight, bias, 1e-5, x.dtype)
        u = u._replace(affine=affine, statistics=N)
    y, *_ = ops.unit(u._replace(residual=residual))
    known = (N, N) if training else (mean, variance)
    expected = torch.nn.functional.batch_norm(x.flatten(0, 1), *known, weight, bias, training).view_as(x)
    expected = expected + residual
    close(y, expected, 1e-12)
    weights, inputs = torch.randn_like(y), [x, weight, bias, residual]
    got = torch.autograd.grad((y * weights).sum(), inputs)
    want = torch.autograd.grad((expected * weights).sum(), inputs)
    for one, other in zip(got, want, strict=True):
        close(one, other, 1e-11)


@pytest.mark.parametrize(("dtype", "ulp"), [(torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10)])
def test_halves_are_rounded_as_torch_does(engine: str, dtype: torch.dtype, ulp: float) -> None:
    values = torch.cat([1 + torch.arange(64.0) * ulp / 2, torch.tensor([float("nan"), float("inf"), -0.3])])
    zeros = torch.zeros_like(values)
    x = torch.ones(1, 1, len(values), 1, 1, dtype=dtype)
    y = ops.normalise(x, torch.stack([zeros, values, zeros])).flatten()
    assert torch.equal(y.nan_to_num(7), values.to(dtype).nan_to_num(7))  # every second value is a tie
    assert y.isnan().sum() == 1


def test_few_blocks_do_the_work_of_many(gpu_on_cpu: GpuOnCpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def results() -> list[Tensor]:
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(3, 2, 10, 9, 8, generator=generator).requires_grad_()
        weight, bias = torch.full((10,), 0.8, requires_grad=True), torch.zeros(10, requires_grad=True)
        s, v, bits = batch_norm_unit(x, weight, bias, N, NEURONS[2])
        weights = torch.randn(s.shape, generator=generator)
        grads = torch.autograd.grad((s * weights).sum() + v.sum(), [x, weight, bias])
        packed = packing.pack(s.detach(), 1)
        dense = packing.unpack(packed, 1, list(s.shape), list(s.stride()), s.dtype)
        assert torch.equal(dense, s)
        return [s, v, bits, packed, *grads]

    expected, grid = results(), cuda.launch_grid

    def two_blocks(variant: Variant, arguments: dict[str, object]) -> tuple[int, int]:
        strided = ("forward", "normalise_backward", "pack", "unpack")
        columns, rows = grid(variant, arguments)
        return (min(columns, 2) if variant.kernel in strided else columns), rows

    monkeypatch.setattr(cuda, "launch_grid", two_blocks)
    for one, other in zip(results(), expected, strict=True):
        assert torch.equal(one, other)
