"""The commands of README and docs, as printed: in a folder that has what they name they end well."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_runs import ROOT, SMALL, make_images, process_left_as_it_was

from scalesnn.cli import main
from scalesnn.model.sew_resnet import sew_resnet18
from scalesnn.model.train_imagenet_example import SResNetTrainer
from scalesnn.training.arguments import check_arguments
from scalesnn.training.hook_checks import check_hooks

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = ("scalesnn data imagenet",)  # what needs files that nobody has here; it has tests of its own
SLOW = (
    "scalesnn plan --model spiking_resnet50",
    "scalesnn doctor",
    "scalesnn export --format onnx",
    "scalesnn export RUN -o net.pt2",
)


def printed_lines() -> list[str]:
    """Every line of code, in a block or between backticks, without comments; continued lines are joined."""
    found = []
    for page in PAGES:
        text = re.sub(r"\\\n +", "", page.read_text())
        found += re.findall(r"^    (\S.*?)(?:\s+#.*)?$", text, flags=re.M)
        found += re.findall(r"`([^`\n]+)`", text)
    return list(dict.fromkeys(found))


def commands() -> list[str]:
    """The ``scalesnn`` lines that do something here."""
    pattern = r"scalesnn (data [a-z]+ \S|(?!data)[a-z]+ \S|doctor$)"
    return [line for line in printed_lines() if re.match(pattern, line) and not line.startswith(ELSEWHERE)]


def trainings() -> list[str]:
    """The lines that start launch/train.py."""
    pattern = r"(python|torchrun|deepspeed|srun) .*launch/train\.py(?! -h)"
    return [line for line in printed_lines() if re.match(pattern, line)]


def words_of(line: str) -> list[str]:
    """As a shell splits it; an ellipsis stands for a folder after a flag, else for nothing."""
    words = shlex.split(line.replace("--data-path …", "--data-path DIR"))
    words = [word for word in words if word != "…"]
    return [*words, "--dry-run"] if words[:2] == ["scalesnn", "launch"] else words


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with DIR (images), runs/NAME (a run), RUN, and hosts, as the docs name them."""
    folder = tmp_path_factory.mktemp("place")
    make_images(folder / "DIR", 4, 1)
    trainer = SResNetTrainer()
    words = ["--data-path", str(folder / "DIR"), "--output-dir", str(folder / "runs"), "--run-name", "NAME"]
    with process_left_as_it_was():
        trainer.main(trainer.get_args_parser().parse_args([*SMALL, *words, "--max-steps=1", "--model-ema"]))
    for name in ("RUN", "runs/RUN", "runs/RUN1", "runs/RUN2"):
        (folder / name).symlink_to(folder / "runs/NAME")
    torch.save({"model": sew_resnet18(num_classes=4).state_dict()}, folder / "published.pth")
    (folder / "hosts").write_text("gpu01 slots=8\ngpu02 slots=8\n")
    return folder


@pytest.fixture(autouse=True)
def nothing_left_over(request):
    """What a command makes is not there for the next."""
    yield
    if "place" in request.fixturenames:
        shutil.rmtree(request.getfixturevalue("place") / "OUT", ignore_errors=True)


def test_there_are_commands():
    assert {line.split()[1] for line in commands()} >= {
        "plan",
        "doctor",
        "launch",
        "export",
        "report",
        "data",
    }
    assert len(trainings()) >= 5


@pytest.mark.parametrize("line", [line for line in commands() if not line.startswith(SLOW)])
def test_a_command_ends_well(place, monkeypatch, capsys, line):
    monkeypatch.chdir(place)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    assert main(words_of(line)[1:]) == 0, capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize("line", [line for line in commands() if "--hostfile" not in line])  # needs hosts
def test_a_command_in_a_shell_with_only_the_environment_on_its_path(place, tmp_path, line):
    installed = Path(sys.executable).parent
    if not (installed / "scalesnn").exists():  # a checkout whose environment was made for another
        launcher = tmp_path / "scalesnn"
        launcher.write_text(f"#!{sys.executable}\nfrom scalesnn.cli import main\nraise SystemExit(main())\n")
        launcher.chmod(0o755)
    environ = {"PATH": f"{installed}:{tmp_path}:/usr/bin:/bin", "HOME": os.environ["HOME"]}
    if not (installed / "scalesnn").exists():
        environ["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        shlex.join(words_of(line)),
        shell=True,
        cwd=place,
        env=environ,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.parametrize("line", trainings())
def test_a_training_s_flags_are_taken(line):
    _, _, flags = line.partition("launch/train.py")
    trainer = SResNetTrainer()
    args = trainer.get_args_parser().parse_args(words_of(flags.strip("' ")))
    check_arguments(args)
    check_hooks(trainer, args)
