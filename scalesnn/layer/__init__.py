"""torch's layers that know step modes: ``'s'`` takes [N, …], as in torch; ``'m'`` takes a sequence [T, N, …].

The parameters, their names and their initial values are torch's. A sequence is handed to torch as [T × N,
…] without a copy, and keeps its memory format (channels_last included). A sequence that is one image
repeated (an expanded view, see ``functional.repeat_over_time``) is computed once where the layer has no
state of its own over time.
"""

from __future__ import annotations

from scalesnn.layer.convolution import Conv2d
from scalesnn.layer.normalisation import BatchNorm2d, GroupNorm, convert_sync_batchnorm
from scalesnn.layer.normalisation import is_watched as is_watched
from scalesnn.layer.others import Dropout, Flatten, Linear, MultiStepContainer, SeqToANNContainer
from scalesnn.layer.pooling import AdaptiveAvgPool2d, AvgPool2d, MaxPool2d

__all__ = [
    "AdaptiveAvgPool2d",
    "AvgPool2d",
    "BatchNorm2d",
    "Conv2d",
    "Dropout",
    "Flatten",
    "GroupNorm",
    "Linear",
    "MaxPool2d",
    "MultiStepContainer",
    "SeqToANNContainer",
    "convert_sync_batchnorm",
]
