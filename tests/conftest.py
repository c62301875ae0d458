"""What every test shares: one computing thread, so that runs are deterministic and workers do not fight."""

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")


@pytest.fixture(autouse=True)
def _environment_as_it_was() -> Iterator[None]:
    """Put os.environ back: DeepSpeed and torch.distributed write a run's ranks into it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
