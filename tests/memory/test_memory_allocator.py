"""Freed blocks of CPU tensors are kept: steps map no pages anew.

Each script runs in a process of its own, whose allocator keeps its settings.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


GIVES_BACK = """
import resource
import scalesnn.model.train_classify
import torch
from scalesnn.memory import keep_freed_blocks

def pages():
    return int(open("/proc/self/statm").read().split()[1])
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
keep_freed_blocks(frugal=True)
before = pages()
blocks = [torch.ones(2**20) for _ in range(8)]
between = [torch.ones(2**10) for _ in range(8)]
del blocks
held, counted = pages() - before, faults()
torch.ones(2**22)
print(held, faults() - counted)
"""
HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def test_a_frugal_process_gives_blocks_back_and_maps_huge_pages():
    done = subprocess.run(
        [sys.executable, "-c", GIVES_BACK], capture_output=True, text=True, timeout=100, check=True
    )
    held, faults = map(int, done.stdout.split())
    assert held < A_BLOCK, "of 8 blocks of 1024 pages"
    if HUGE.exists() and "[never]" not in HUGE.read_text():
        assert faults < 3 * A_BLOCK, "of 4 thousand pages"
