"""Nets whose neurons fire and whose answers differ, without training."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from scalesnn import functional

FLAGS = ["--batch-size=4", "--workers=1", "--device=cpu"]  # of evaluations
SETTINGS = {"T": 2, "neuron": "LIF", "model": "sew_resnet18", "val_resize_size": 24, "val_crop_size": 24}


def lively(net: nn.Module, seed: int = 0) -> nn.Module:
    """Give every BatchNorm statistics and an affine map with which about a fifth of the neurons fire."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                for values, low, high in (
                    (module.running_mean, -0.2, 0.2),
                    (module.running_var, 0.5, 1.5),
                    (module.weight, 1.0, 2.0),
                    (module.bias, 0.0, 0.6),
                ):
                    values.copy_(torch.rand(values.shape, generator=generator) * (high - low) + low)
    return net.eval()


def save_lively(file: Path, net: nn.Module, classes: list[str], **settings: object) -> Path:
    """Write a net as ``scalesnn export`` does."""
    functional.reset_net(net)
    about = {"classes": json.dumps(classes), "settings": json.dumps({**SETTINGS, **settings})}
    tensors = {name: value.contiguous() for name, value in net.state_dict().items()}
    save_file(tensors, file, metadata={"format": "pt", **about})
    return file
