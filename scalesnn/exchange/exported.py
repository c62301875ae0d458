"""``torch.export``: a net with its fused ops as one file, which serves without the net's Python code."""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import scalesnn.layer  # noqa: F401  # with it come the ops that a program calls
from scalesnn.base import UserError
from scalesnn.exchange.stepping import Unrolled, plain_net

__all__ = ["read_program", "write_program"]

ABOUT = "scalesnn.json"


def write_program(
    net: nn.Module, input_shape: tuple[int, ...], file: Path, *, T: int, about: dict[str, Any]
) -> int:
    """Write the net over T time-steps for any number of images; returns the number of operators.

    Args:
        input_shape: of one image, C, H, W; or of one image's event frames, T, C, H, W.
        about: plain values that the file keeps; ``read_program`` gives them back.
    """
    images = torch.zeros(2, *input_shape)
    batch = torch.export.Dim("N")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            Unrolled(plain_net(net, "auto"), T), (images,), dynamic_shapes={"images": {0: batch}}
        )
        torch.export.save(program, file, extra_files={ABOUT: json.dumps(about)})
    return sum(node.op == "call_function" for node in program.graph.nodes)


def read_program(file: Path | str) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
    """Read what ``write_program`` wrote: a function from images [N, C, H, W] to logits [N, K], and ``about``.

    Raises:
        UserError: the file cannot be read, or is another kind of file.
    """
    extra = {ABOUT: ""}
    try:
        if not zipfile.is_zipfile(file):
            raise UserError(f"{file} is not an exported program: scalesnn export RUN -o net.pt2 writes one")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.load(file, extra_files=extra)
        about = json.loads(extra[ABOUT] or "{}")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
    except (RuntimeError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise UserError(f"{file} is not an exported program ({str(error).splitlines()[0]})") from None
    return program.module(), about
