"""torch's layers that know step modes: ``'s'`` takes [N, …], as in torch; ``'m'`` takes a sequence [T, N, …].

The parameters, their names and their initial values are torch's. A sequence is handed to torch as [T × N,
…] without a copy, and keeps its memory format (channels_last included). A sequence that is one image
repeated (an expanded view, see ``functional.repeat_over_time``) is computed once where the layer has no
state of its own over time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scalesnn.layer.convolution import (
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
)
from scalesnn.layer.normalisation import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    GroupNorm,
    convert_sync_batchnorm,
)
from scalesnn.layer.others import (
    Dropout,
    Dropout2d,
    Flatten,
    Identity,
    Linear,
    MultiStepContainer,
    SeqToANNContainer,
    Upsample,
)
from scalesnn.layer.pooling import (
    AdaptiveAvgPool1d,
    AdaptiveAvgPool2d,
    AdaptiveAvgPool3d,
    AvgPool1d,
    AvgPool2d,
    AvgPool3d,
    MaxPool1d,
    MaxPool2d,
    MaxPool3d,
)
from scalesnn.layer.step import is_watched as is_watched
from scalesnn.movers import missing

__all__ = [
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AdaptiveAvgPool3d",
    "AvgPool1d",
    "AvgPool2d",
    "AvgPool3d",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "Dropout",
    "Dropout2d",
    "Flatten",
    "GroupNorm",
    "Identity",
    "Linear",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "MultiStepContainer",
    "SeqToANNContainer",
    "Upsample",
    "convert_sync_batchnorm",
]


if not TYPE_CHECKING:  # for type checkers a name that is not here is an error

    def __getattr__(name: str) -> Any:
        """Say what comes nearest to a name of SpikingJelly's that is not here."""
        raise missing(__name__, name, __all__)
