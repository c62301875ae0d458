"""Spiking ResNets: torchvision's nine nets and state-dict keys, with spiking neurons for ReLUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from scalesnn.model.resnet import ARCHITECTURES, BasicBlock, Bottleneck, ResNet, load_pretrained

__all__ = [
    "SpikingResNet",
    "spiking_resnet18",
    "spiking_resnet34",
    "spiking_resnet50",
    "spiking_resnet101",
    "spiking_resnet152",
    "spiking_resnext50_32x4d",
    "spiking_resnext101_32x8d",
    "spiking_wide_resnet50_2",
    "spiking_wide_resnet101_2",
]

Neuron = Callable[..., nn.Module] | None


class SpikingResNet(ResNet):
    """A ResNet whose blocks end with a neuron on branch + shortcut. Arguments: see ``resnet.ResNet``."""


def _make(
    name: str, pretrained: bool, progress: bool, spiking_neuron: Neuron, kwargs: dict[str, Any]
) -> SpikingResNet:
    """Build the net of torchvision's ``name``."""
    net = ARCHITECTURES[name]
    settings = {"groups": net.groups, "width_per_group": net.width_per_group, **kwargs}
    block = Bottleneck if net.bottleneck else BasicBlock
    model = SpikingResNet(block, net.layers, spiking_neuron=spiking_neuron, **settings)
    if pretrained:
        load_pretrained(model, name, progress)
    return model


def spiking_resnet18(
    pretrained: bool = False, progress: bool = True, spiking_neuron: Neuron = None, **kwargs: Any
) -> SpikingResNet:
    """Spiking ResNet-18.

    Args:
        pretrained: start from torchvision's ImageNet weights of the ANN.
        progress: show the download.
        spiking_neuron: a neuron class such as ``neuron.IFNode``.
        kwargs: ``ResNet``'s settings (``num_classes``, …); the rest goes to every neuron.
    """
    return _make("resnet18", pretrained, progress, spiking_neuron, kwargs)


def spiking_resnet34(
    pretrained: bool = False, progress: bool = True, spiking_neuron: Neuron = None, **kwargs: Any
) -> SpikingResNet:
    """Spiking ResNet-34; arguments as ``spiking_resnet18``."""
    return _make("resnet34", pretrained, progress, spiking_neuron, kwargs)


def spiking_resnet50(
    pretrained: bool = False, progress: bool = True, spiking_neuron: Neuron = None, **kwargs: Any
) -> SpikingResNet:
    """Spiking ResNet-50; arguments as ``spiking_resnet18``."""
    return _make("resnet50", pretrained, progress, spiking_neuron, kwargs)


def spiking_resnet101(
    pretrained: bool = False, progress: bool = True, spiking_neuron: Neuron = None, **kwargs: Any
) -> SpikingResNet:
    """Spiking ResNet-101; arguments as ``spiking_resnet18``."""
    return _make("resnet101", pretrained, progress, spiking_neuron, kwargs)


def spiking_resnet152(
    pretrained: bool = False, progress: bool = True, spiking_neuron: Neuron = None, **kwargs: Any
) -> SpikingResNet:
    """Spiking ResNet-152; arguments as ``spiking_resnet18``."""
    return _make("resnet152", pretrained, progress, spiking_neuron, kwargs)


def spiking_resnext50_32x4d(
    pretrained: bool = False, progress: bool = True, spiking_neuron: Neuron = None, **kwargs: Any
) -> SpikingResNet:
    """Spiking ResNeXt-50 32×4d; arguments as ``spiking_resnet18``."""
    return _make("resnext50_32x4d", pretrained, progress, spiking_neuron, kwargs)


def spiking_resnext101_32x8d(
    pretrained: bool = False, progress: bool = True, spiking_neuron: Neuron = None, **kwargs: Any
) -> SpikingResNet:
    """Spiking ResNeXt-101 32×8d; arguments as ``spiking_resnet18``."""
    return _make("resnext101_32x8d", pretrained, progress, spiking_neuron, kwargs)


def spiking_wide_resnet50_2(
    pretrained: bool = False, progress: bool = True, spiking_neuron: Neuron = None, **kwargs: Any
) -> SpikingResNet:
    """Spiking Wide ResNet-50-2; arguments as ``spiking_resnet18``."""
    return _make("wide_resnet50_2", pretrained, progress, spiking_neuron, kwargs)


def spiking_wide_resnet101_2(
    pretrained: bool = False, progress: bool = True, spiking_neuron: Neuron = None, **kwargs: Any
) -> SpikingResNet:
    """Spiking Wide ResNet-101-2; arguments as ``spiking_resnet18``."""
    return _make("wide_resnet101_2", pretrained, progress, spiking_neuron, kwargs)
