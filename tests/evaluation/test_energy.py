"""``scalesnn energy`` against nets counted by hand and SpikingJelly's op_counter."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torch import nn
from trained_nets import FLAGS, lively

from scalesnn import functional, layer, neuron
from scalesnn.cli import main
from scalesnn.evaluation.energy import rows_of
from scalesnn.evaluation.energy_costs import COSTS, Row, costs_of, totals_of
from scalesnn.model.spiking_resnet import spiking_resnet18
from scalesnn.parallel import Topology
from scalesnn.parallel.single import SingleStrategy
from scalesnn.tracking.energy import SynapseCounter

T = 3


class Flags:
    gradient_accumulation, clip_grad_norm, sync_bn, on_nan = 1, None, False, "stop"


def measure(net: nn.Module, *batches: torch.Tensor) -> list[Row]:
    """The rows of a net over batches [T, N, …]."""
    functional.set_step_mode(net, "m")
    counter = SynapseCounter(net)
    for x in batches:
        functional.reset_net(net)
        with torch.no_grad(), counter.count():
            net(x)
    return rows_of(counter.layers(), SingleStrategy(Flags(), Topology()))


def test_a_net_counted_by_hand() -> None:
    net = nn.Sequential(
        layer.Conv2d(1, 2, 3, padding=1, bias=False), neuron.IFNode(), layer.Flatten(), layer.Linear(8, 5)
    )
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].weight[0, 0, 1, 1] = 0.5  # the first channel is half the image, the second 0
    image = torch.tensor([[2.0, 1.0], [-1.0, 0.0]]).view(1, 1, 2, 2)
    first, second = measure(net, functional.repeat_over_time(image, T), functional.repeat_over_time(image, T))
    # places with 2 fire at every step, with 1 at the second and, after the reset, not at the third
    assert first == Row("0", "values", 2 * 4 * 9, T, first.rate_T, 0.0, once=True)
    assert second == Row("3", "spikes", 8 * 5, T, (1 / 8, 2 / 8, 1 / 8), 4 * 5, once=False)
    assert first.rate is None
    assert second.rate == pytest.approx(4 / 24)
    assert second.convention == pytest.approx(40 * 3 * 4 / 24)
    totals = totals_of([first, second], COSTS["fp32"])
    assert totals.ann == pytest.approx((72 + 40) * 4.6e-9)
    assert totals.exact_once == pytest.approx((72 * 4.6 + 20 * 0.9) * 1e-9)
    assert totals.exact_T == pytest.approx((3 * 72 * 4.6 + 20 * 0.9) * 1e-9)
    assert totals.convention_once == pytest.approx(totals.exact_once), "a linear layer has no border"
    assert totals.convention_T == pytest.approx(totals.exact_T)


def test_borders_are_where_the_two_ways_of_counting_differ() -> None:
    net = nn.Sequential(nn.Identity(), layer.Conv2d(1, 4, 3, padding=1, bias=False))
    corner, middle = torch.zeros(1, 1, 1, 3, 3), torch.zeros(1, 1, 1, 3, 3)
    corner[..., 0, 0] = middle[..., 1, 1] = 1
    (at_corner,), (at_middle,) = measure(net, corner), measure(net, middle)
    assert (at_corner.synops, at_middle.synops) == (4 * 4, 4 * 9)
    assert at_corner.convention == at_middle.convention == pytest.approx(4 * 9 * 9 / 9)


def test_layers_fed_with_averages_multiply_exactly_and_have_a_rate_by_convention() -> None:
    net = nn.Sequential(layer.Conv2d(1, 1, 1), layer.AvgPool2d(2), layer.Flatten(), layer.Linear(1, 5))
    nn.init.ones_(net[0].weight), nn.init.zeros_(net[0].bias)
    x = torch.tensor([1.0, 0, 0, 0]).view(1, 1, 1, 2, 2)
    row = measure(net, x)[1]
    assert (row.fed, row.synops, row.rate) == ("averages", 0.0, 0.25)
    assert row.exact_pj(COSTS["fp32"]) == 5 * 4.6
    assert row.convention_pj(COSTS["fp32"]) == pytest.approx(5 * 0.25 * 0.9)


def test_synaptic_operations_are_those_of_spikingjelly() -> None:
    op_counter = pytest.importorskip("spikingjelly.activation_based.op_counter")
    torch.manual_seed(0)
    net = lively(spiking_resnet18(num_classes=5, spiking_neuron=neuron.LIFNode)).requires_grad_(False)
    functional.set_backend(net, "torch")  # aten's operators are what the peer counts
    functional.set_step_mode(net, "m")
    x = torch.rand(T, 2, 3, 24, 24)
    peer = op_counter.SynOpCounter()
    with torch.no_grad(), op_counter.DispatchCounterMode([peer]):
        net(x)
    rows = measure(net, x)
    assert sum(row.synops for row in rows) * 2 == pytest.approx(peer.get_total(), rel=1e-9)
    assert peer.get_total() > 1e5


def test_the_command_counts_every_image_and_writes_its_tables(
    weights: Path, images: Path, tmp_path: Path, capsys
) -> None:
    files = {flag: tmp_path / f"table.{flag}" for flag in ("csv", "latex")}
    flags = [f"--{flag}={file}" for flag, file in files.items()]
    assert main(["energy", str(weights), "--data-path", str(images), *FLAGS, *flags, "--T=2"]) == 0
    shown = capsys.readouterr().out
    rows = list(csv.DictReader(files["csv"].open()))
    layers = [row for row in rows if row["fed_with"]]
    assert len(layers) == 21
    assert [row["fed_with"] for row in layers] == ["values", *["spikes"] * 20]
    for row in layers[1:]:
        rates = [float(row[f"rate_t{t}"]) for t in (1, 2)]
        assert float(row["rate"]) == pytest.approx(sum(rates) / 2)
        assert float(row["macs_T_rate"]) == pytest.approx(float(row["macs_per_step"]) * sum(rates))
        assert float(row["exact_pj"]) == pytest.approx(0.9 * float(row["synops"]))
        assert float(row["synops"]) > 0
    sums = {row["layer"]: float(row["exact_pj"]) for row in rows if not row["fed_with"]}
    stem = 4.6 * float(layers[0]["macs_per_step"])
    synops = sum(float(row["exact_pj"]) for row in layers[1:])
    assert sums["ANN: every MAC once (pJ)"] == pytest.approx(
        4.6 * sum(float(r["macs_per_step"]) for r in layers)
    )
    assert sums["SNN, exact, conv1 once (pJ)"] == pytest.approx(stem + synops)
    assert sums["SNN, exact, conv1 T times (pJ)"] == pytest.approx(2 * stem + synops)
    assert "SNN, MACs·T·rate, conv1 T times" in shown
    assert "T = 2, 20 images" in shown
    latex = files["latex"].read_text()
    assert latex.count("\\\\") == 1 + 21 + 5
    assert latex.startswith("\\begin{tabular}")


def test_costs_of_presets_and_of_a_file(tmp_path: Path) -> None:
    assert (costs_of("fp16").mac, costs_of("fp16").ac) == (1.5, 0.4)
    assert (costs_of("int8").mac, costs_of("int8").ac) == (pytest.approx(0.23), 0.03)
    (tmp_path / "own.yaml").write_text("mac: 3.2\nac: 0.1\n")
    own = costs_of(str(tmp_path / "own.yaml"))
    assert (own.name, own.mac, own.ac) == ("own.yaml", 3.2, 0.1)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "expected fp32, fp16, int8, or a YAML file"),
        ("mac: 4.6\n", "expected two lines"),
        ("- 1\n- 2\n", "expected two lines"),
        ("mac: [\n", "expected two lines"),
        ("mac: x\nac: 1\n", "expected two lines"),
        ("mac: -1\nac: 1\n", "mac and ac must be above 0"),
        ("mac: .inf\nac: 1\n", "mac and ac must be above 0"),
    ],
)
def test_bad_costs_are_one_line(
    weights: Path, tmp_path: Path, capsys, content: str | None, said: str
) -> None:
    file = tmp_path / "own.yaml"
    if content:
        file.write_text(content)
    assert main(["energy", str(weights), "--costs", str(file)]) == 2
    error = capsys.readouterr().err.strip()
    assert f"--costs {file}: {said}" in error
    assert "\n" not in error
