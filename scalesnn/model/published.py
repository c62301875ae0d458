"""The keys of published spiking ResNets, and what they are here.

sew           Fang et al. 2021, github.com/fangwei123456/Spike-Element-Wise-ResNet, plain spiking nets too;
              a convolution and its BatchNorm stand in a container: conv1.module.0, conv1.module.1
ms            Hu et al. 2021, github.com/Ariande1/MS-ResNet: conv2_x.0.residual_function.1, shortcut.1.bn
psn           Fang et al. 2023, github.com/fangwei123456/Parallel-Spiking-Neuron: torchvision's keys, neurons
              with sn1.fc, an average pool in the stem, and perhaps an offset of the images, pe
spikingjelly  spikingjelly.activation_based.model: torchvision's keys; its MS-ResNets have stem.0, stem.1
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

__all__ = ["FORMATS", "Published", "recognise", "rename"]

SOURCES = {
    "sew": "the SEW-ResNet authors' code",
    "ms": "the MS-ResNet authors' code",
    "psn": "the PSN authors' code",
    "spikingjelly": "SpikingJelly, whose keys are torchvision's",
}
FORMATS = tuple(SOURCES)
MARKS = {  # of keys that only this format has, in the order in which they are looked for
    "ms": re.compile(r"conv[2-5]_x\.\d+\.residual_function\."),
    "psn": re.compile(r"(^|\.)(sn\d*|downsample_sn)\.fc\.(weight|bias)$"),
    "sew": re.compile(r"layer\d\.\d+\.conv\d\.(module\.)?[01]\."),
    "spikingjelly": re.compile(r"layer\d\.\d+\.conv\d\.weight$"),
}
CONTAINER = r"(?:module\.)?"
RULES: dict[str, list[tuple[str, str]]] = {
    "sew": [
        (rf"^((?:layer\d\.\d+\.)?)conv(\d)\.{CONTAINER}0\.(\w+)$", r"\1conv\2.\3"),
        (rf"^((?:layer\d\.\d+\.)?)conv(\d)\.{CONTAINER}1\.(\w+)$", r"\1bn\2.\3"),
        (rf"\.downsample\.0\.{CONTAINER}([01])\.(\w+)$", r".downsample.\1.\2"),
        (r"\.downsample\.module\.([01])\.(\w+)$", r".downsample.\1.\2"),
        (r"\.downsample\.1\.(w)$", r".downsample_sn.\1"),  # of a PLIF: there the neuron closes the container
        (r"^fc\.module\.", "fc."),
    ],
    "ms": [
        (r"^conv1\.(\d)\.bn\.", "bn1."),
        (r"^conv([2-5])_x\.(\d+)\.residual_function\.1\.", r"conv\1_x.\2.conv1."),
        (r"^conv([2-5])_x\.(\d+)\.residual_function\.4\.", r"conv\1_x.\2.conv2."),
        (r"^conv([2-5])_x\.(\d+)\.residual_function\.2\.bn\.", r"conv\1_x.\2.bn1."),
        (r"^conv([2-5])_x\.(\d+)\.residual_function\.5\.bn\.", r"conv\1_x.\2.bn2."),
        (r"\.shortcut\.(\d)\.(?:bn\.)?", r".downsample.\1."),
        *((rf"^conv{number + 1}_x\.", f"layer{number}.") for number in range(1, 5)),
    ],
    "psn": [(r"((?:^|\.)(?:sn\d*|downsample_sn))\.fc\.(weight|bias)$", r"\1.\2")],
    "spikingjelly": [(r"^stem\.0\.", "conv1."), (r"^stem\.1\.", "bn1."), (r"^head\.", "fc.")],
}


@dataclass
class Published:
    """Tensors under the keys of scalesnn's nets.

    Attributes:
        kind: one of ``FORMATS``.
        family: ``sew``, ``spiking`` or ``ms``; '' where the keys do not tell.
        tensors: by their new keys.
        dropped: keys that no network of scalesnn has a place for.
        neurons: ``PLIF`` or ``PSN`` where neurons have parameters, else ''.
    """

    kind: str
    family: str
    tensors: dict[str, Tensor]
    dropped: list[str]
    neurons: str

    @property
    def source(self) -> str:
        """Whose keys they were."""
        return SOURCES[self.kind]


def recognise(keys: Iterable[str]) -> str | None:
    """The format that has such keys; None if none has."""
    keys = list(keys)
    return next((kind for kind, mark in MARKS.items() if any(mark.search(key) for key in keys)), None)


def rename(tensors: Mapping[str, Tensor], kind: str) -> Published:
    """Give the tensors of a published net, of which DDP's prefixes are off, the keys of scalesnn's.

    Args:
        kind: their format, one of ``FORMATS``.
    """
    found: dict[str, Tensor] = {}
    dropped = []
    for key, value in tensors.items():
        if "surrogate_function." in key or key == "n_averaged":
            dropped.append(key)
            continue
        new = key
        for pattern, replacement in RULES[kind]:
            new = re.sub(pattern, replacement, new)
        if kind == "ms" and "conv1.1.weight" not in tensors:  # 18 and 34 layers: one convolution in the stem
            new = re.sub(r"^conv1\.0\.", "conv1.", new)
        if kind == "psn" and re.search(r"sn\d*\.bias$", new):
            value = value.view(-1, 1)  # a threshold for each step, as SpikingJelly's PSN keeps it
        found[new] = value
    return Published(kind, family_of(tensors, kind), found, dropped, neurons_of(found))


def family_of(tensors: Iterable[str], kind: str) -> str:
    """``sew``, ``spiking`` or ``ms``, as far as keys tell."""
    keys = list(tensors)
    if kind in ("ms", "psn"):
        return {"ms": "ms", "psn": "sew"}[kind]
    if any("downsample_sn." in key or re.search(r"downsample\.0\.(module\.)?0\.", key) for key in keys):
        return "sew"
    if kind == "spikingjelly":
        return "ms" if any(key.startswith("stem.") for key in keys) else ""
    return "spiking" if any("downsample." in key for key in keys) else ""


def neurons_of(tensors: Mapping[str, Tensor]) -> str:
    """The kind of neurons whose parameters are there."""
    for key in tensors:
        if found := re.search(r"sn\d*\.(w|weight)$", key):
            return {"w": "PLIF", "weight": "PSN"}[found[1]]
    return ""
