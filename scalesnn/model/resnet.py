"""What the spiking ResNets share: blocks, the net, the nine architectures, torchvision's weights.

Layers carry torchvision's names, so that state dicts are interchangeable. Shapes in step mode 'm' (without T
in 's'): T time-steps, N batch, C channels, H, W, K classes.

He et al. 2016 (ResNet), Xie et al. 2017 (ResNeXt), Zagoruyko and Komodakis 2016 (wide ResNet).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from scalesnn import functional, layer, neuron
from scalesnn.base import UserError
from scalesnn.model.weights import fit_weights, torchvision_weights

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "BasicBlock",
    "Bottleneck",
    "ResNet",
    "conv1x1",
    "conv3x3",
    "load_pretrained",
    "neuron_factory",
]

log = logging.getLogger("scalesnn.model")

MakeNeuron = Callable[[], nn.Module]
MakeNorm = Callable[[int], nn.Module]
STEM_POOLS: dict[str, Callable[..., nn.Module]] = {"max": layer.MaxPool2d, "avg": layer.AvgPool2d}


def conv3x3(inplanes: int, planes: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> layer.Conv2d:
    """3 × 3 convolution that keeps the size at stride 1."""
    return layer.Conv2d(
        inplanes, planes, 3, stride, padding=dilation, dilation=dilation, groups=groups, bias=False
    )


def conv1x1(inplanes: int, planes: int, stride: int = 1) -> layer.Conv2d:
    """1 × 1 convolution."""
    return layer.Conv2d(inplanes, planes, 1, stride, bias=False)


def neuron_factory(spiking_neuron: Callable[..., nn.Module] | None, kwargs: Mapping[str, Any]) -> MakeNeuron:
    """A function that makes one neuron a call, each with its own copy of ``kwargs``; IFNode where None.

    Raises:
        UserError: the neuron does not take the arguments.
    """
    make = neuron.IFNode if spiking_neuron is None else spiking_neuron

    def make_neuron() -> nn.Module:
        try:
            return make(**deepcopy(dict(kwargs)))
        except TypeError as error:
            name = getattr(make, "__name__", repr(make))
            raise UserError(f"{name} does not take the arguments {', '.join(kwargs)}: {error}") from error

    return make_neuron


class _Block(nn.Module):
    """conv → BN → neuron, two or three times; the last with the shortcut.

    Args:
        inplanes: channels of the input.
        planes: the stage's width; the output has ``planes * expansion`` channels.
        stride, groups, base_width, dilation: of the convolutions, as in torchvision.
        downsample: the shortcut's convolution and normalisation; None: the identity.
        norm_layer, make_neuron: make the normalisation layers and the neurons.
    """

    expansion: ClassVar[int]
    conv1: nn.Module
    bn1: nn.Module
    sn1: nn.Module
    conv2: nn.Module
    bn2: nn.Module
    sn2: nn.Module
    downsample: nn.Sequential | None

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int,
        downsample: nn.Sequential | None,
        groups: int,
        base_width: int,
        dilation: int,
        norm_layer: MakeNorm,
        make_neuron: MakeNeuron,
    ) -> None:
        super().__init__()
        convolutions = self.convolutions(inplanes, planes, stride, groups, base_width, dilation)
        for number, conv in enumerate(convolutions, start=1):  # conv1, bn1, sn1, conv2, …
            self.add_module(f"conv{number}", conv)
            self.add_module(f"bn{number}", norm_layer(conv.out_channels))
            self.add_module(f"sn{number}", make_neuron())
        self.downsample = downsample

    def convolutions(
        self, inplanes: int, planes: int, stride: int, groups: int, base_width: int, dilation: int
    ) -> list[layer.Conv2d]:
        """The branch's convolutions, in order."""
        raise NotImplementedError

    def branch(self, x_TNCHW: Tensor, residual_TNCHW: Tensor | None = None) -> Tensor:
        """Spikes of the residual branch; ``residual`` is added before the last neuron."""
        raise NotImplementedError

    def forward(self, x_TNCHW: Tensor) -> Tensor:
        """Spikes of branch + shortcut."""
        return self.branch(x_TNCHW, x_TNCHW if self.downsample is None else self.downsample(x_TNCHW))


class BasicBlock(_Block):
    """Two 3 × 3 convolutions."""

    expansion = 1

    def convolutions(
        self, inplanes: int, planes: int, stride: int, groups: int, base_width: int, dilation: int
    ) -> list[layer.Conv2d]:
        """The branch's convolutions, in order.

        Raises:
            UserError: groups, another width or dilation, which basic blocks do not have.
        """
        if groups != 1 or base_width != 64 or dilation != 1:
            raise UserError(
                "nets of basic blocks (18 and 34 layers) need groups=1, width_per_group=64 and no dilation, "
                f"got groups={groups}, width_per_group={base_width}, dilation={dilation}"
            )
        return [conv3x3(inplanes, planes, stride), conv3x3(planes, planes)]

    def branch(self, x_TNCHW: Tensor, residual_TNCHW: Tensor | None = None) -> Tensor:
        """Spikes of the residual branch; ``residual`` is added before the last neuron."""
        y = self.bn1(self.conv1(x_TNCHW), neuron=self.sn1)
        return self.bn2(self.conv2(y), neuron=self.sn2, residual=residual_TNCHW)


class Bottleneck(_Block):
    """1 × 1, 3 × 3 and 1 × 1 convolutions; the stride is in the middle one, as in torchvision."""

    expansion = 4
    conv3: nn.Module
    bn3: nn.Module
    sn3: nn.Module

    def convolutions(
        self, inplanes: int, planes: int, stride: int, groups: int, base_width: int, dilation: int
    ) -> list[layer.Conv2d]:
        """The branch's convolutions, in order."""
        width = int(planes * (base_width / 64)) * groups
        return [
            conv1x1(inplanes, width),
            conv3x3(width, width, stride, groups, dilation),
            conv1x1(width, planes * self.expansion),
        ]

    def branch(self, x_TNCHW: Tensor, residual_TNCHW: Tensor | None = None) -> Tensor:
        """Spikes of the residual branch; ``residual`` is added before the last neuron."""
        y = self.bn1(self.conv1(x_TNCHW), neuron=self.sn1)
        y = self.bn2(self.conv2(y), neuron=self.sn2)
        return self.bn3(self.conv3(y), neuron=self.sn3, residual=residual_TNCHW)


class ResNet(nn.Module):
    """Stem, four stages of blocks, average pool, classifier.

    Args:
        block: BasicBlock, Bottleneck or a subclass.
        layers: blocks per stage.
        num_classes: K.
        zero_init_residual: start with branches that add nothing (the last BN's weight is 0).
        groups, width_per_group: ResNeXt's and wide ResNet's.
        replace_stride_with_dilation: for the last three stages, whether to dilate instead of to stride.
        norm_layer: makes a normalisation layer of ``scalesnn.layer`` from the number of channels
            (``layer.BatchNorm2d``, ``functools.partial(layer.GroupNorm, 32)``).
        spiking_neuron: a neuron class (IFNode where None); ``neuron_kwargs`` are its arguments. A
            ``step_mode`` among them is set for the whole net.
        in_channels: channels of the images.
        stem_pool: the pooling after the first neuron, ``'max'`` or ``'avg'`` (as in the PSN authors' nets).
        block_options: further arguments of ``block``.

    Input [T, N, C, H, W] in step mode 'm', [N, C, H, W] in 's'; output [T, N, K] or [N, K].
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: MakeNorm | None = None,
        spiking_neuron: Callable[..., nn.Module] | None = None,
        in_channels: int = 3,
        stem_pool: str = "max",
        block_options: Mapping[str, Any] | None = None,
        **neuron_kwargs: Any,
    ) -> None:
        super().__init__()
        dilate = [False] * 3 if replace_stride_with_dilation is None else list(replace_stride_with_dilation)
        if len(dilate) != 3:
            raise UserError(
                f"replace_stride_with_dilation must have 3 elements, got {replace_stride_with_dilation}"
            )
        norm_layer = layer.BatchNorm2d if norm_layer is None else norm_layer
        make_neuron = neuron_factory(spiking_neuron, neuron_kwargs)
        planes_in, dilation = 64, 1

        def stage(planes: int, blocks: int, stride: int, dilated: bool) -> nn.Sequential:
            nonlocal planes_in, dilation
            first_dilation = dilation
            if dilated:
                dilation, stride = dilation * stride, 1
            planes_out, downsample = planes * block.expansion, None
            if stride != 1 or planes_in != planes_out:
                downsample = nn.Sequential(conv1x1(planes_in, planes_out, stride), norm_layer(planes_out))
            common: dict[str, Any] = {
                "groups": groups,
                "base_width": width_per_group,
                "norm_layer": norm_layer,
                "make_neuron": make_neuron,
                **(block_options or {}),
            }
            made = [block(planes_in, planes, stride, downsample, dilation=first_dilation, **common)]
            for _ in range(1, blocks):
                made.append(block(planes_out, planes, 1, None, dilation=dilation, **common))
            planes_in = planes_out
            return nn.Sequential(*made)

        self.conv1 = layer.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = norm_layer(64)
        self.sn1 = make_neuron()
        if stem_pool not in STEM_POOLS:
            raise UserError(f"stem_pool must be one of {', '.join(STEM_POOLS)}, got {stem_pool!r}")
        self.maxpool = STEM_POOLS[stem_pool](kernel_size=3, stride=2, padding=1)
        self.layer1 = stage(64, layers[0], 1, False)
        self.layer2 = stage(128, layers[1], 2, dilate[0])
        self.layer3 = stage(256, layers[2], 2, dilate[1])
        self.layer4 = stage(512, layers[3], 2, dilate[2])
        self.avgpool = layer.AdaptiveAvgPool2d((1, 1))
        self.fc = layer.Linear(512 * block.expansion, num_classes)
        self._initialise(zero_init_residual)
        if "step_mode" in neuron_kwargs:
            functional.set_step_mode(self, neuron_kwargs["step_mode"])

    def _initialise(self, zero_init_residual: bool) -> None:
        """Kaiming convolutions; BN as torch has it (weight 1, bias 0), or weight 0 at the end of a branch."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # drawn in row-major order: the same numbers whatever the weight's format
                values = torch.empty_like(module.weight, memory_format=torch.contiguous_format)
                nn.init.kaiming_normal_(values, mode="fan_out", nonlinearity="relu")
                module.weight.data.copy_(values)
            elif zero_init_residual and isinstance(module, _Block):
                last = "bn3" if isinstance(module, Bottleneck) else "bn2"
                nn.init.zeros_(module.get_parameter(f"{last}.weight"))

    def forward(self, x_TNCHW: Tensor) -> Tensor:
        """Images to logits, [T, N, K]."""
        return self._head(self.layer4(self.layer3(self.layer2(self.layer1(self._stem(x_TNCHW))))))

    def _stem(self, x_TNCHW: Tensor) -> Tensor:
        return self.maxpool(self.bn1(self.conv1(x_TNCHW), neuron=self.sn1))

    def _head(self, spikes_TNCHW: Tensor) -> Tensor:
        return self.fc(self.avgpool(spikes_TNCHW).flatten(-3))


@dataclass(frozen=True)
class Architecture:
    """One of torchvision's nets."""

    bottleneck: bool
    layers: tuple[int, int, int, int]
    groups: int = 1
    width_per_group: int = 64


ARCHITECTURES: dict[str, Architecture] = {
    "resnet18": Architecture(False, (2, 2, 2, 2)),
    "resnet34": Architecture(False, (3, 4, 6, 3)),
    "resnet50": Architecture(True, (3, 4, 6, 3)),
    "resnet101": Architecture(True, (3, 4, 23, 3)),
    "resnet152": Architecture(True, (3, 8, 36, 3)),
    "resnext50_32x4d": Architecture(True, (3, 4, 6, 3), groups=32, width_per_group=4),
    "resnext101_32x8d": Architecture(True, (3, 4, 23, 3), groups=32, width_per_group=8),
    "wide_resnet50_2": Architecture(True, (3, 4, 6, 3), width_per_group=128),
    "wide_resnet101_2": Architecture(True, (3, 4, 23, 3), width_per_group=128),
}


def load_pretrained(model: nn.Module, name: str, progress: bool = True) -> None:
    """Load torchvision's ImageNet weights (version 1) of the ANN ``name``, through torch.hub's cache.

    Parameters of neurons keep their initial values. So do the classifier of a net with another number of
    classes and the first convolution of a net for other channels; the log names them.

    Raises:
        UserError: the file is neither in the cache nor to be had, or damaged, or does not fit the net.
    """
    import torchvision

    version = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
    for notice in fit_weights(model, torchvision_weights(str(version), progress)).ends:
        log.warning("pretrained weights: %s", notice)
