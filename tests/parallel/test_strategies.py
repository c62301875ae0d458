"""Every strategy trains the same network: traces, averaged weights, accumulation, clipping, resuming."""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

ZERO = ("zero0", "zero1", "zero2", "zero3")
SPLIT = ("ddp", "zero2", "zero3", "fsdp")


def assert_same_trace(found: list[float], expected: list[float], relative: float) -> None:
    assert len(found) == len(expected) > 0
    assert found == pytest.approx(expected, rel=relative)


def assert_same_weights(
    found: dict[str, list[float]], expected: dict[str, list[float]], relative: float
) -> None:
    assert list(found) == list(expected)
    for name, numbers in expected.items():
        assert found[name] == pytest.approx(numbers, rel=relative, abs=relative), name


@pytest.mark.parametrize("name", ["ddp", "fsdp", "hsdp"])
def test_trace_is_that_of_one_process_with_the_whole_batch(runs: dict[str, Any], name: str) -> None:
    # In float64, where the order of sums cannot tip a neuron over its threshold.
    found, single = runs[f"{name} float64"], runs["single float64"]
    assert len(found["losses"]) == 20
    assert_same_trace(found["losses"], single["losses"], 1e-12)
    assert_same_weights(found["weights"], single["weights"], 1e-10)
    assert_same_weights(found["ema"], single["ema"], 1e-10)


def test_float32_trace_on_two_ranks_is_that_of_one_process(runs: dict[str, Any]) -> None:
    assert len(runs["ddp"]["losses"]) == 20
    assert_same_trace(runs["ddp"]["losses"], runs["single float32"]["losses"], 1e-6)


@pytest.mark.parametrize("name", ["single float32", "ddp", *ZERO, "fsdp", "hsdp float64"])
def test_plain_images_are_trained_on_in_channels_last(runs: dict[str, Any], name: str) -> None:
    # FSDP2's shards and ZeRO's flat buffers give weights in row-major order.
    formats = runs[name]["formats"]
    assert len(formats) == 5
    assert [module for module, last in formats.items() if not last] == []


def test_batchnorm_of_torch_is_synchronised_too(runs: dict[str, Any]) -> None:
    found, single = runs["ddp torch"], runs["single torch"]
    assert_same_trace(found["losses"], single["losses"], 1e-12)
    assert_same_weights(found["weights"], single["weights"], 1e-10)


@pytest.mark.parametrize("name", SPLIT)
def test_settings_that_changed_are_obeyed_after_a_resume(runs: dict[str, Any], name: str) -> None:
    """lr, weight decay and momentum of the new command line; the cosine goes on at the checkpoint's epoch."""
    found = runs[f"{name} with other settings"]
    assert [group["weight_decay"] for group in found["options"]] == [0.05, 0.0]
    assert [group["momentum"] for group in found["options"]] == [0.5, 0.5]
    assert found["lr"] == pytest.approx(0.02 * (1 + math.cos(3 * math.pi / 5)) / 2)
    assert found["losses"] != pytest.approx(runs[name]["losses"][10:15], rel=1e-4)
    assert_same_trace(found["losses"], runs["ddp with other settings"]["losses"], 1e-5)


@pytest.mark.parametrize("name", [*ZERO, "fsdp"])
def test_trace_is_that_of_ddp(runs: dict[str, Any], name: str) -> None:
    found, ddp = runs[name], runs["ddp"]
    assert len(found["losses"]) == 20
    assert_same_trace(found["losses"], ddp["losses"], 1e-6)
    assert_same_weights(found["weights"], ddp["weights"], 1e-6)


@pytest.mark.parametrize("name", [*ZERO, "fsdp"])
def test_averaged_weights_and_their_output_are_those_of_ddp(runs: dict[str, Any], name: str) -> None:
    found, ddp = runs[name], runs["ddp"]
    assert_same_weights(found["ema"], ddp["ema"], 1e-6)
    assert found["ema_output"] == pytest.approx(ddp["ema_output"], rel=1e-5)
    assert found["ema"] != found["weights"]


def test_float64_and_float32_differ_so_the_comparison_can_fail(runs: dict[str, Any]) -> None:
    assert runs["ddp"]["losses"] != runs["ddp float64"]["losses"]


def test_two_batches_of_4_equal_one_of_8(runs: dict[str, Any]) -> None:
    found, whole = runs["2 × batch 4"], runs["batch 8"]
    assert len(found["losses"]) == 20
    assert_same_trace(found["losses"], whole["losses"], 1e-12)
    assert_same_weights(found["weights"], whole["weights"], 1e-10)


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        *((name, "single float32") for name in ("ddp", *ZERO, "fsdp")),
        *((f"{name} float64", "single float64") for name in ("ddp", "fsdp", "hsdp")),
        *((f"{name} accumulated", "single group") for name in SPLIT),
        ("fsdp offload", "fsdp clipped"),
    ],
)
def test_gradient_norm_of_every_layer_is_that_of_one_process(
    runs: dict[str, Any], name: str, reference: str
) -> None:
    found, single = runs[name]["layer_norms"], runs[reference]["layer_norms"]
    assert list(found) == list(single)
    assert len(found) == 6
    assert min(single.values()) > 0
    assert found == pytest.approx(single, rel=1e-10 if "float64" in name else 1e-4)


def test_offload_to_host_memory_changes_nothing(runs: dict[str, Any]) -> None:
    found, plain, again = runs["fsdp offload"], runs["fsdp clipped"], runs["fsdp offload again"]
    assert_same_trace(found["losses"], plain["losses"], 1e-6)
    assert_same_weights(found["weights"], plain["weights"], 1e-6)
    assert_same_weights(found["ema"], plain["ema"], 1e-6)
    assert_same_trace(again["losses"], found["losses"][3:], 1e-6)


@pytest.mark.parametrize("name", SPLIT)
def test_accumulated_batches_equal_one_large_batch(runs: dict[str, Any], name: str) -> None:
    found = runs[f"{name} accumulated"]
    assert len(found["losses"]) == 20
    assert_same_trace(found["losses"], runs["single group"]["losses"], 1e-6)


def test_static_graph_changes_nothing(runs: dict[str, Any]) -> None:
    assert runs["ddp static graph"]["losses"] == runs["ddp accumulated"]["losses"][:6]


def test_bf16_gradients_are_rounded_but_close(runs: dict[str, Any]) -> None:
    found, exact = runs["ddp bf16 gradients"]["losses"], runs["ddp"]["losses"][:6]
    assert found[1:] != exact[1:]
    assert found == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("name", SPLIT)
def test_clipping_is_the_same_everywhere(runs: dict[str, Any], name: str) -> None:
    found, ddp = runs[f"{name} clipped"], runs["ddp clipped"]
    assert_same_trace(found["losses"], ddp["losses"], 1e-6)
    assert found["norms"] == pytest.approx(ddp["norms"], rel=1e-5)
    assert min(found["norms"]) > 0.1, "nothing was clipped"
    assert found["losses"] != runs[name]["losses"][:6]


@pytest.mark.parametrize("name", SPLIT)
def test_adamw_is_the_same_everywhere(runs: dict[str, Any], name: str) -> None:
    found, ddp = runs[f"{name} adamw"], runs["ddp adamw"]
    assert_same_trace(found["losses"], ddp["losses"], 1e-6)
    assert_same_weights(found["weights"], ddp["weights"], 1e-6)


def test_optimizer_of_the_json_trains_as_the_same_one_of_the_trainer(runs: dict[str, Any]) -> None:
    found, ddp = runs["zero2 own adamw"], runs["ddp adamw"]
    assert_same_trace(found["losses"], ddp["losses"], 1e-6)
    assert_same_weights(found["weights"], ddp["weights"], 1e-5)


def test_schedule_of_the_json_moves_on_at_every_step_and_is_resumed(runs: dict[str, Any]) -> None:
    found, again = runs["zero2 scheduled"], runs["zero2 scheduled again"]
    assert found["lr"] == again["lr"] == pytest.approx(0.02)
    assert_same_trace(again["losses"], found["losses"][2:], 1e-6)
    assert found["losses"] != runs["zero2 own adamw"]["losses"]


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "fsdp"])
def test_optimizer_state_is_split(runs: dict[str, Any], name: str) -> None:
    whole = runs["ddp"]["optimizer_numel"]
    assert runs["zero0"]["optimizer_numel"] == whole
    assert 0.4 * whole < runs[name]["optimizer_numel"] < 0.6 * whole


@pytest.mark.parametrize(("source", "target"), list(permutations(SPLIT, 2)))
def test_resume_under_another_strategy_goes_on_as_if_unbroken(
    runs: dict[str, Any], source: str, target: str
) -> None:
    found, unbroken = runs[f"{source} → {target}"], runs[source]
    assert "error" not in found
    assert found["steps"] == 20
    assert_same_trace(found["losses"], unbroken["losses"][10:], 1e-5)
    assert found["extra"]["losses"] == unbroken["losses"][:10]
    assert found["lr"] == unbroken["lr"]
    assert_same_weights(found["weights"], unbroken["weights"], 1e-5)
    assert_same_weights(found["ema"], unbroken["ema"], 1e-5)


@pytest.mark.parametrize("pair", ["ddp → zero3", "zero2 → fsdp", "zero3 → zero2", "fsdp → ddp"])
def test_resume_with_adamw_keeps_step_counts(runs: dict[str, Any], pair: str) -> None:
    found, unbroken = runs[f"adamw {pair}"], runs["ddp adamw"]
    assert_same_trace(found["losses"], unbroken["losses"][3:], 1e-5)
    assert_same_weights(found["weights"], unbroken["weights"], 1e-5)


def test_resume_on_one_then_on_four_ranks(runs: dict[str, Any]) -> None:
    unbroken = runs["zero2"]["losses"]
    assert_same_trace(runs["2 → 1"]["losses"], unbroken[10:15], 1e-5)
    assert_same_trace(runs["2 → 1 → 4"]["losses"], unbroken[15:], 1e-5)
    assert_same_weights(runs["2 → 1 → 4"]["weights"], runs["zero2"]["weights"], 1e-5)


@pytest.mark.parametrize("name", SPLIT)
def test_nan_on_one_rank_stops_all_with_step_and_place(runs: dict[str, Any], name: str) -> None:
    error = runs[f"{name} stop"]["error"]
    assert error.startswith("NonFiniteLossError: step 3: the gradients are not finite"), error
    assert "first appears in the input of the network, on rank 0" in error


@pytest.mark.parametrize("name", SPLIT)
def test_nan_on_one_rank_is_skipped_on_all(runs: dict[str, Any], name: str) -> None:
    found = runs[f"{name} skip"]
    assert found["losses"][2] is None
    assert found["steps"] == 5
    assert found["losses"][:2] == runs[name]["losses"][:2]
    assert_same_trace(found["losses"][3:], runs["ddp skip"]["losses"][3:], 1e-6)
    assert all(abs(number) < 1e6 for numbers in found["weights"].values() for number in numbers)
