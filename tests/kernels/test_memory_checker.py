"""No kernel reads or writes beyond its tensors: AddressSanitizer watches the CPU builds on awkward sizes.

compute-sanitizer watches the GPU's where there is one (make gpu-check).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scalesnn.kernels import spike_conv

SCRIPT = Path(__file__).with_name("under_address_sanitizer.py")


def checker() -> Path:
    """AddressSanitizer's library, which must be the first of the process."""
    command = ["g++", "-print-file-name=libasan.so"]
    found = Path(
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    )
    if not found.is_absolute():
        pytest.skip("this g++ has no AddressSanitizer")
    return found


def run_watched(source: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(SCRIPT.parents[2]),
        "LD_PRELOAD": str(checker()),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "SCALESNN_CACHE": str(folder),
        "SCALESNN_ARENA": "0",  # the checker must see every tensor
    }
    command = [sys.executable, str(SCRIPT), str(source)]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=240, cwd=folder
    )


@pytest.mark.long
def test_kernels_stay_within_their_tensors(tmp_path: Path) -> None:
    done = run_watched(spike_conv.SOURCE, tmp_path)
    assert done.returncode == 0, done.stderr[:4000]
    assert done.stdout == "all kernels ran\n"


@pytest.mark.long
def test_the_checker_sees_one_row_too_many(tmp_path: Path) -> None:
    text = spike_conv.SOURCE.read_text(encoding="utf-8")
    changed = tmp_path / "changed.cpp"
    changed.write_text(
        text.replace("for (int s = 0; s < SPIKES; s++) rows", "for (int s = 0; s <= SPIKES; s++) rows")
    )
    assert changed.read_text(encoding="utf-8") != text
    done = run_watched(changed, tmp_path)
    assert "AddressSanitizer: stack-buffer-overflow" in done.stderr
