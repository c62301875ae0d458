"""SEW ResNets: residual blocks that combine spikes with spikes element-wise (Fang et al. 2021, NeurIPS).

With A the spikes of a block's branch and S those of its shortcut, the connecting function ``cnf`` is

    ADD   A + S          AND   A S          IAND   (1 - A) S

ADD's outputs are counts (0, 1, 2, …), the others' are spikes. State dicts have torchvision's keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from scalesnn.base import UserError
from scalesnn.kernels import spikes
from scalesnn.model import resnet
from scalesnn.model.resnet import ARCHITECTURES, ResNet, load_pretrained

__all__ = [
    "SEWResNet",
    "sew_function",
    "sew_resnet18",
    "sew_resnet34",
    "sew_resnet50",
    "sew_resnet101",
    "sew_resnet152",
    "sew_resnext50_32x4d",
    "sew_resnext101_32x8d",
    "sew_wide_resnet50_2",
    "sew_wide_resnet101_2",
]

Neuron = Callable[..., nn.Module] | None
CONNECTING_FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ADD": spikes.add,
    "AND": lambda shortcut, branch: shortcut * branch,
    "IAND": lambda shortcut, branch: shortcut * (1.0 - branch),
}


def sew_function(shortcut: Tensor, branch: Tensor, cnf: str) -> Tensor:
    """Combine the spikes of shortcut and branch, elementwise.

    Raises:
        UserError: ``cnf`` is none of ADD, AND and IAND.
    """
    if cnf not in CONNECTING_FUNCTIONS:
        raise UserError(f"cnf must be one of {', '.join(CONNECTING_FUNCTIONS)}, got {cnf!r}")
    return CONNECTING_FUNCTIONS[cnf](shortcut, branch)


class _SEWBlock(resnet._Block):
    """What makes a block a SEW block: the shortcut fires too, and meets the branch after its last neuron."""

    def __init__(self, *args: Any, cnf: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cnf = cnf
        if self.downsample is not None:
            self.downsample_sn = kwargs["make_neuron"]()

    def forward(self, x_TNCHW: Tensor) -> Tensor:
        """Spikes (or counts, with ADD) of shortcut and branch."""
        shortcut = x_TNCHW
        if self.downsample is not None:
            conv, bn = self.downsample
            shortcut = bn(conv(x_TNCHW), neuron=self.downsample_sn)
        return sew_function(shortcut, self.branch(x_TNCHW), self.cnf)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of it."""
        return f"cnf={self.cnf}"


class BasicBlock(_SEWBlock, resnet.BasicBlock):
    """Two 3 × 3 convolutions with an element-wise shortcut."""


class Bottleneck(_SEWBlock, resnet.Bottleneck):
    """1 × 1, 3 × 3 and 1 × 1 convolutions with an element-wise shortcut."""


class SEWResNet(ResNet):
    """A ResNet of SEW blocks.

    Args:
        cnf: the connecting function, ``'ADD'``, ``'AND'`` or ``'IAND'``.
        others: see ``resnet.ResNet``.

    Raises:
        UserError: ``cnf`` is none of the three.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        cnf: str = "ADD",
        **kwargs: Any,
    ) -> None:
        if cnf not in CONNECTING_FUNCTIONS:
            raise UserError(f"cnf must be one of {', '.join(CONNECTING_FUNCTIONS)}, got {cnf!r}")
        super().__init__(block, layers, num_classes, block_options={"cnf": cnf}, **kwargs)


def _make(
    name: str, pretrained: bool, progress: bool, cnf: str, spiking_neuron: Neuron, kwargs: dict[str, Any]
) -> SEWResNet:
    """Build the net of torchvision's ``name``."""
    net = ARCHITECTURES[name]
    settings = {"groups": net.groups, "width_per_group": net.width_per_group, **kwargs}
    block = Bottleneck if net.bottleneck else BasicBlock
    model = SEWResNet(block, net.layers, cnf=cnf, spiking_neuron=spiking_neuron, **settings)
    if pretrained:
        load_pretrained(model, name, progress)
    return model


def sew_resnet18(
    pretrained: bool = False,
    progress: bool = True,
    cnf: str = "ADD",
    spiking_neuron: Neuron = None,
    **kwargs: Any,
) -> SEWResNet:
    """SEW ResNet-18.

    Args:
        pretrained: start from torchvision's ImageNet weights of the ANN.
        progress: show the download.
        cnf: the connecting function, ``'ADD'``, ``'AND'`` or ``'IAND'``.
        spiking_neuron: a neuron class such as ``neuron.IFNode``.
        kwargs: ``ResNet``'s settings (``num_classes``, …); the rest goes to every neuron.
    """
    return _make("resnet18", pretrained, progress, cnf, spiking_neuron, kwargs)


def sew_resnet34(
    pretrained: bool = False,
    progress: bool = True,
    cnf: str = "ADD",
    spiking_neuron: Neuron = None,
    **kwargs: Any,
) -> SEWResNet:
    """SEW ResNet-34; arguments as ``sew_resnet18``."""
    return _make("resnet34", pretrained, progress, cnf, spiking_neuron, kwargs)


def sew_resnet50(
    pretrained: bool = False,
    progress: bool = True,
    cnf: str = "ADD",
    spiking_neuron: Neuron = None,
    **kwargs: Any,
) -> SEWResNet:
    """SEW ResNet-50; arguments as ``sew_resnet18``."""
    return _make("resnet50", pretrained, progress, cnf, spiking_neuron, kwargs)


def sew_resnet101(
    pretrained: bool = False,
    progress: bool = True,
    cnf: str = "ADD",
    spiking_neuron: Neuron = None,
    **kwargs: Any,
) -> SEWResNet:
    """SEW ResNet-101; arguments as ``sew_resnet18``."""
    return _make("resnet101", pretrained, progress, cnf, spiking_neuron, kwargs)


def sew_resnet152(
    pretrained: bool = False,
    progress: bool = True,
    cnf: str = "ADD",
    spiking_neuron: Neuron = None,
    **kwargs: Any,
) -> SEWResNet:
    """SEW ResNet-152; arguments as ``sew_resnet18``."""
    return _make("resnet152", pretrained, progress, cnf, spiking_neuron, kwargs)


def sew_resnext50_32x4d(
    pretrained: bool = False,
    progress: bool = True,
    cnf: str = "ADD",
    spiking_neuron: Neuron = None,
    **kwargs: Any,
) -> SEWResNet:
    """SEW ResNeXt-50 32×4d; arguments as ``sew_resnet18``."""
    return _make("resnext50_32x4d", pretrained, progress, cnf, spiking_neuron, kwargs)


def sew_resnext101_32x8d(
    pretrained: bool = False,
    progress: bool = True,
    cnf: str = "ADD",
    spiking_neuron: Neuron = None,
    **kwargs: Any,
) -> SEWResNet:
    """SEW ResNeXt-101 32×8d; arguments as ``sew_resnet18``."""
    return _make("resnext101_32x8d", pretrained, progress, cnf, spiking_neuron, kwargs)


def sew_wide_resnet50_2(
    pretrained: bool = False,
    progress: bool = True,
    cnf: str = "ADD",
    spiking_neuron: Neuron = None,
    **kwargs: Any,
) -> SEWResNet:
    """SEW Wide ResNet-50-2; arguments as ``sew_resnet18``."""
    return _make("wide_resnet50_2", pretrained, progress, cnf, spiking_neuron, kwargs)


def sew_wide_resnet101_2(
    pretrained: bool = False,
    progress: bool = True,
    cnf: str = "ADD",
    spiking_neuron: Neuron = None,
    **kwargs: Any,
) -> SEWResNet:
    """SEW Wide ResNet-101-2; arguments as ``sew_resnet18``."""
    return _make("wide_resnet101_2", pretrained, progress, cnf, spiking_neuron, kwargs)
