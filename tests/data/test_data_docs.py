"""docs/data.md tells the truth: its flags exist with these defaults, its program runs."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

from scalesnn.data import add_data_arguments

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def test_the_table_has_every_flag() -> None:
    parser = argparse.ArgumentParser()
    add_data_arguments(parser)
    flags = {flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")}
    flags -= {"--help"}
    others = {"--output", "--fraction", "--seed", "--classes", "--in-channels"}
    named = set(re.findall(r"`(--[a-z-]+)", PAGE.read_text(encoding="utf-8")))
    assert flags <= named
    assert named - flags == others


def test_the_program_runs() -> None:
    (program,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=200
    )
    assert done.stdout.count("torch.Size([50, 3, 28, 28]) torch.Size([50, 10])") == 20
