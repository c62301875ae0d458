"""A real Slurm of two nodes, started once for the tests of this folder; skipped where it is not installed.

Debian and Ubuntu: apt-get install slurm-wlm munge pdsh openssh-server openssh-client iproute2 shellcheck
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_testbed import SAMPLE, TESTBED, Slurm, free_ports


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    missing = [name for name in ("slurmctld", "slurmd", "munged", "sbatch") if not shutil.which(name)]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root and a Slurm to start: {', '.join(missing) or 'not root'}")
    # Sockets' paths are short, so not below pytest's folder.
    folder = Path(subprocess.check_output(["mktemp", "-d", "-t", "slurm.XXXXXX"], text=True).strip())
    bed = Slurm(folder, free_ports(3))
    try:
        done = bed.run(str(TESTBED), "start", str(folder))
        assert done.returncode == 0, done.stderr
        yield bed
    finally:
        bed.run(str(TESTBED), "stop", str(folder))
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def few_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of the sample with 12 training and 2 test images each."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 12), ("val", 2)):
        for name in ("bag", "coat", "dress"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for path in sorted((SAMPLE / split / name).glob("*.jpg"))[:count]:
                shutil.copy(path, folder)
    return root
