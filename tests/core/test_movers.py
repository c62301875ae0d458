"""Names that movers from SpikingJelly use: each is here, or the error says what comes nearest."""

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys

import pytest
import spikingjelly.activation_based as peer
from spikingjelly.activation_based import model as peer_models

import scalesnn
from scalesnn import model
from scalesnn.movers import NEAREST

MODULES = ("base", "functional", "layer", "neuron", "surrogate")


def public_names(module) -> list[str]:
    """Classes and functions of SpikingJelly's that a module offers."""
    found = [name for name in dir(module) if not name.startswith("_")]
    kinds = (inspect.isclass, inspect.isfunction)
    values = {name: getattr(module, name) for name in found}
    return [
        name
        for name, value in values.items()
        if any(kind(value) for kind in kinds) and value.__module__.startswith("spikingjelly")
    ]


@pytest.mark.parametrize("name", MODULES)
def test_every_name_of_the_peers_is_here_or_has_a_nearest(name):
    ours, theirs = getattr(scalesnn, name), importlib.import_module(f"spikingjelly.activation_based.{name}")
    names = public_names(theirs)
    assert len(names) >= 9
    lacking = [n for n in names if not hasattr(ours, n) and n not in NEAREST[ours.__name__]]
    assert lacking == []


@pytest.mark.parametrize(("package", "theirs"), [(scalesnn, peer), (model, peer_models)])
def test_every_module_of_the_peers_is_here_or_has_a_nearest(package, theirs):
    names = [m.name for m in pkgutil.iter_modules(theirs.__path__) if not m.name.startswith("_")]
    assert len(names) > 10
    assert [n for n in names if not hasattr(package, n) and n not in NEAREST[package.__name__]] == []


@pytest.mark.parametrize("module", NEAREST)
def test_a_hint_is_of_a_name_that_is_not_here_and_names_what_is(module):
    ours = importlib.import_module(module)
    for name, hint in NEAREST[module].items():
        assert not hasattr(ours, name), name
        for area, attribute in re.findall(r"\b(layer|neuron|functional|surrogate|base)\.(\w+)", hint):
            if not hint.startswith("a loss of torch") and f"nn.{area}" not in hint:
                assert hasattr(getattr(scalesnn, area), attribute), hint


@pytest.mark.parametrize(
    ("statement", "error", "words"),
    [
        ("from scalesnn.neuron import KLIFNode", ImportError, "SpikingJelly has; nearest: neuron.LIFNode"),
        ("from scalesnn import neuron; neuron.KLIFNode", AttributeError, "nearest: neuron.LIFNode"),
        ("from scalesnn.layer import WSConv2d", ImportError, "nearest: layer.Conv2d"),
        ("from scalesnn.layer import Conv2d, MaxUnpool2d", ImportError, "nearest: layer.Upsample"),
        (
            "from scalesnn import layer; layer.TLastMultiStepContainer()",
            AttributeError,
            "layer.MultiStepContainer",
        ),
        ("from scalesnn.functional import if_step", ImportError, "nearest: neuron.IFNode"),
        ("from scalesnn.surrogate import atan", ImportError, "nearest: surrogate.ATan"),
        ("from scalesnn.base import SingleStepModule", ImportError, "nearest: base.StepModule"),
        ("from scalesnn import encoding", ImportError, "nearest: functional.repeat_over_time"),
        ("import scalesnn; scalesnn.monitor", AttributeError, "nearest: neuron.BaseNode.observer"),
        ("from scalesnn.model import spiking_vgg", ImportError, "nearest: model.spiking_resnet"),
        ("from scalesnn.layer import Conv2D", ImportError, "did you mean 'Conv2d'?"),
        ("from scalesnn import layer; layer.Conv2D", AttributeError, "did you mean 'Conv2d'?"),
        ("from scalesnn.layer import Nothing", ImportError, "has no attribute 'Nothing'"),
    ],
)
def test_the_error_says_what_comes_nearest(statement, error, words):
    with pytest.raises(error, match=re.escape(words)) as caught:
        exec(statement, {})
    assert type(caught.value) is error


def test_the_words_reach_the_user():
    done = subprocess.run(
        [sys.executable, "-c", "from scalesnn.layer import VotingLayer"], capture_output=True, text=True
    )
    said = done.stderr.strip().splitlines()[-1]
    assert said == (
        "ImportError: scalesnn.layer has no 'VotingLayer', which SpikingJelly has; "
        "nearest: layer.AvgPool1d over the votes"
    )


def test_asking_whether_a_name_is_there_stays_a_question():
    assert not hasattr(scalesnn.layer, "VotingLayer")
    assert getattr(scalesnn.neuron, "KLIFNode", None) is None
    assert not hasattr(scalesnn, "__wrapped__")
