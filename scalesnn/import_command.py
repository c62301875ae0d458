"""``scalesnn import``: published weights (SEW, MS, PSN, SpikingJelly) as one safetensors file for a net of
scalesnn."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from scalesnn import neuron
from scalesnn.base import UserError
from scalesnn.model.published import FORMATS, Published, recognise, rename
from scalesnn.model.train_imagenet_example import model_makers
from scalesnn.model.weights import Weights, misfits, read_weights_file, without_prefixes
from scalesnn.training.arguments import option
from scalesnn.training.export import write_whole
from scalesnn.training.hook_checks import check_name

__all__ = ["add_import_command", "import_weights"]

SAME_NEXT = 0.5 + 2.0**-24  # the float32 after 0.5


def add_import_command(subparsers: Any) -> None:
    """Define ``scalesnn import``."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "import", help="published weights to one file for --init-from", description=__doc__
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="what the authors published")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="where to write")
    parser.add_argument(
        "--model", required=True, metavar="NAME", help="the net: sew_resnet34, ms_resnet18, …"
    )
    parser.add_argument(
        "--from",
        dest="kind",
        default="auto",
        choices=("auto", *FORMATS),
        help="whose keys (auto: by the keys)",
    )
    parser.set_defaults(run=run_import)


def run_import(args: argparse.Namespace) -> int:
    """Do what the command line says; returns the exit code."""
    check_name("--model", args.model, list(model_makers()))
    for line in import_weights(args.file, args.output, args.model, args.kind):
        print(line)
    return 0


def import_weights(file: Path, output: Path, model: str, kind: str = "auto") -> list[str]:
    """Write published weights under the keys of the net ``model``; nothing is written unless all fits.

    Args:
        file: a state dict, plain or wrapped (see ``read_weights_file``).
        output: a safetensors file; its metadata hold the settings of the net, as an export's do.
        kind: whose keys, one of ``FORMATS``, or ``auto``.

    Returns:
        lines for the user: what was recognised, what was left out, how the nets differ.

    Raises:
        UserError: the keys are nobody's, or not of this net; or the neurons are ones that are not here.
    """
    weights = read_weights_file(file)
    tensors = {without_prefixes(key): value for key, value in weights.tensors.items()}
    found = recognise(tensors) if kind == "auto" else kind
    if found is None:
        some = ", ".join(list(tensors)[:3])
        raise UserError(f"{file}: the keys ({some}, …) are those of none of {', '.join(FORMATS)}")
    published = rename(tensors, found)
    check_family(file, model, published)
    net = fitting_net(file, model, published)
    settings = settings_of(model, weights, published)
    write(output, published, settings)
    classes = net.get_parameter("fc.weight").shape[0]
    size = output.stat().st_size / 1e6
    lines = [f"{file}: recognised as weights of {published.source}", *weights.notices]
    if published.dropped:
        lines.append(f"left out: {', '.join(published.dropped)}")
    lines.append(f"{output}: {len(published.tensors)} tensors, {size:.1f} MB, {model} for {classes} classes")
    lines += [f"note: {difference}" for difference in differences(published, weights, settings)]
    flags = " ".join(f"{option(key)} {value}" for key, value in settings.items() if value is not None)
    return [*lines, f"next: launch/train.py {flags} --init-from {output} …"]


def check_family(file: Path, model: str, published: Published) -> None:
    """Refuse a net in which the weights would fit, but compute something else.

    Raises:
        UserError: the keys tell of another family; or of neurons that are not here.
    """
    family = model.partition("_")[0]
    if published.family and published.family != family:
        raise UserError(
            f"--model {model}: {file} holds a net of the {published.family} kind ({published.source}); "
            f"give {published.family}_{model.partition('_')[2]} or another of its kind"
        )
    if published.neurons == "PSN":
        weight = next(value for key, value in published.tensors.items() if re.search(r"sn\d*\.weight$", key))
        steps = weight.shape[-1] if weight.dim() else 1
        offset = ", and a learned offset of the images, pe," if "pe" in published.tensors else ""
        raise UserError(
            f"{file} holds PSN neurons (T = {steps}){offset} which scalesnn does not have yet: nothing "
            "is written"
        )


def fitting_net(file: Path, model: str, published: Published) -> nn.Module:
    """The net without storage, for as many classes and channels as the weights are for.

    Raises:
        UserError: the weights do not fit it; names the first three keys of each kind.
    """
    tensors = published.tensors
    stem, head = tensors.get("conv1.weight", tensors.get("conv1.0.weight")), tensors.get("fc.weight")
    if stem is None or stem.dim() != 4 or head is None or head.dim() != 2:
        raise UserError(f"{file}: it lacks the first convolution or the classifier, so it is not a {model}")
    settings: dict[str, Any] = {"num_classes": len(head), "in_channels": stem.shape[1]}
    if published.neurons == "PLIF":
        settings["spiking_neuron"] = neuron.ParametricLIFNode

    def made(name: str) -> nn.Module:
        with torch.device("meta"):
            return model_makers()[name](**settings)

    if wrong := misfits(made(model).state_dict(), tensors):
        kin = [name for name in model_makers() if name.startswith(model.partition("_")[0])]
        fits = next((name for name in kin if not misfits(made(name).state_dict(), tensors)), None)
        raise UserError(f"{file} does not fit {model}: {f'it is a {fits}; ' if fits else ''}{wrong}")
    return made(model)


def settings_of(model: str, weights: Weights, published: Published) -> dict[str, Any]:
    """The flags that make the net, as far as the file tells them."""
    settings: dict[str, Any] = {"model": model}
    if isinstance(weights.settings.get("T"), int):
        settings["T"] = weights.settings["T"]
    elif published.kind == "ms":
        settings["T"] = 6
    if published.neurons:
        settings["neuron"] = published.neurons
    elif published.kind == "sew":
        settings["neuron"] = "IF"
    connecting = str(weights.settings.get("connect_f") or weights.settings.get("cnf") or "").upper()
    if published.family == "sew" and connecting in ("ADD", "AND", "IAND"):
        settings["cnf"] = connecting
    return settings


def differences(published: Published, weights: Weights, settings: dict[str, Any]) -> list[str]:
    """How the authors' net and ours differ, and what the weights do not tell."""
    lines = []
    if published.family == "sew" and "cnf" not in settings:
        lines.append(
            "the connecting function is not in the file: give --cnf as it was trained (ADD if not given)"
        )
    if not published.family:
        lines.append(
            "the keys do not tell a SEW net from a plain spiking one: --model must name the one it was"
        )
    if published.kind == "spikingjelly" and not published.neurons:
        lines.append("the kind of neuron is not in the file: give --neuron, --tau as it was trained")
    if published.kind == "ms":
        lines.append(
            "the authors' neurons fire at h > 0.5, ours at h >= 0.5: they differ where a charge is 0.5 "
            f"exactly (ms_resnet…(v_threshold={SAME_NEXT!r}), the next float32, fires as theirs)"
        )
    if published.kind in ("sew", "ms"):
        lines.append("the authors' net returns the mean over T of its logits, ours those of every time-step")
    return lines


def write(output: Path, published: Published, settings: dict[str, Any]) -> None:
    """Write the file; it is replaced only when the new one is complete.

    Raises:
        UserError: it cannot be written.
    """
    about = {
        "format": "pt",
        "classes": "[]",
        "settings": json.dumps(settings),
        "imported_from": published.kind,
    }
    plain = {k: v.clone(memory_format=torch.contiguous_format) for k, v in published.tensors.items()}
    write_whole(output, lambda file: save_file(plain, file, metadata=about))
