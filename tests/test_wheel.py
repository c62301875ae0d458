"""From a wheel, outside the checkout and without extras: trains, plans, checks; what is missing is a line."""

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = Path(sysconfig.get_path("purelib"))
EXTRAS = ("cupy", "wandb", "tensorboard", "dali", "scalesnn", "__editable__")


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """An environment that has the wheel and what it needs, but neither DALI, CuPy, W&B nor TensorBoard; and a
    folder to work in: a function that runs a command there."""
    base = tmp_path_factory.mktemp("outside")
    source = base / "source"
    shutil.copytree(ROOT / "scalesnn", source / "scalesnn", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", build, str(base)], cwd=source, check=True, capture_output=True, timeout=200
    )
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", base / "env"], check=True, timeout=100)
    (site,) = base.glob("env/lib/python*/site-packages")
    for entry in PACKAGES.iterdir():
        if entry.name != "nvidia" and not entry.name.startswith(EXTRAS):
            (site / entry.name).symlink_to(entry)
    if (PACKAGES / "nvidia").is_dir():  # shared by CUDA's libraries and DALI
        (site / "nvidia").mkdir()
        for entry in (PACKAGES / "nvidia").iterdir():
            if not entry.name.startswith(EXTRAS):
                (site / "nvidia" / entry.name).symlink_to(entry)
    (wheel,) = base.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    script = base / "env/bin/scalesnn"
    script.write_text(f"#!{base}/env/bin/python\nfrom scalesnn.cli import main\nraise SystemExit(main())\n")
    script.chmod(0o755)
    (base / "work").mkdir()

    def run(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            words,
            cwd=base / "work",
            env={"PATH": f"{base}/env/bin:/usr/bin:/bin", "HOME": str(Path.home()), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )

    run.site = site
    return run


def test_the_wheel_holds_what_a_run_needs(outside):
    held = {str(p.relative_to(outside.site)) for p in (outside.site / "scalesnn").rglob("*")}
    for needed in (
        "configs/zero2.json",
        "configs/recipes/sample.yaml",
        "configs/references/sew_resnet34.yaml",
        "kernels/neuron.cu",
    ):
        assert f"scalesnn/{needed}" in held
    assert (outside.site / "scalesnn/data/sample/fashion-mnist/val").is_dir()


@pytest.mark.long
def test_a_training_without_the_extras(outside):
    done = outside("scalesnn", "launch", "--devices", "1", "--max-steps", "4", "--T", "1", "-b", "8")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Traceback" not in done.stdout + done.stderr
    for line in (
        "images are decoded by torchvision: ",
        "pip install nvidia-dali-cuda130",
        "the package wandb is not installed: pip install wandb",
        "the package tensorboard is not installed: pip install tensorboard",
    ):
        assert sum(line in printed for printed in done.stdout.splitlines()) == 1, line


@pytest.mark.long
@pytest.mark.parametrize(
    "line",
    [
        "scalesnn plan --model spiking_resnet18 --T 2 --batch-size 2 --size 32 --policy none",
        "scalesnn doctor --megabytes 0",
        "scalesnn launch --devices 1 --dry-run --config sample --deepspeed_config zero2",
        "python -m scalesnn.model.train_imagenet_example --config configs/recipes/sample.yaml "
        "--deepspeed_config configs/zero2.json --print-logdir",
    ],
    ids=["plan", "doctor", "launch", "names"],
)
def test_commands(outside, line):
    done = outside(*line.split())
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_what_was_asked_for_by_name_and_is_missing_is_refused_in_a_line(outside):
    done = outside("python", "-m", "scalesnn.model.train_imagenet_example", "--loader", "dali")
    assert done.returncode == 2
    assert "take --loader torchvision" in done.stderr.splitlines()[-1]
