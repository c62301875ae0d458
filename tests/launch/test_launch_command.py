"""`scalesnn launch --dry-run`, as whole text; that the text runs is tried in tests/cluster and below."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scalesnn import launch_command
from scalesnn.base import UserError
from scalesnn.launch_command import add_launch_command, plan_launch, read_hostfile

ROOT = Path(launch_command.__file__).resolve().parents[1]
PYTHON = sys.executable
BIN = Path(sys.executable).parent


@pytest.fixture(autouse=True)
def _on_path(monkeypatch):
    monkeypatch.setenv("PATH", f"{BIN}:{os.environ['PATH']}")


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scalesnn")
    add_launch_command(parser.add_subparsers(required=True))
    return parser.parse_args(["launch", *words])


def dry_run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    args = parse("--dry-run", *words)
    assert args.run(args) == 0
    return capsys.readouterr().out


def test_1_node_of_8_devices(capsys):
    assert dry_run(capsys, "--devices", "8", "--T", "4", "-b", "64") == (
        "# 1 node × 8 devices = 8 processes, 512 images a step\n"
        f"{PYTHON} -m torch.distributed.run --standalone --nproc-per-node 8 {ROOT}/launch/train.py --T "
        "4 -b 64\n"
    )


def test_restarts_on_this_machine_are_torchruns(capsys):
    assert dry_run(capsys, "--devices", "1", "--max-restarts", "2") == (
        "# 1 node × 1 device = 1 process, 32 images a step\n"
        f"{PYTHON} -m torch.distributed.run --standalone --nproc-per-node 1 --max-restarts 2 "
        f"{ROOT}/launch/train.py\n"
    )


@pytest.mark.parametrize(("nodes", "processes", "images"), [(1, 8, 256), (4, 32, 1024), (64, 512, 16384)])
def test_slurm_nodes_of_8_devices(capsys, nodes, processes, images):
    text = dry_run(
        capsys, "--slurm", "--nodes", str(nodes), "--devices", "8", "--partition", "gpu",
        "--time", "24:00:00",
        "--max-restarts", "3", "--deepspeed_config", "configs/zero2.json", "--data-path", "/data/image net",
    )  # fmt: skip
    assert text == (
        f"# {nodes} node{'s' * (nodes > 1)} × 8 devices = {processes} processes, {images} images a step\n"
        "# scalesnn.sbatch:\n"
        "#!/usr/bin/env bash\n"
        "#SBATCH --job-name=scalesnn\n"
        f"#SBATCH --nodes={nodes}\n"
        "#SBATCH --gpus-per-node=8\n"
        "#SBATCH --partition=gpu\n"
        "#SBATCH --time=24:00:00\n"
        "#SBATCH --signal=USR1@120\n"
        "#SBATCH --open-mode=append\n"
        "#SBATCH --output=%x-%j.out\n"
        "#SBATCH --requeue\n"
        "#SBATCH --exclusive\n"
        "# Written by scalesnn launch; submit it again with sbatch.\n"
        "set -euo pipefail\n"
        f"root={ROOT}\n"
        'source "$root/launch/slurm/job.sh"\n'
        f"PATH={BIN}:$PATH\n"
        "RESTARTS=${RESTARTS:-3}\n"
        f"run python -u {ROOT}/launch/train.py --deepspeed_config configs/zero2.json --data-path "
        "'/data/image net'\n"
        "\n"
        "sbatch scalesnn.sbatch\n"
    )


def test_a_part_of_a_node_on_slurm(capsys):
    text = dry_run(
        capsys, "--slurm", "--devices", "2", "--cpus", "6", "--job-name", "small", "--account", "me"
    )
    assert "#SBATCH --ntasks-per-node=2\n#SBATCH --cpus-per-task=6\n#SBATCH --account=me\n" in text
    assert "--exclusive" not in text
    assert text.endswith("\nsbatch small.sbatch\n")


def test_nodes_without_gpus_on_slurm(capsys):
    text = dry_run(capsys, "--slurm", "--nodes", "2", "--devices", "0")
    assert text.startswith("# 2 nodes × 1 device = 2 processes, 64 images a step\n")
    assert "gpus" not in text


@pytest.mark.parametrize("nodes", [1, 4, 64])
def test_hosts_of_8_devices(capsys, tmp_path, nodes):
    hosts = tmp_path / "hosts"
    hosts.write_text("# rack 1\n" + "".join(f"gpu{n:02} slots=8\n" for n in range(nodes)))
    text = dry_run(capsys, "--hostfile", str(hosts), "--master-port", "29600", "--deepspeed_config", "z.json")
    assert text == (
        f"# {nodes} node{'s' * (nodes > 1)} × 8 devices = {nodes * 8} processes, {nodes * 256} images a "
        "step\n"
        f"{PYTHON} -m deepspeed.launcher.runner --hostfile {hosts} --launcher pdsh "
        f"{'--force_multi ' * (nodes == 1)}--master_port 29600 "
        f"{ROOT}/launch/train.py --deepspeed_config z.json\n"
    )


def test_some_of_the_hosts_and_of_their_devices(capsys, tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=8\nb slots=4\nc slots=8\n")
    text = dry_run(capsys, "--hostfile", str(hosts), "--nodes", "2", "--devices", "4")
    assert "--num_nodes 2 --num_gpus 4" in text
    with pytest.raises(UserError, match=r"different slots; give --devices 4"):
        dry_run(capsys, "--hostfile", str(hosts))
    with pytest.raises(UserError, match=r"--devices 8, but .* has b slots=4"):
        dry_run(capsys, "--hostfile", str(hosts), "--devices", "8")
    with pytest.raises(UserError, match=r"--nodes 4, but .* has 3 host"):
        dry_run(capsys, "--hostfile", str(hosts), "--nodes", "4")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a slots=8\na slots=8\n", "line 2: a stands there twice"),
        ("a slots=8\n\nb 8\n", "line 3: expected 'HOST slots=N', got 'b 8'"),
        ("a slots=0\n", "line 1: expected 'HOST slots=N'"),
        ("# nobody\n", "names no host"),
    ],
)
def test_a_bad_hostfile_names_its_line(tmp_path, text, problem):
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(UserError, match=problem):
        read_hostfile(str(path))


def test_a_missing_hostfile(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_hostfile(str(tmp_path / "hosts"))


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--nodes", "4"], "--nodes 4 needs --slurm or --hostfile"),
        (["--slurm"], "--slurm needs --devices N"),
        (["--slurm", "--devices", "8", "--hostfile", "x"], "two ways"),
        (["--devices", "0"], "--devices must be at least 1, got 0"),
        (["--slurm", "--devices", "-1"], "--devices must be at least 0, got -1"),
        (["--devices", "1", "--max-restarts", "-1"], "--max-restarts must be at least 0"),
        (["--devices", "1", "--script", "nowhere.py"], "there is no such file"),
    ],
)
def test_flags_that_contradict_each_other(words, problem):
    with pytest.raises(UserError, match=problem):
        plan_launch(parse(*words))


def test_a_slip_of_the_pen_is_found_before_anything_starts(capsys):
    with pytest.raises(SystemExit) as caught:
        plan_launch(parse("--slurm", "--devices", "8", "--bacth-size", "3"))
    assert caught.value.code == 2
    assert "unknown flag '--bacth-size'; did you mean '--batch-size'?" in capsys.readouterr().err


def test_words_after_two_dashes_go_to_the_training(capsys):
    assert dry_run(capsys, "--devices", "1", "--", "--T", "2").endswith("/launch/train.py --T 2\n")


def test_without_sbatch_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no sbatch on this machine"):
        plan_launch(parse("--slurm", "--devices", "8")).run()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.distributed
def test_a_launch_on_this_machine_starts_that_many_processes(tmp_path):
    script = tmp_path / "mine.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom scalesnn.parallel.topology import Topology\n"
        "t = Topology.from_environment()\n"
        "Path(sys.argv[1], f'{t.rank}-of-{t.world_size}').touch()\n"
    )
    launch = plan_launch(parse("--devices", "2", "--script", str(script), str(tmp_path)))
    subprocess.run(launch.command, check=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert sorted(p.name for p in tmp_path.glob("*-of-*")) == ["0-of-2", "1-of-2"]


def test_a_launcher_s_exit_code_is_kept(tmp_path):
    script = tmp_path / "mine.py"
    script.write_text("raise SystemExit(7)\n")
    assert plan_launch(parse("--devices", "1", "--script", str(script))).run() == 7


def test_a_name_that_the_training_would_refuse_is_refused_before_the_queue(capsys):
    for words, expected in (
        (["--opt", "sdg"], "did you mean 'sgd'"),
        (["--model", "spiking_resnet19"], "did you mean 'spiking_resnet18'"),
        (["--loader", "quick"], "--loader: unknown 'quick'"),
    ):
        with pytest.raises(UserError, match=expected.replace("(", r"\(")):
            dry_run(capsys, "--devices", "8", *words)
