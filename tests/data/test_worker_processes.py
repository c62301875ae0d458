"""A worker process that dies, or cannot hand over a batch, ends the run at once with one line."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from scalesnn.base import UserError
from scalesnn.data.worker_processes import batches_of_workers, init_worker


class Images(Dataset[Any]):
    """Sixteen images; the ninth kills its worker, cannot be pickled, or is an error of the user's."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __len__(self) -> int:
        return 16

    def __getitem__(self, image: int) -> Any:
        if image == 8:
            if self.what == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.what == "not handed over":
                return lambda: image
            if self.what == "error":
                raise RuntimeError("the user's own")
        return torch.zeros(4)


def batches(what: str) -> Any:
    return batches_of_workers(
        DataLoader(Images(what), batch_size=None, num_workers=2, worker_init_fn=init_worker, timeout=0)
    )


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)


@pytest.mark.parametrize("what", ["killed", "not handed over"])
def test_a_lost_worker_ends_the_iteration(what: str) -> None:
    handler = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(UserError, match=r"data worker process died .* --workers \(now 2; 0 needs") as refused:
        list(batches(what))
    assert "\n" not in str(refused.value)
    assert signal.getsignal(signal.SIGCHLD) is handler


def test_other_errors_stay_what_they_are() -> None:
    assert len(list(batches("nothing"))) == 16
    with pytest.raises(RuntimeError, match="the user's own"):
        list(batches("error"))


SCRIPT = """
import argparse, sys
from scalesnn.data import add_data_arguments, open_data
parser = argparse.ArgumentParser()
add_data_arguments(parser)
args = parser.parse_args(["--data-path", sys.argv[1], "--loader", "torchvision", "-j", "1"])
list(open_data(args, batch_size=8, seed=0).train.epoch(0))
"""


@pytest.mark.long
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="needs root to mount a /dev/shm")
def test_a_tiny_shared_memory_is_said(folder: Path) -> None:
    mount = 'mount -t tmpfs -o size=64k none /dev/shm || exit 77; exec "$@"'
    line = ["unshare", "-m", "bash", "-c", mount, "x", sys.executable, "-c", SCRIPT, str(folder)]
    result = subprocess.run(line, capture_output=True, text=True, timeout=90, check=False)
    if result.returncode == 77 or "unshare failed" in result.stderr:
        pytest.skip("this container may not mount")
    assert "No space left on device" in result.stderr
    assert "of 0.1 MiB of /dev/shm are free" in result.stderr.splitlines()[-1]
