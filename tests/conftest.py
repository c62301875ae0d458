"""What every test shares: one computing thread, so that runs are deterministic and workers do not fight."""

import os
from collections.abc import Iterator

import pytest
from small_runs import process_left_as_it_was

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")


@pytest.fixture(autouse=True)
def _process_left_as_it_was() -> Iterator[None]:
    with process_left_as_it_was():
        yield
