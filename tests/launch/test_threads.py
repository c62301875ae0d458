"""How OpenMP's threads wait: asked of libgomp itself, in the product's entries."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scalesnn.threads import SETTINGS, let_threads_sleep

ROOT = Path(__file__).parents[2]


def clean(**more: str) -> dict[str, str]:
    rest = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    return {**rest, "PYTHONPATH": str(ROOT), "OMP_DISPLAY_ENV": "true", **more}


@pytest.mark.parametrize(("given", "policy"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "active"}, "ACTIVE")])
def test_the_entry_sets_it_before_torch_loads_openmp(given, policy):
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "--no-such-flag"]
    done = subprocess.run(command, env=clean(**given), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert f"OMP_WAIT_POLICY = '{policy}'" in done.stderr


def test_a_script_of_ones_own_under_scalesnn_launch_has_it_too(tmp_path):
    script = tmp_path / "mine.py"
    script.write_text("import os\nprint('policy', os.environ.get('OMP_WAIT_POLICY'))\n")
    command = [sys.executable, "-m", "scalesnn.cli", "launch", "--devices", "1", "--script", str(script)]
    done = subprocess.run(command, env=clean(), capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "policy passive" in done.stdout


@pytest.mark.parametrize("name", SETTINGS)
def test_what_the_user_has_set_stays(name):
    environ = {name: "1"}
    let_threads_sleep(environ)
    assert environ == {name: "1"}
