"""Freed blocks of CPU tensors are kept: steps map no pages anew.

Each script runs in a process of its own, whose allocator keeps its settings.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")

FEWEST_FAULTS = """
import resource
import torch
from scalesnn.memory import keep_freed_blocks

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
kept = keep_freed_blocks()
counts = [faults()]
for _ in range(12):
    torch.ones(2**20)
    counts.append(faults())
print(kept, min(b - a for a, b in zip(counts, counts[1:])))
"""
A_BLOCK = 1000  # faults, and a few more, where 4 MiB are mapped every time


@pytest.mark.parametrize(("environment", "kept"), [({}, True), ({"MALLOC_MMAP_THRESHOLD_": "65536"}, False)])
def test_steps_map_no_pages_anew_unless_the_environment_says_so(environment, kept):
    env = {**os.environ, **environment}
    command = [sys.executable, "-c", FEWEST_FAULTS]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100, check=True)
    said, fewest = done.stdout.split()
    assert said == str(kept)
    assert int(fewest) < 100 if kept else int(fewest) > A_BLOCK
