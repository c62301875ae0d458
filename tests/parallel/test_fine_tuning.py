"""Weights to begin with, frozen layers and scaled rates: alike under every strategy, in real processes."""

from __future__ import annotations

import math
from typing import Any

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

STRATEGIES = ("ddp", "zero0", "zero1", "zero2", "zero3", "fsdp")
FROZEN = ("conv.", "bn.", "layer1.0.")


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_run_begins_with_the_weights_of_another_strategy(runs: dict[str, Any], name: str) -> None:
    found = runs[f"{name} tuned"]
    assert found["given"].keys() == found["begins_with"].keys()
    for key, numbers in found["given"].items():
        assert found["begins_with"][key] == pytest.approx(numbers, rel=1e-12), key


@pytest.mark.parametrize("name", STRATEGIES)
def test_frozen_layers_stay_and_the_others_learn(runs: dict[str, Any], name: str) -> None:
    found = runs[f"{name} tuned"]
    kept = [k for k, numbers in found["weights"].items() if numbers == found["begins_with"][k]]
    assert kept == [k for k in found["weights"] if k.startswith(FROZEN)]  # running statistics too


@pytest.mark.parametrize("name", STRATEGIES[1:])
def test_the_trace_is_that_of_ddp(runs: dict[str, Any], name: str) -> None:
    found, ddp = runs[f"{name} tuned"], runs["ddp tuned"]
    assert len(found["losses"]) == 6
    assert found["losses"] == pytest.approx(ddp["losses"], rel=1e-6)
    for key, numbers in ddp["weights"].items():
        assert found["weights"][key] == pytest.approx(numbers, rel=1e-6, abs=1e-6), key


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_schedule_keeps_the_ratio_of_the_rates(runs: dict[str, Any], name: str) -> None:
    rates = [group["lr"] for group in runs[f"{name} tuned"]["options"]]
    now = 0.05 * (1 + math.cos(math.pi / 5)) / 2  # one epoch of five is over
    assert rates == pytest.approx([now, now * 0.1])


@pytest.mark.parametrize("name", ["ddp → zero2", "zero3 → fsdp"])
def test_a_resumed_run_takes_another_factor(runs: dict[str, Any], name: str) -> None:
    rates = [group["lr"] for group in runs[f"tuned {name}"]["options"]]
    assert rates[1] / rates[0] == pytest.approx(0.5)
    assert runs[f"tuned {name}"]["steps"] == 8


def test_an_optimizer_of_the_json_takes_the_factors_and_its_schedule_is_refused(runs: dict[str, Any]) -> None:
    rates = [group["lr"] for group in runs["zero2 own adamw tuned"]["options"]]
    assert rates == pytest.approx([0.01, 0.001])
    assert "its scheduler gives all parameters one rate" in runs["zero2 scheduled tuned"]["error"]
