"""Machines that are set up in another way: a Latin-1 locale, a user without a name or a home folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import ROOT, environment

from scalesnn.kernels.build import cache_folder

WORDS = ["--print-logdir", "--device", "cpu", "--no-cpu-binding", "--output-dir", "runs"]


def start(
    folder: Path, *words: str, prefix: tuple[str, ...] = (), **variables: str
) -> subprocess.CompletedProcess:
    known = {k: v for k, v in environment().items() if k not in ("HOME", "XDG_CACHE_HOME", "USER", "LOGNAME")}
    known |= {"SCALESNN_CACHE": str(cache_folder()), **variables}
    line = [*prefix, sys.executable, str(ROOT / "launch/train.py"), *WORDS, *words]
    return subprocess.run(line, cwd=folder, env=known, capture_output=True, timeout=120, check=False)


def test_recipes_and_output_are_utf8_in_a_latin_1_locale(tmp_path):
    made = shutil.which("localedef") and subprocess.run(
        ["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(tmp_path / "en_US.ISO-8859-1")],
        capture_output=True,
    )
    if not made or not (tmp_path / "en_US.ISO-8859-1").is_dir():
        pytest.skip("no localedef, or no locales to make one from")
    (tmp_path / "recipe.yaml").write_text("run_name: 测试é\n", encoding="utf-8")
    locale = {"LOCPATH": str(tmp_path), "LC_ALL": "en_US.ISO-8859-1", "PYTHONUTF8": "0"}
    done = start(tmp_path, "--config", "recipe.yaml", HOME=os.environ.get("HOME", "/"), **locale)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("utf-8").splitlines()[0] == "runs/测试é/tb"


def test_a_user_without_a_name_and_a_home_folder(tmp_path):
    alone = ("unshare", "-U", "--map-user=54321", "--map-group=54321")
    if not shutil.which("unshare") or subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces here")
    done = start(tmp_path, "--run-name", "mine", prefix=alone)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().splitlines()[0] == "runs/mine/tb"
