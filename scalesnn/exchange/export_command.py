"""``scalesnn export``: a checkpoint's weights, or the net itself, as one file for other software."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scalesnn.base import UserError
from scalesnn.training.export import export, write_whole

__all__ = ["add_export_command"]

FORMATS = {
    "safetensors": "weights",
    "pt": "weights, as torch.save writes a state dict",
    "nir": "the net for simulators and chips",
    "onnx": "the net for ONNX runtimes",
    "pt2": "the net as a torch.export program, with the fused ops",
}
SUFFIXES = {".pth": "pt", **{f".{name}": name for name in FORMATS}}
Write = Callable[[Path], str]  # writes a file, and says what it holds


def add_export_command(subparsers: Any) -> None:
    """Define ``scalesnn export``."""
    from scalesnn.evaluation.network_arguments import SOURCE, add_network_arguments

    parser: argparse.ArgumentParser = subparsers.add_parser(
        "export",
        help="write a checkpoint's weights, or the net, to one file",
        description="Write " + "; ".join(f"{name}: {what}" for name, what in FORMATS.items()) + ".",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="RUN|FILE", help=SOURCE)
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="where to write")
    parser.add_argument("--format", default=None, choices=tuple(FORMATS), help="default: by FILE's name")
    parser.add_argument(
        "--one-step", action="store_true", help="onnx: one time-step, potentials are inputs and outputs"
    )
    parser.add_argument(
        "--frames", action="store_true", help="onnx, pt2: the input is event frames [N, T, C, H, W]"
    )
    add_network_arguments(parser)
    parser.set_defaults(run=run_export)


def run_export(args: argparse.Namespace) -> int:
    """Do what the command line says; returns the exit code."""
    output = Path(args.output).expanduser()
    kind = args.format or SUFFIXES.get(output.suffix, "safetensors")
    if args.one_step and kind != "onnx":
        raise UserError(f"--one-step is for --format onnx, not {kind}")
    if args.frames and (kind not in ("onnx", "pt2") or args.one_step):
        raise UserError("--frames is for --format onnx and pt2 over all time-steps")
    if args.frames and args.T is None:
        raise UserError("--frames: give --T, the time-steps of the frames, which a checkpoint does not say")
    source_file = Path(args.source).expanduser()
    if kind in ("safetensors", "pt"):
        if source_file.is_file() and source_file.suffix in SUFFIXES:
            raise UserError(f"{args.source} is a file of weights already; --format nir, onnx and pt2 take it")
        folder, count = export(args.source, output, kind=kind, ema=args.ema)
        said, source = f"{count} tensors", str(folder)
    else:
        source, write = writer(kind, args)
        said = write_whole(output, write)
    print(f"{args.output}: {said}, {output.stat().st_size / 1e6:.1f} MB, from {source}")
    return 0


def writer(kind: str, args: argparse.Namespace) -> tuple[str, Write]:
    """What the net is from, and what writes it.

    Raises:
        UserError: see ``open_trained``.
    """
    from scalesnn.evaluation.network_arguments import network_words
    from scalesnn.evaluation.trained import open_trained

    trained = open_trained(args.source, network_words(args), ema=args.ema)
    side, T = trained.args.val_crop_size, trained.args.T
    image = (trained.args.in_channels, side, side)
    about = {"classes": trained.classes, "T": T, "model": trained.args.model, "crop": side}
    about["resize"], about["interpolation"] = trained.args.val_resize_size, trained.args.interpolation

    def write(file: Path) -> str:
        if kind == "nir":
            from scalesnn.exchange.nir_graph import write_nir

            return f"{write_nir(trained.net, image, file)} nodes"
        if kind == "onnx":
            from scalesnn.exchange.onnx_file import write_onnx

            texts = {name: json.dumps(value, ensure_ascii=False) for name, value in about.items()}
            shape = (T, *image) if args.frames else image
            count = write_onnx(trained.net, shape, file, T=None if args.one_step else T, about=texts)
            return f"{count} operators, {'one time-step' if args.one_step else f'T = {T}'}"
        from scalesnn.exchange.exported import write_program

        shape = (T, *image) if args.frames else image
        return f"{write_program(trained.net, shape, file, T=T, about=about)} operators, T = {T}"

    return trained.source, write
