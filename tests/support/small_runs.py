"""Small image folders, and ways to run launch/train.py on them; for the tests of any area."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ("bee", "cat", "dog", "elk")
SMALL = [
    "--train-crop-size=24",
    "--val-resize-size=24",
    "--val-crop-size=24",
    "--workers=1",
    "--device=cpu",
    "--wandb=disabled",
    "--batch-size=4",
    "--epochs=3",
    "--T=2",
    "--metrics-every=1",
    "--lr-warmup-epochs=1",
]


def make_images(folder: Path, train: int, val: int) -> Path:
    """An ImageNet-layout folder of noisy colour patches, one hue a class."""
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(CLASSES):
            target = folder / split / name
            target.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 90, (24, 30, 3))
                pixels[..., label % 3] += 60 + 40 * (label // 3)
                Image.fromarray(pixels.astype(np.uint8)).save(target / f"{i}.jpg")
    return folder


def command(*words: object) -> list[str]:
    """The command line of launch/train.py with small settings."""
    return [sys.executable, str(ROOT / "launch/train.py"), *SMALL, *map(str, words)]


def environment() -> dict[str, str]:
    """The environment of a started training: this interpreter's tools on PATH, one computing thread."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(*words: object, timeout: float = 120, prefix: list[str] | None = None) -> subprocess.CompletedProcess:
    """Run a training to its end."""
    line = command(*words) if prefix is None else [*prefix, *command(*words)[1:]]
    return subprocess.run(
        line, capture_output=True, text=True, timeout=timeout, env=environment(), check=False
    )


def records(output: Path, kind: str | None = None, split: str | None = None) -> list[dict]:
    """The lines of the newest metrics.jsonl below ``output``."""
    files = sorted(output.glob("*/metrics.jsonl"), key=lambda p: p.stat().st_mtime)
    text = files[-1].read_text()
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]  # the last may be half
    return [r for r in lines if kind in (None, r.get("kind")) and split in (None, r.get("split"))]


def trace(output: Path) -> dict[int, float]:
    """Loss by step."""
    found: dict[int, float] = {}
    for record in records(output, "step"):
        assert record["step"] not in found, "a step was logged twice"
        found[record["step"]] = record["loss"]
    return found


@contextmanager
def process_left_as_it_was() -> Iterator[None]:
    """Put os.environ and torch's determinism back: a run in this process sets both."""
    import torch  # late: tests/conftest.py sets the number of threads first

    environment, deterministic = dict(os.environ), torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        os.environ.clear()
        os.environ.update(environment)


def refusal(capsys: pytest.CaptureFixture[str], run: Callable[..., Any], *arguments: Any) -> str:
    """The one line with which ``run(*arguments)`` ends, with exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    text = capsys.readouterr().err.strip()
    assert len(text.splitlines()) == 1, text
    return text
