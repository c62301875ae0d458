"""How OpenMP's threads wait beside busy processes, asked of libgomp itself in the product's entries."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scalesnn.threads import SETTINGS, choose_wait_policy, idle_cores

ROOT = Path(__file__).parents[2]


@pytest.fixture
def busy_machine():
    """One process that computes without end on every core that this one may use."""
    spin = [sys.executable, "-c", "print(1, flush=True)\nwhile True: pass"]
    others = [subprocess.Popen(spin, stdout=subprocess.PIPE) for _ in os.sched_getaffinity(0)]
    for process in others:
        process.stdout.readline()
    yield
    for process in others:
        process.kill()
        process.wait()
        process.stdout.close()


def clean(**more: str) -> dict[str, str]:
    rest = {name: value for name, value in os.environ.items() if name not in (*SETTINGS, "OMP_NUM_THREADS")}
    return {**rest, "PYTHONPATH": str(ROOT), "OMP_DISPLAY_ENV": "true", "OMP_NUM_THREADS": "8", **more}


@pytest.mark.parametrize(("given", "policy"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "active"}, "ACTIVE")])
def test_the_entry_sets_it_before_torch_loads_openmp(given, policy, busy_machine):
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "--no-such-flag"]
    done = subprocess.run(command, env=clean(**given), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert f"OMP_WAIT_POLICY = '{policy}'" in done.stderr


def test_a_script_of_ones_own_under_scalesnn_launch_has_it_too(tmp_path, busy_machine):
    script = tmp_path / "mine.py"
    script.write_text("import os\nprint('policy', os.environ.get('OMP_WAIT_POLICY'))\n")
    command = [sys.executable, "-m", "scalesnn.cli", "launch", "--devices", "1", "--script", str(script)]
    done = subprocess.run(command, env=clean(), capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "policy passive" in done.stdout


def test_busy_cores_are_not_idle(busy_machine):
    assert idle_cores() < 0.5 * len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("threads", "idle", "chosen"),
    [("2", 2.0, None), ("2", 1.6, None), ("2", 1.0, "passive"), ("8", 7.0, "passive"), ("1", 0.0, None)],
)
def test_threads_sleep_where_they_are_more_than_idle_cores(threads, idle, chosen):
    environ = {"OMP_NUM_THREADS": threads}
    choose_wait_policy(environ, lambda: idle)
    assert environ.get("OMP_WAIT_POLICY") == chosen


def test_ranks_share_the_cores():
    cores = len(os.sched_getaffinity(0))
    environ = {"LOCAL_WORLD_SIZE": str(cores)}
    choose_wait_policy(environ, lambda: 0.0)
    assert environ == {"LOCAL_WORLD_SIZE": str(cores)}  # one thread each: none waits for another


@pytest.mark.parametrize("name", SETTINGS)
def test_what_the_user_has_set_stays(name):
    environ = {name: "1"}
    choose_wait_policy(environ, lambda: 0.0)
    assert environ == {name: "1"}
