"""The module structure of published spiking ResNets, small, in eval mode: what their state dicts are made by.

Written anew from the structure of the authors' public code (see ``scalesnn.model.published``).
"""

import torch
from torch import nn


class OldIF(nn.Module):
    """An IF neuron over [T, N, …]: fires at 1, resets to 0."""

    def forward(self, x):
        v, spikes = 0.0, []
        for x_t in x:
            h = v + x_t
            spikes.append((h >= 1.0).to(x))
            v = h * (1 - spikes[-1])
        return torch.stack(spikes)


class Container(nn.Module):
    """Layers over T and N together, under ``module`` as in SpikingJelly of 2021."""

    def __init__(self, *layers):
        super().__init__()
        self.module = nn.Sequential(*layers)

    def forward(self, x):
        return self.module(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class FlatContainer(nn.Sequential):
    """The same without ``module``, as in later versions."""

    def forward(self, x):
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def conv_bn(wrap, inplanes, planes, size, stride=1):
    conv = nn.Conv2d(inplanes, planes, size, stride, padding=size // 2, bias=False)
    return wrap(conv, nn.BatchNorm2d(planes))


class OldBlock(nn.Module):
    """A block of the SEW authors' code: SEW (``sew``) or plain spiking, basic or bottleneck."""

    def __init__(self, wrap, inplanes, planes, stride, *, sew, bottleneck):
        super().__init__()
        out = planes * 4 if bottleneck else planes
        shapes = [(inplanes, planes, 1, 1), (planes, planes, 3, stride), (planes, out, 1, 1)]
        if not bottleneck:
            shapes = [(inplanes, planes, 3, stride), (planes, planes, 3, 1)]
        self.count = len(shapes)
        for number, shape in enumerate(shapes, start=1):
            self.add_module(f"conv{number}", conv_bn(wrap, *shape))
            self.add_module(f"sn{number}", OldIF())
        self.sew, self.downsample = sew, None
        if stride != 1 or inplanes != out:
            shortcut = conv_bn(wrap, inplanes, out, 1, stride)
            self.downsample = nn.Sequential(shortcut, OldIF()) if sew else shortcut

    def forward(self, x):
        y = x
        for number in range(1, self.count):
            y = getattr(self, f"sn{number}")(getattr(self, f"conv{number}")(y))
        last, fire = getattr(self, f"conv{self.count}"), getattr(self, f"sn{self.count}")
        identity = x if self.downsample is None else self.downsample(x)
        return fire(last(y)) + identity if self.sew else fire(last(y) + identity)


class OldResNet(nn.Module):
    """The SEW authors' nets: they return the mean of the logits over T."""

    def __init__(self, layers, classes, T, *, wrap=Container, sew=True, bottleneck=False):
        super().__init__()
        self.T = T
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1, self.sn1 = nn.BatchNorm2d(64), OldIF()
        self.maxpool = Container(nn.MaxPool2d(3, 2, 1))
        inplanes = 64
        for number, (planes, blocks) in enumerate(zip((64, 128, 256, 512), layers, strict=True), start=1):
            stage = []
            for place in range(blocks):
                stride = 2 if number > 1 and place == 0 else 1
                stage.append(OldBlock(wrap, inplanes, planes, stride, sew=sew, bottleneck=bottleneck))
                inplanes = planes * (4 if bottleneck else 1)
            self.add_module(f"layer{number}", nn.Sequential(*stage))
        self.fc = nn.Linear(inplanes, classes)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).unsqueeze(0).repeat(self.T, 1, 1, 1, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.maxpool(self.sn1(x))))))
        return self.fc(x.mean((-1, -2)).mean(0))


class MemUpdate(nn.Module):
    """The MS authors' neuron: keeps a quarter, fires *above* 0.5, resets to 0."""

    def forward(self, x):
        mem = spike = torch.zeros_like(x[0])
        spikes = []
        for x_t in x:
            mem = mem * 0.25 * (1 - spike) + x_t
            spike = (mem > 0.5).to(x)
            spikes.append(spike)
        return torch.stack(spikes)


class StepConv(nn.Conv2d):
    """A convolution of every time-step."""

    def forward(self, x):
        return torch.stack([super(StepConv, self).forward(x_t) for x_t in x])


class TimeNorm(nn.Module):
    """BatchNorm over time, batch and space; its layer is ``bn``."""

    def __init__(self, channels):
        super().__init__()
        self.bn = nn.BatchNorm3d(channels)

    def forward(self, x):
        return self.bn(x.permute(1, 2, 0, 3, 4)).permute(2, 0, 1, 3, 4)


class MSBlock(nn.Module):
    def __init__(self, inplanes, planes, stride, deep):
        super().__init__()
        self.residual_function = nn.Sequential(
            MemUpdate(),
            StepConv(inplanes, planes, 3, stride, 1, bias=False),
            TimeNorm(planes),
            MemUpdate(),
            StepConv(planes, planes, 3, 1, 1, bias=False),
            TimeNorm(planes),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or inplanes != planes:
            pool = [nn.AvgPool3d((1, 2, 2), (1, 2, 2))] if deep else []
            conv = StepConv(inplanes, planes, 1, 1 if deep else stride, bias=False)
            self.shortcut = nn.Sequential(*pool, conv, TimeNorm(planes))

    def forward(self, x):
        return self.residual_function(x) + self.shortcut(x)


class MSNet(nn.Module):
    """The MS authors' nets; ``deep``: with the stem and shortcuts of the 104-layer net."""

    def __init__(self, layers, classes, T, *, deep=False):
        super().__init__()
        self.T = T
        if deep:
            stem = [StepConv(3, 64, 3, 2, 1), StepConv(64, 64, 3, 1, 1), StepConv(64, 64, 3, 1, 1)]
        else:
            stem = [StepConv(3, 64, 7, 2, 3, bias=False)]
        self.conv1 = nn.Sequential(*stem, TimeNorm(64))
        self.mem_update = MemUpdate()
        inplanes = 64
        for number, (planes, blocks) in enumerate(zip((64, 128, 256, 512), layers, strict=True), start=2):
            stage = [
                MSBlock(inplanes if p == 0 else planes, planes, 2 if p == 0 else 1, deep)
                for p in range(blocks)
            ]
            self.add_module(f"conv{number}_x", nn.Sequential(*stage))
            inplanes = planes
        self.fc = nn.Linear(512, classes)

    def forward(self, x):
        x = self.conv1(x.unsqueeze(0).repeat(self.T, 1, 1, 1, 1))
        x = self.conv5_x(self.conv4_x(self.conv3_x(self.conv2_x(x))))
        return self.fc(self.mem_update(x).mean((-1, -2)).mean(0))


class OldPSN(nn.Module):
    """The PSN authors' neuron: its weights over time are a linear layer's, ``fc``."""

    def __init__(self, T):
        super().__init__()
        self.fc = nn.Linear(T, T)
        nn.init.constant_(self.fc.bias, -1.0)

    def forward(self, x):
        h = self.fc.weight @ x.flatten(1) + self.fc.bias[:, None]
        return (h >= 0).to(x).view(x.shape)


def randomise(net):
    """Random weights under which neurons fire, in float64 and eval mode; returns the net."""
    with torch.no_grad():
        for name, value in [*net.named_parameters(), *net.named_buffers()]:
            if name.endswith("running_var") or (value.dim() == 1 and name.endswith("weight")):
                value.uniform_(0.5, 1.5)
            elif name.endswith("running_mean") or (value.dim() == 1 and ".fc" not in name):
                value.uniform_(-0.2, 0.3)
    return net.double().eval()
