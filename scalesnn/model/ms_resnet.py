"""MS-ResNets: membrane shortcuts, the neurons before the convolutions (Hu, Deng, Wu, Yao, Li 2021/2024).

A block adds currents, not spikes: x + BN(conv(neuron(BN(conv(neuron(x)))))). The shortcut is an identity
at any depth, and every convolution takes spikes. BatchNorm's weight starts at the threshold 0.5, and at 0
at the end of a branch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from scalesnn import functional, layer, neuron, surrogate
from scalesnn.base import UserError
from scalesnn.model.resnet import MakeNeuron, MakeNorm, conv1x1, conv3x3, neuron_factory

__all__ = ["MSBlock", "MSResNet", "ms_resnet18", "ms_resnet34", "ms_resnet104"]

THRESHOLD = 0.5


def _default_neuron_arguments() -> dict[str, Any]:
    """The paper's neuron: a quarter of the potential stays per step; it fires at 0.5 and resets to 0."""
    return {
        "tau": 4 / 3,
        "decay_input": False,
        "v_threshold": THRESHOLD,
        "detach_reset": True,
        "surrogate_function": surrogate.Rect(alpha=1.0),
    }


class MSBlock(nn.Module):
    """neuron → 3 × 3 conv → BN, twice, plus the shortcut."""

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int,
        downsample: nn.Sequential | None,
        norm_layer: MakeNorm,
        make_neuron: MakeNeuron,
    ) -> None:
        super().__init__()
        self.sn1 = make_neuron()
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.sn2 = make_neuron()
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample

    def forward(self, x_TNCHW: Tensor) -> Tensor:
        """Currents to currents."""
        shortcut = x_TNCHW if self.downsample is None else self.downsample(x_TNCHW)
        spikes = self.bn1(self.conv1(self.sn1(x_TNCHW)), neuron=self.sn2)
        return self.bn2(self.conv2(spikes), residual=shortcut)


class MSResNet(nn.Module):
    """Stem, four stages of MS blocks (each begins with stride 2), a last neuron, average pool, classifier.

    Args:
        layers: blocks per stage.
        num_classes: K.
        deep_stem: as in the 104-layer net: three 3 × 3 convolutions for one of 7 × 7, and average pooling
            before the convolutions of the shortcuts.
        dropout: before the classifier.
        in_channels: channels of the images.
        norm_layer: as for ``resnet.ResNet``.
        spiking_neuron: a neuron class. Where None: LIFNode with the paper's values (tau 4/3, no input decay,
            threshold 0.5, reset detached, ``Rect(alpha=1)``), of which ``neuron_kwargs`` may change any.

    Input [T, N, C, H, W] in step mode 'm', [N, C, H, W] in 's'; output [T, N, K] or [N, K].
    """

    def __init__(
        self,
        layers: Sequence[int] = (2, 2, 2, 2),
        num_classes: int = 1000,
        deep_stem: bool = False,
        dropout: float = 0.0,
        in_channels: int = 3,
        norm_layer: MakeNorm | None = None,
        spiking_neuron: Callable[..., nn.Module] | None = None,
        **neuron_kwargs: Any,
    ) -> None:
        super().__init__()
        norm_layer = layer.BatchNorm2d if norm_layer is None else norm_layer
        if spiking_neuron is None:
            make_neuron = neuron_factory(neuron.LIFNode, {**_default_neuron_arguments(), **neuron_kwargs})
        else:
            make_neuron = neuron_factory(spiking_neuron, neuron_kwargs)
        self.conv1: nn.Module
        if deep_stem:  # the original's convolutions have biases here
            self.conv1 = nn.Sequential(
                layer.Conv2d(in_channels, 64, 3, stride=2, padding=1),
                layer.Conv2d(64, 64, 3, padding=1),
                layer.Conv2d(64, 64, 3, padding=1),
            )
        else:
            self.conv1 = layer.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm_layer(64)
        inplanes, stages = 64, []
        for planes, blocks in zip((64, 128, 256, 512), layers, strict=True):
            pool = [layer.AvgPool2d(2)] if deep_stem else []
            shortcut = nn.Sequential(
                *pool, conv1x1(inplanes, planes, 1 if deep_stem else 2), norm_layer(planes)
            )
            stage = [MSBlock(inplanes, planes, 2, shortcut, norm_layer, make_neuron)]
            stage += [MSBlock(planes, planes, 1, None, norm_layer, make_neuron) for _ in range(1, blocks)]
            stages.append(nn.Sequential(*stage))
            inplanes = planes
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.sn = make_neuron()
        self.avgpool = layer.AdaptiveAvgPool2d((1, 1))
        self.dropout = layer.Dropout(dropout) if dropout else nn.Identity()
        self.fc = layer.Linear(512, num_classes)
        for name, module in self.named_modules():
            if isinstance(module, nn.BatchNorm2d | nn.GroupNorm) and module.affine:
                nn.init.constant_(module.weight, 0.0 if name.endswith("bn2") else THRESHOLD)
        if "step_mode" in neuron_kwargs:
            functional.set_step_mode(self, neuron_kwargs["step_mode"])

    def forward(self, x_TNCHW: Tensor) -> Tensor:
        """Images to logits, [T, N, K]."""
        x = self.bn1(self.conv1(x_TNCHW))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.dropout(self.avgpool(self.sn(x)).flatten(-3)))


def _make(
    pretrained: bool, name: str, spiking_neuron: Callable[..., nn.Module] | None, kwargs: Any
) -> MSResNet:
    if pretrained:
        raise UserError(f"there are no pretrained weights for {name}: leave pretrained=False")
    return MSResNet(spiking_neuron=spiking_neuron, **kwargs)


def ms_resnet18(
    pretrained: bool = False,
    progress: bool = True,
    spiking_neuron: Callable[..., nn.Module] | None = None,
    **kwargs: Any,
) -> MSResNet:
    """MS-ResNet-18.

    Args:
        pretrained: an error when True: there are no weights.
        progress: unused, there for one signature over all models.
        spiking_neuron: a neuron class; where None, LIFNode with the paper's values.
        kwargs: ``MSResNet``'s settings (``num_classes``, …); the rest goes to every neuron.
    """
    return _make(pretrained, "ms_resnet18", spiking_neuron, kwargs)


def ms_resnet34(
    pretrained: bool = False,
    progress: bool = True,
    spiking_neuron: Callable[..., nn.Module] | None = None,
    **kwargs: Any,
) -> MSResNet:
    """MS-ResNet-34; arguments as ``ms_resnet18``."""
    return _make(pretrained, "ms_resnet34", spiking_neuron, {"layers": (3, 4, 6, 3), **kwargs})


def ms_resnet104(
    pretrained: bool = False,
    progress: bool = True,
    spiking_neuron: Callable[..., nn.Module] | None = None,
    **kwargs: Any,
) -> MSResNet:
    """MS-ResNet-104, with its deep stem and dropout 0.2; arguments as ``ms_resnet18``."""
    settings = {"layers": (3, 8, 32, 8), "deep_stem": True, "dropout": 0.2, **kwargs}
    return _make(pretrained, "ms_resnet104", spiking_neuron, settings)
