"""Surrogates against SpikingJelly and their own primitive functions; torch against the C++ expressions."""

import ctypes
import inspect
import subprocess

import pytest
import torch
from spikingjelly.activation_based import surrogate as peer

from scalesnn import surrogate
from scalesnn.base import UserError

NAMES = [name for name in surrogate.__all__ if name[0].isupper() and name != "SurrogateFunctionBase"]
NO_PRIMITIVE = {"SuperSpike", "FakeNumericalGradient"}
# Primitives that are no antiderivative of the surrogate in SpikingJelly's definition.
NOT_ANTIDERIVATIVE = {"S2NN", "LogTailedReLU", "PiecewiseLeakyReLU"}
OTHER_PARAMETERS = {
    "LeakyKReLU": {"leak": 0.2, "k": 0.7},
    "LogTailedReLU": {"alpha": 0.1},
    "PiecewiseLeakyReLU": {"w": 0.6, "c": 0.05},
    "S2NN": {"alpha": 2.5, "beta": 0.8},
    "SquarewaveFourierSeries": {"n": 5, "T_period": 3.0},
    "DeterministicPass": {},
}


def points(dtype: torch.dtype) -> torch.Tensor:
    """Potentials near and far from the threshold, and the threshold itself."""
    generator = torch.Generator().manual_seed(0)
    random = 3 * torch.randn(500, generator=generator, dtype=torch.float64)
    special = torch.tensor([0.0, 1e-8, -1e-8, 0.5, -0.5, 1.0, -1.0, 2.0, 30.0, -30.0], dtype=torch.float64)
    return torch.cat([special, random]).to(dtype)


def gradient(function: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y, x, torch.linspace(0.5, 2, len(x), dtype=x.dtype))[0]


def test_there_are_seventeen():
    assert len(NAMES) == 17


@pytest.mark.parametrize("name", NAMES)
def test_constructor_has_the_peers_names_and_defaults(name):
    def arguments(module):
        return {k: p.default for k, p in inspect.signature(getattr(module, name)).parameters.items()}

    assert arguments(surrogate) == arguments(peer)


@pytest.mark.parametrize("other", [False, True], ids=["defaults", "other parameters"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", NAMES)
def test_spikes_and_gradients_equal_the_peers(name, dtype, tolerance, other):
    parameters = OTHER_PARAMETERS.get(name, {"alpha": 1.7}) if other else {}
    ours = gradient(getattr(surrogate, name)(**parameters), points(dtype))
    theirs = gradient(getattr(peer, name)(**parameters), points(dtype))
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NO_PRIMITIVE])
def test_primitive_equals_the_peers(name):
    ours = getattr(surrogate, name)(spiking=False)
    theirs = getattr(peer, name)(spiking=False)
    x = points(torch.float64)
    torch.testing.assert_close(ours(x.clone()), theirs(x.clone()), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in NO_PRIMITIVE | NOT_ANTIDERIVATIVE])
def test_derivative_is_the_primitives(name):
    function = getattr(surrogate, name)()
    x = points(torch.float64)[10:].requires_grad_()
    (from_autograd,) = torch.autograd.grad(function.primitive(x).sum(), x)
    torch.testing.assert_close(function.derivative(x.detach()), from_autograd, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", sorted(NO_PRIMITIVE))
def test_without_a_primitive_says_so(name):
    function = getattr(surrogate, name)()
    function.set_spiking_mode(False)
    with pytest.raises(NotImplementedError, match=name):
        function(torch.zeros(1))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Every kernel expression, at its defaults and at other parameters, compiled for double and for float."""
    cases = []
    for name in NAMES:
        for parameters in ({}, OTHER_PARAMETERS.get(name, {"alpha": 1.7})):
            cases.append(getattr(surrogate, name)(**parameters))
    lines = ["#include <cmath>", "using namespace std;"]
    for real in ("double", "float"):
        lines.append(
            f"namespace n_{real} {{ typedef {real} real; inline real square(real x) {{ return x * x; }}"
        )
        for i, function in enumerate(cases):
            constants = " ".join(f"const real {k} = {v!r};" for k, v in function.kernel_parameters().items())
            lines.append(f"static real f{i}(real x) {{ {constants} return {function.kernel_expression}; }}")
        lines.append("}")
        for i in range(len(cases)):
            loop = f"for (int j = 0; j < n; ++j) y[j] = n_{real}::f{i}(x[j]);"
            lines.append(f'extern "C" void {real}_{i}({real}* x, {real}* y, int n) {{ {loop} }}')
    folder = tmp_path_factory.mktemp("expressions")
    (folder / "expressions.cpp").write_text("\n".join(lines))
    command = ["g++", "-shared", "-fPIC", "-Werror=narrowing", "expressions.cpp", "-o", "expressions.so"]
    subprocess.run(command, cwd=folder, check=True, timeout=120)
    return cases, ctypes.CDLL(str(folder / "expressions.so"))


@pytest.mark.parametrize(
    ("dtype", "real", "tolerance"), [(torch.float64, "double", 1e-12), (torch.float32, "float", 2e-5)]
)
def test_kernel_expression_is_the_derivative(compiled, dtype, real, tolerance):
    cases, library = compiled
    x = points(dtype)
    for i, function in enumerate(cases):
        y = torch.empty_like(x)
        library[f"{real}_{i}"](ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), len(x))
        expected = function.derivative(x)
        torch.testing.assert_close(
            y, expected, rtol=tolerance, atol=tolerance, msg=f"{function}: {y} {expected}"
        )


def test_negative_zero_is_the_threshold():
    """x >= 0 holds for -0.0: the gradient must be that of 0.0 (the peer's FakeNumericalGradient: -inf)."""
    for name in NAMES:
        function = getattr(surrogate, name)()
        zero = torch.tensor([0.0, -0.0], dtype=torch.float64)
        spikes, grads = function(zero), function.derivative(zero)
        assert spikes[0] == spikes[1] == 1
        assert grads[0] == grads[1]
        assert grads.isfinite().all()


def test_spikes_keep_dtype_and_memory_format():
    x = torch.randn(2, 3, 4, 4).to(torch.bfloat16, memory_format=torch.channels_last)
    y = surrogate.ATan()(x)
    assert y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_a_surrogate_of_ones_own_needs_only_a_derivative():
    class Flat(surrogate.SurrogateFunctionBase):
        def derivative(self, x):
            return torch.full_like(x, 0.25)

    assert gradient(Flat(), torch.zeros(1))[1].item() == 0.25 * 0.5
    assert Flat().kernel_expression is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: surrogate.ATan(alpha=0), "alpha of ATan must be greater than 0, got 0"),
        (lambda: surrogate.QPseudoSpike(alpha=1.0), "alpha of QPseudoSpike must be greater than 1, got 1"),
        (
            lambda: surrogate.PiecewiseLeakyReLU(w=-1),
            "w of PiecewiseLeakyReLU must be greater than 0, got -1",
        ),
        (lambda: surrogate.SquarewaveFourierSeries(n=0), "needs n >= 1"),
    ],
)
def test_bad_parameters_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_repr_shows_parameters():
    assert repr(surrogate.ATan(3.0)) == "ATan(alpha=3.0, spiking=True)"
