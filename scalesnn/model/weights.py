"""Weights from files into networks: only tensors are read, and what does not fit is named."""

from __future__ import annotations

import argparse
import json
import pickle
import re
import warnings
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import torch
from torch import Tensor, nn

from scalesnn.base import UserError
from scalesnn.neuron import BaseNode

__all__ = [
    "Fit",
    "Weights",
    "fit_weights",
    "misfits",
    "read_weights_file",
    "torchvision_weights",
    "without_prefixes",
]

WRAPPERS = ("model", "state_dict", "model_state_dict", "net", "ema")
PREFIXES = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")  # of DDP, torch.compile and FSDP1
INSIDE = re.compile(r"(?<=\.)(_orig_mod|_fsdp_wrapped_module)\.")
COUNTER = "num_batches_tracked"  # of BatchNorm; files older than torch 0.4.1 have none
# What training scripts put beside their tensors and what cannot run: flags, and numpy's numbers.
HARMLESS: list[Any] = [
    argparse.Namespace,
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),  # type: ignore[attr-defined]
    (np._core.multiarray.scalar, "numpy._core.multiarray.scalar"),  # type: ignore[attr-defined]
    np.dtype,
    type(np.dtype("float64")),
    type(np.dtype("float32")),
    type(np.dtype("int64")),
]


@dataclass
class Weights:
    """The tensors of a file, by their keys there without wrappers.

    Attributes:
        tensors: key → tensor on the CPU.
        source: what they are from, as the user named it.
        classes: names of the classes in the order of the classifier; empty if not known.
        settings: flags that the file says it was trained with; empty if it does not.
        notices: lines for the user.
    """

    tensors: dict[str, Tensor]
    source: str
    classes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


@dataclass
class Fit:
    """What came of fitting weights into a network.

    Attributes:
        anew: keys of a classifier or first convolution that keep the network's new values.
        ends: a line for the user about each of the two.
        kept: keys of neurons that keep the network's new values.
        neurons: lines about parameters of neurons.
    """

    anew: list[str] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    kept: set[str] = field(default_factory=set)
    neurons: list[str] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------ reading
def read_weights_file(path: Path) -> Weights:
    """Read safetensors, or a state dict that ``torch.save`` wrote, plain or wrapped.

    Raises:
        UserError: it cannot be read, is damaged, holds pickled code (which is not run) or no tensors.
    """
    try:
        with path.open("rb") as file:
            head = file.read(9)
        size = path.stat().st_size
        if head[8:] == b"{" and int.from_bytes(head[:8], "little") < size:
            return _read_safetensors(path)
        return _read_torch(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _read_safetensors(path: Path) -> Weights:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            said = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # it is no dict
    except SafetensorError as error:
        raise UserError(f"{path}: damaged, or no safetensors file ({error})") from None
    return _of_content(tensors, path, said)


def _read_torch(path: Path) -> Weights:
    try:
        with torch.serialization.safe_globals(HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that torch.save did not write
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # what it says begins with advice to run the code
        code = re.search(r"(?:GLOBAL|class|function|type) ([\w.]+\.[\w.]+)", str(error))
        if code is None:
            raise UserError(f"{path}: damaged, or no file of weights") from None
        raise UserError(
            f"{path} holds pickled code ({code[1]}), which is not run: where it can be loaded, save its "
            "state_dict() alone"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        if "TorchScript" in str(error):
            raise UserError(
                f"{path} is a TorchScript program, which is not run: torch.jit.load it and save its "
                "state_dict()"
            ) from None
        raise UserError(f"{path}: damaged, or no file of weights") from None
    return _of_content(content, path, getattr(content, "_metadata", {}))


def _of_content(content: Any, path: Path, said: Mapping[str, Any]) -> Weights:
    """Unwrap what a file holds; ``said`` is what ``scalesnn export`` wrote of it, if that made the file."""
    settings: Any = content.get("args") if isinstance(content, Mapping) else None
    notices = []
    while inside := [w for w in WRAPPERS if isinstance(content, Mapping) and _holds_tensors(content.get(w))]:
        if len(inside) > 1:
            notices.append(f"{path} holds {', '.join(inside)}: {inside[0]} is taken")
        content = content[inside[0]]
    tensors = {}
    if isinstance(content, Mapping):
        tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no weights: expected a state dict, plain or in {', '.join(WRAPPERS)}")
    settings = vars(settings) if isinstance(settings, argparse.Namespace) else _json(said, "settings", {})
    return Weights(tensors, str(path), _json(said, "classes", []), settings, notices)


def _holds_tensors(content: Any, deepest: int = 3) -> bool:
    """Whether this is a state dict, or a few wrappers around one."""
    if not isinstance(content, Mapping) or not deepest:
        return False
    plain = any(isinstance(value, Tensor) for value in content.values())
    return plain or any(_holds_tensors(content.get(w), deepest - 1) for w in WRAPPERS)


def _json(said: Mapping[str, Any], key: str, default: Any) -> Any:
    """A value that ``scalesnn export`` wrote as JSON; ``default`` where there is none of that type."""
    try:
        value = json.loads(said.get(key) or "null")
    except (AttributeError, TypeError, ValueError):
        return default
    return value if isinstance(value, type(default)) else default


def torchvision_weights(name: str, progress: bool = True) -> Weights:
    """Torchvision's weights, such as ``ResNet18_Weights.IMAGENET1K_V1``, through torch.hub's cache.

    Raises:
        UserError: there are none of the name, or the file is neither in the cache nor to be had, or damaged.
    """
    import torchvision

    try:
        weights = torchvision.models.get_weight(name)
    except (ValueError, KeyError, AttributeError):
        raise UserError(f"torchvision has no weights {name!r}") from None
    file = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[1]
    try:
        state = torch.hub.load_state_dict_from_url(
            weights.url, progress=progress, check_hash=True, map_location="cpu", weights_only=True
        )
    except (URLError, ConnectionError, TimeoutError) as error:
        raise UserError(
            f"cannot download the pretrained weights: put {weights.url} into {file.parent} ({error})"
        ) from error
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"the pretrained weights are damaged: delete {file} and try again") from error
    return Weights(dict(state), name)


# ------------------------------------------------------------------------------------------------ fitting
def fit_weights(model: nn.Module, weights: Weights) -> Fit:
    """Load weights and buffers into a network, before a strategy takes it over. No random number is drawn.

    A classifier (the last linear layer) for another number of classes keeps the network's new values, and
    so does a first convolution for another number of channels. Parameters of neurons are loaded where the
    network has them in that shape; parameters of surrogates never are.

    Raises:
        UserError: anything else does not fit; the line names the first three keys of each kind.
    """
    own = model.state_dict()
    state = {}
    for key, value in weights.tensors.items():
        name = without_prefixes(key, own)
        if "surrogate_function." not in name and name != "n_averaged":  # of torch's AveragedModel
            state[name] = value
    fit = Fit()
    _find_other_ends(model, state, own, fit)
    nodes = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseNode))
    _settle_neurons(nodes, state, own, fit)
    state = {key: value for key, value in state.items() if key not in fit.anew}
    wanted = {key: value for key, value in own.items() if key not in fit.anew and key not in fit.kept}
    if wrong := misfits(wanted, state):
        raise UserError(f"{weights.source} does not fit {type(model).__name__}: {wrong}")
    model.load_state_dict(state, strict=False)
    return fit


def misfits(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """What is wrong with ``state`` for a network of ``own``: the first three keys of each kind; '' if
    nothing."""
    missing = [k for k in own if k not in state and not k.endswith(COUNTER)]
    unknown = [k for k in state if k not in own]
    other = [
        f"{k} is {list(state[k].shape)}, here {list(v.shape)}"
        for k, v in own.items()
        if k in state and state[k].shape != v.shape
    ]
    parts = []
    if missing:
        parts.append(f"it lacks {_some(missing)}")
    if unknown:
        parts.append(f"it has {_some(unknown)}, which the network has not")
    if other:
        parts.append(_some(other))
    return "; ".join(parts)


def _some(names: Sequence[str], limit: int = 3) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def without_prefixes(key: str, own: Container[str] = ()) -> str:
    """A key without the prefixes that DDP, torch.compile and FSDP1 put into it, unless the network has
    them."""
    while key not in own and (prefix := next((p for p in PREFIXES if key.startswith(p)), "")):
        key = key.removeprefix(prefix)
    return key if key in own else INSIDE.sub("", key)


def _find_other_ends(
    model: nn.Module, state: Mapping[str, Tensor], own: Mapping[str, Tensor], fit: Fit
) -> None:
    """Note the classifier and the first convolution, if they are for other classes or channels."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    convolutions = [n for n, module in model.named_modules() if isinstance(module, nn.modules.conv._ConvNd)]
    for names, axis, what, unit in (
        (linear[-1:], 0, "classifier", "classes"),
        (convolutions[:1], 1, "first convolution", "channels"),
    ):
        for name in names:
            key = f"{name}.weight"
            here, there = list(own[key].shape), list(state[key].shape) if key in state else []
            if len(there) != len(here) or here[axis] == there[axis]:
                continue
            if here[:axis] + here[axis + 1 :] == there[:axis] + there[axis + 1 :]:
                fit.anew += [k for k in (key, f"{name}.bias") if k in own and (axis == 0 or k == key)]
                fit.ends.append(f"a new {what} for {here[axis]} {unit} (theirs is for {there[axis]})")


def _settle_neurons(
    nodes: tuple[str, ...], state: dict[str, Tensor], own: Mapping[str, Tensor], fit: Fit
) -> None:
    """Take out of ``state`` what the network's neurons do not have; note it, and what they keep."""
    theirs = [k for k in state if k.startswith(nodes)]
    dropped = [k for k in theirs if k not in own]
    other = [k for k in theirs if k in own and own[k].shape != state[k].shape]
    missing = [k for k in own if k.startswith(nodes) and k not in state]
    if dropped:
        fit.neurons.append(f"parameters of other neurons are left out: {_some(dropped)}")
    if other:
        shapes = f"{list(state[other[0]].shape)}, here {list(own[other[0]].shape)}"
        fit.neurons.append(
            f"neurons keep their new values where theirs have another shape, as W of a PSN has with another "
            f"T: {_some(other)} ({shapes})"
        )
    if missing:
        fit.neurons.append(f"neurons keep their new values where the file has none: {_some(missing)}")
    fit.kept = {*other, *missing}
    for key in (*dropped, *other):
        del state[key]
