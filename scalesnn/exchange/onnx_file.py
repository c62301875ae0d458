"""ONNX, by torch's exporter: T time-steps in one graph, or one step with potentials as inputs and outputs."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from scalesnn.base import UserError
from scalesnn.exchange.stepping import OneStep, Unrolled, plain_net

__all__ = ["write_onnx"]


def write_onnx(
    net: nn.Module, image_shape: tuple[int, ...], file: Path, *, T: int | None, about: dict[str, str]
) -> int:
    """Write the net, for any number of images N.

    The graph maps ``images`` [N, C, H, W] to ``logits`` [N, K], the mean over T steps; or, for one step,
    (``images``, ``v/NEURON`` …) to (``logits``, ``v_next/NEURON`` …). Before the first step a potential is
    its neuron's v_reset, or 0 with soft reset.

    Args:
        T: time-steps; None for one step.
        about: texts that the file keeps as metadata.

    Returns:
        the number of operators.

    Raises:
        UserError: the exporter cannot translate the net; the line says what it said.
    """
    images = torch.zeros(2, *image_shape)
    network = plain_net(net, "torch")
    wrapped: nn.Module
    inputs: tuple[Tensor, ...]
    if T is not None:
        wrapped, inputs = Unrolled(network, T), (images,)
        names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
        shapes: Any = {"images": {0: "N"}}
    else:
        wrapped = OneStep(network, images)
        inputs = (images, *wrapped.rest)
        names = {
            "input_names": ["images", *(f"v/{name}" for name in wrapped.names)],
            "output_names": ["logits", *(f"v_next/{name}" for name in wrapped.names)],
        }
        shapes = {"images": {0: "N"}, "potentials": tuple({0: "N"} for _ in wrapped.rest)}
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                wrapped, inputs, dynamo=True, dynamic_shapes=shapes, optimize=False, verbose=False, **names
            )
    except torch.onnx.errors.OnnxExporterError as error:
        reasons = [line for line in str(error).splitlines() if line.startswith("<class") and ": " in line]
        reason = reasons[0].split(": ", 1)[1] if reasons else str(error).splitlines()[0]
        raise UserError(f"--format onnx: torch's exporter cannot translate the net: {reason}") from None
    assert program is not None
    model = program.model_proto
    onnx.helper.set_model_props(model, about)
    onnx.save(model, file)
    return len(model.graph.node)
