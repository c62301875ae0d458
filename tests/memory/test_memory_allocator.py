"""The arena of CPU tensors: how much it holds, that steps map no pages anew, that values stay what they were.

Each script runs in a process of its own: an allocator cannot be taken out again.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the arena is for Linux")

START = """
import os, random, resource, sys, threading
import torch
from scalesnn.memory import allocator, trim_arena, use_arena

MiB = 2**20
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / MiB
def block(mebibytes):
    return torch.ones(int(mebibytes * MiB), dtype=torch.uint8)
"""


def run(script: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    command = [sys.executable, "-c", START + script, *words]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done


# Every other block is freed, and blocks of twice the size take their room: they fit into no gap. 64 MiB are
# alive at most.
SPLITTING = """
if sys.argv[1] == "arena":
    assert use_arena()
else:
    allocator._keep_freed_blocks()
start = most = resident()
held = [block(0.5) for _ in range(128)]
for size in (1, 2, 4, 8):
    held = held[::2]
    for _ in range(32 // size):
        held.append(block(size))
        most = max(most, resident())
print(most - start)
"""


def test_a_heap_that_splits_holds_little_more_than_what_is_alive():
    assert float(run(SPLITTING, "heap").stdout) > 2 * 64, "nothing splits here: the test is blind"
    assert float(run(SPLITTING, "arena").stdout) < 1.3 * 64, "a quarter more, and what Python takes"


FEWEST_FAULTS = """
used = use_arena()
counts = [faults()]
for _ in range(12):
    torch.ones(2**24)
    counts.append(faults())
print(used, min(b - a for a, b in zip(counts, counts[1:])))
"""
A_BLOCK = 16000  # faults, and a few more, where 64 MiB are mapped every time


def test_steps_map_no_pages_anew():
    used, fewest = run(FEWEST_FAULTS).stdout.split()
    assert used == "True"
    assert int(fewest) < 100


@pytest.mark.parametrize("switch", [{"SCALESNN_ARENA": "0"}, {"MALLOC_MMAP_THRESHOLD_": "65536"}])
def test_the_environment_leaves_the_allocator_as_it_is(switch):
    used, fewest = run(FEWEST_FAULTS, **switch).stdout.split()
    assert used == "False"
    assert int(fewest) > A_BLOCK


def test_without_a_compiler_the_c_library_keeps_freed_blocks_and_a_line_says_so(tmp_path: Path):
    done = run(FEWEST_FAULTS, PATH="/nonexistent", CXX="", SCALESNN_CACHE=str(tmp_path))
    used, fewest = done.stdout.split()
    assert used == "False"
    assert int(fewest) < 100
    assert len(done.stderr.splitlines()) == 1
    assert "no arena for CPU tensors (no C++ compiler on PATH)" in done.stderr


def test_trimming_gives_back_what_is_free_and_nothing_else():
    script = """
assert use_arena()
kept, large = block(8), block(64)
full = resident()
del large
assert resident() > full - 4, "kept for the next block"
trim_arena()
print(full - resident())
assert bool((kept == 1).all())
"""
    assert 60 < float(run(script).stdout) < 70


def test_values_survive_in_every_thread_and_in_forked_processes():
    script = """
torch.set_num_threads(1)
assert use_arena()
def work(seed, turns):
    draw, held = random.Random(seed), []
    for turn in range(turns):
        if len(held) == 12 or (held and draw.random() < 0.4):
            tensor, value = held.pop(draw.randrange(len(held)))
            assert bool((tensor == value).all()), "another block wrote here"
            del tensor
        else:
            value = seed * 1000 + turn
            held.append((torch.full((int(2 ** draw.uniform(10, 19)),), value), value))
    for tensor, value in held:
        assert bool((tensor == value).all()), "another block wrote here"
failed = []
def watched(seed):
    try:
        work(seed, 300)
    except BaseException as error:
        failed.append(error)
threads = [threading.Thread(target=watched, args=(seed,)) for seed in range(4)]
mine = torch.full((2**18,), 7)
for thread in threads:
    thread.start()
for child in range(5):  # while the threads take and free
    pid = os.fork()
    if pid == 0:
        mine.fill_(child)
        work(100 + child, 40)
        os._exit(0 if bool((mine == child).all()) else 1)
    assert os.waitpid(pid, 0)[1] == 0
for thread in threads:
    thread.join()
assert not failed, failed
assert bool((mine == 7).all())
"""
    run(script)


def test_torch_finds_an_allocator_like_its_own():
    script = """
early = block(2)
conv = torch.nn.Conv2d(64, 64, 3)
conv(torch.ones(4, 64, 32, 32)).sum().backward()
begin, used = threading.Event(), []
def small_blocks():  # of a heap that glibc keeps for this thread, at addresses above the arena
    used.append(torch.ones(100).sum())
    begin.wait()
    used.append(torch.ones(100).sum())
thread = threading.Thread(target=small_blocks)
thread.start()
while not used:
    pass
assert use_arena() and use_arena()
begin.set()
thread.join()
assert len(used) == 2
del early, conv.weight.grad  # of the allocator before
conv(torch.ones(4, 64, 32, 32)).sum().backward()
assert torch.empty(0).numel() == 0
assert all(torch.empty(n, dtype=torch.uint8).data_ptr() % 64 == 0 for n in (1, 70_000, 2**20 + 1, 2**22))
assert bool((block(2).resize_(2**23)[: 2**21] == 1).all())
assert block(4).share_memory_().sum() == 4 * MiB
more = 2 * os.sysconf("SC_PHYS_PAGES") * resource.getpagesize()  # than the machine has, not than the arena
if open("/proc/sys/vm/overcommit_memory").read().strip() == "1":
    more = 2**50
try:
    torch.empty(more, dtype=torch.uint8)
except RuntimeError as error:
    assert "can't allocate memory" in str(error)
else:
    raise AssertionError("more than the machine has")
with torch.profiler.profile(profile_memory=True) as profile:
    large = torch.empty(4 * MiB, dtype=torch.uint8)
assert any(event.self_cpu_memory_usage == 4 * MiB for event in profile.key_averages())
at_exit = block(4)  # freed when the interpreter is gone
"""
    run(script)


def test_a_fork_in_the_midst_of_an_allocation_leaves_the_child_able_to_allocate():
    script = """
import signal
assert use_arena()
gaps = [torch.empty(2**16, dtype=torch.uint8) for _ in range(40_000)][::2]  # a search is long
over = threading.Event()
def search():
    while not over.is_set():
        torch.empty(2**17, dtype=torch.uint8)
thread = threading.Thread(target=search)
thread.start()
for _ in range(20):
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        torch.empty(2**17, dtype=torch.uint8)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    if status:
        os._exit(1)
while gaps:  # freed while the other thread searches
    gaps.pop()
over.set()
thread.join()
"""
    run(script)
