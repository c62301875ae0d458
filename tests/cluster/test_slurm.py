"""Trainings on a real Slurm of two nodes: they run, survive signals, end with a rank, and start again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from slurm_testbed import ROOT, steps_so_far, trace, training_flags, wait_until

from scalesnn.parallel.launchers import expand_hostlist

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.distributed,
    pytest.mark.xdist_group("slurm"),
    pytest.mark.timeout(600),
]

SCRIPTS = ROOT / "launch/slurm"

# A training in small: real processes, real agreement over gloo, real requeueing; no network to train.
COUNTING = """
import os, signal, sys, time
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])  # as launch/train.py
import torch, torch.distributed as dist
from pathlib import Path
from scalesnn.parallel.topology import Topology
from scalesnn.training.preemption import Preemption, is_restart, job_run_name
topology = Topology.from_environment(); topology.export_environment(); dist.init_process_group("gloo")
class Strategy:
    is_main = topology.is_main
    def any_rank(self, flag):
        x = torch.tensor(float(flag)); dist.all_reduce(x, op=dist.ReduceOp.MAX); return bool(x.item())
folder = Path(sys.argv[1]) / job_run_name(); folder.mkdir(exist_ok=True)
saved = folder / f"step_{topology.rank}"
step = int(saved.read_text()) if is_restart() else 0
with Preemption() as watch:
    watch.check_progress(Strategy(), folder, step)
    while step < int(sys.argv[2]) and not watch.agreed(Strategy()):
        time.sleep(0.1); step += 1
        (folder / f"at_{topology.rank}").write_text(str(step))
        if len(sys.argv) > 3 and topology.rank == 1 and step == 10 and not is_restart():
            os.kill(os.getpid(), 9)
        saved.write_text(str(step))
    print("rank", topology.rank, "ends at step", step, flush=True)
    sys.exit(watch.finish(Strategy(), folder, step))
"""


@pytest.fixture
def counting(tmp_path):
    """A batch script that runs COUNTING through launch/slurm/job.sh."""
    (tmp_path / "count.py").write_text(COUNTING)
    script = tmp_path / "count.sbatch"
    script.write_text(
        "#!/bin/bash\n#SBATCH --exclusive\n#SBATCH --open-mode=append\n#SBATCH --output=log-%j\n"
        f'set -euo pipefail\nroot={ROOT}\nsource "$root/launch/slurm/job.sh"\nrun python -u count.py "$@"\n'
    )
    return script


def test_hostlists_are_expanded_as_scontrol_does(slurm):
    for text in ("n1", "n[1-3]", "gpu[01-03,07],login", "rack[1-2]n[08-10]", "x[9-11]"):
        expected = slurm.run("scontrol", "show", "hostnames", text).stdout.split()
        assert expand_hostlist(text) == expected


def test_the_topology_of_tasks_on_two_nodes(slurm):
    """Three tasks on two nodes, one of them with two; the first node's name is not known to DNS."""
    program = (
        "import dataclasses, json; from scalesnn.parallel.topology import Topology; "
        "print(json.dumps(dataclasses.asdict(Topology.from_environment())), flush=True)"
    )
    done = slurm.run("srun", "-N2", "-n3", "--exclusive", sys.executable, "-c", program, timeout=120)
    assert done.returncode == 0, done.stderr
    places = sorted(map(json.loads, done.stdout.splitlines()), key=lambda place: place["rank"])
    assert [p["rank"] for p in places] == [0, 1, 2]
    assert [p["local_rank"] for p in places] == [0, 1, 0]
    assert [p["node_rank"] for p in places] == [0, 0, 1]
    assert [p["local_world_size"] for p in places] == [2, 2, 1]
    assert {(p["nodes"], p["world_size"], p["source"]) for p in places} == {(2, 3, "slurm")}
    assert {p["master_addr"] for p in places} == {"127.0.0.1"}  # from scontrol, since n1 does not resolve
    assert len({p["master_port"] for p in places}) == 1


def test_a_cancelled_job_saves_and_stays_cancelled(slurm, counting, tmp_path):
    job = slurm.submit("-N2", str(counting), str(tmp_path), "3000", cwd=tmp_path)
    wait_until(lambda: (tmp_path / f"job{job}/at_1").exists(), 120, "running")
    slurm.run("scancel", job)
    assert slurm.wait(job, 60)["JobState"] == "CANCELLED"
    log = (tmp_path / f"log-{job}").read_text()
    assert log.count("ends at step") == 2
    assert (tmp_path / f"job{job}/step_0").read_text() == (tmp_path / f"job{job}/step_1").read_text()
    time.sleep(2)
    assert slurm.show(job)["JobState"] == "CANCELLED"


def test_a_killed_rank_ends_the_job_and_a_restart_recovers(slurm, counting, tmp_path):
    """SIGKILL of rank 1 at step 10: without RESTARTS the job fails within 60 s, with it it finishes."""
    fails = slurm.submit("-N2", str(counting), str(tmp_path), "30", "kill", cwd=tmp_path)
    wait_until(lambda: (tmp_path / f"job{fails}/at_1").exists(), 120, "running")
    wait_until(lambda: (tmp_path / f"job{fails}/at_1").read_text() == "10", 30, "at step 10")
    assert slurm.wait(fails, 60)["JobState"] == "FAILED"
    recovers = slurm.submit("-N2", str(counting), str(tmp_path), "30", "kill", cwd=tmp_path, RESTARTS="1")
    fields = slurm.wait(recovers, 180)
    log = (tmp_path / f"log-{recovers}").read_text()
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), log
    assert "restart 1: job" in log
    assert (tmp_path / f"job{recovers}/at_1").read_text() == "30"


@pytest.mark.long
@pytest.mark.parametrize("way", ["--full", "--batch", "B:USR1@60"])
def test_a_signal_that_also_meets_the_batch_script_requeues_the_job(slurm, counting, tmp_path, way):
    """Slurm signals the tasks and the batch shell, the batch shell alone, or that before the time limit."""
    asked = [f"--signal={way}", "--time=2"] if "@" in way else []  # a minute to start, on a busy machine too
    steps = "900" if asked else "250"
    job = slurm.submit("-N2", *asked, str(counting), str(tmp_path), steps, cwd=tmp_path)
    wait_until(lambda: (tmp_path / f"job{job}/at_1").exists(), 120, "running")
    if not asked:
        slurm.run("scancel", "--signal=USR1", way, job)
    fields = slurm.wait(job, 500)
    log, restarts = (tmp_path / f"log-{job}").read_text(), int(fields["Restarts"])
    assert fields["JobState"] == "COMPLETED", log
    assert restarts == 1 or (asked and restarts > 1), log  # its time limit comes again
    assert log.count("ends at step") == 2 * (restarts + 1), log
    assert log.count("SIGUSR1: saved at step") == restarts, log
    assert (tmp_path / f"job{job}/at_1").read_text() == steps


@pytest.mark.long
def test_a_training_that_is_signalled_resumes_and_repeats_the_unbroken_trace(slurm, few_images, tmp_path):
    """sbatch train_zero2.sbatch on two nodes; once whole, once with SIGUSR1 in the middle."""
    flags = training_flags(few_images, tmp_path / "runs")
    script = str(SCRIPTS / "train_zero2.sbatch")
    whole = slurm.submit("-N2", script, *flags, cwd=tmp_path)
    state = slurm.wait(whole, 240)
    log = (tmp_path / f"scalesnn-{whole}.out").read_text()
    assert (state["JobState"], state["ExitCode"]) == ("COMPLETED", "0:0"), log[-3000:]
    expected = trace(tmp_path / f"runs/job{whole}")
    assert sorted(expected) == list(range(1, 17))

    broken = slurm.submit("-N2", script, *flags, cwd=tmp_path)
    folder = tmp_path / f"runs/job{broken}"
    wait_until(lambda: steps_so_far(folder) >= 3, 240, "training")
    slurm.run("scancel", "--signal=USR1", broken)
    state = slurm.wait(broken, 300)
    log = (tmp_path / f"scalesnn-{broken}.out").read_text()
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), log[-3000:]
    mark = json.loads((folder / "interrupted.json").read_text())
    assert mark["signal"] == "SIGUSR1"
    assert 3 <= mark["step"] < 16
    assert "is requeued" in mark["outcome"]
    assert trace(folder) == expected
    assert {path.name for path in (folder / "logs").iterdir()} == {"rank_0.log", "rank_1.log"}
    assert [path.name for path in (tmp_path / "runs").glob(f"job{broken}*")] == [f"job{broken}"]


@pytest.mark.long
def test_two_nodes_have_the_trace_of_one_process(slurm, few_images, tmp_path):
    """With BatchNorm over all ranks, two ranks of 4 images compute what one computes on 8.

    Sums in another order differ in the last bit; in float32 such a bit sooner or later flips a spike, and the
    traces part. Twelve steps (three epochs) pass before it does.
    """
    flags = training_flags(few_images, tmp_path / "runs", "--sync-bn")
    job = slurm.submit("-N2", str(SCRIPTS / "train_zero2.sbatch"), *flags, cwd=tmp_path)
    assert slurm.wait(job, 240)["JobState"] == "COMPLETED"
    subprocess.run(
        [sys.executable, str(ROOT / "launch/train.py"), *flags, "--batch-size", "8", "--run-name", "one"],
        check=True, timeout=240, env=slurm.environ, capture_output=True,
    )  # fmt: skip
    two, one = trace(tmp_path / f"runs/job{job}"), trace(tmp_path / "runs/one")
    assert sorted(two) == sorted(one) == list(range(1, 17))
    first = range(1, 13)
    assert [two[step] for step in first] == pytest.approx([one[step] for step in first], abs=2e-4)


@pytest.mark.long
@pytest.mark.parametrize("script", ["train_ddp", "train_fsdp"])
def test_the_other_batch_scripts_train(slurm, few_images, tmp_path, script):
    flags = training_flags(few_images, tmp_path / "runs")
    job = slurm.submit("-N2", str(SCRIPTS / f"{script}.sbatch"), *flags, cwd=tmp_path)
    state = slurm.wait(job, 240)
    assert state["JobState"] == "COMPLETED", (tmp_path / f"scalesnn-{job}.out").read_text()[-3000:]
    assert len(trace(tmp_path / f"runs/job{job}")) == 16


@pytest.mark.long
def test_a_killed_training_recovers_with_the_unbroken_trace(slurm, few_images, tmp_path):
    """SIGKILL of one rank's process in the middle of train_zero2.sbatch, RESTARTS=1."""
    flags = training_flags(few_images, tmp_path / "runs", "--save-every", "2")
    script = str(SCRIPTS / "train_zero2.sbatch")
    whole = slurm.submit("-N2", script, *flags, cwd=tmp_path)
    assert slurm.wait(whole, 240)["JobState"] == "COMPLETED"
    job = slurm.submit("-N2", script, *flags, cwd=tmp_path, RESTARTS="1")
    folder = tmp_path / f"runs/job{job}"
    wait_until(lambda: steps_so_far(folder) >= 5, 240, "training")
    os.kill(process_of(job, rank=1), signal.SIGKILL)
    wait_until(lambda: slurm.show(job)["Restarts"] == "1", 60, "ended and requeued within 60 s")
    assert slurm.wait(job, 240)["JobState"] == "COMPLETED"
    assert trace(folder) == trace(tmp_path / f"runs/job{whole}")


@pytest.mark.long
def test_a_sweep_is_an_array_with_a_run_for_each_line(slurm, few_images, tmp_path):
    (tmp_path / "sweep.txt").write_text("# two rates\n--lr 0.01\n\n--lr 0.02 --max-steps 2\n")
    flags = training_flags(few_images, tmp_path / "runs", "--max-steps", "3")
    del flags[flags.index("--lr") : flags.index("--lr") + 2]
    job = slurm.submit("--array=0-1", str(SCRIPTS / "array_sweep.sbatch"), "sweep.txt", *flags, cwd=tmp_path)
    for task in ("0", "1"):
        assert slurm.wait(f"{job}_{task}", 240)["JobState"] == "COMPLETED"
    assert len(trace(tmp_path / f"runs/job{job}_0")) == 3
    assert len(trace(tmp_path / f"runs/job{job}_1")) == 2


@pytest.mark.long
def test_launch_slurm_writes_a_script_that_trains_and_survives_a_signal(slurm, few_images, tmp_path):
    flags = training_flags(few_images, tmp_path / "runs")
    done = slurm.run(
        sys.executable, "-m", "scalesnn.cli", "launch", "--slurm", "--nodes", "2", "--devices", "0", *flags,
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    job = done.stdout.split()[-1]
    wait_until(lambda: steps_so_far(tmp_path / f"runs/job{job}") >= 2, 240, "training")
    slurm.run("scancel", "--signal=USR1", "--full", job)
    fields = slurm.wait(job, 240)
    log = (tmp_path / f"scalesnn-{job}.out").read_text()
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), log[-3000:]
    assert sorted(trace(tmp_path / f"runs/job{job}")) == list(range(1, 17))


@pytest.mark.long
def test_a_sweep_task_without_a_line_ends_with_2(slurm, tmp_path):
    (tmp_path / "sweep.txt").write_text("--lr 0.01\n")
    job = slurm.submit("--array=3", str(SCRIPTS / "array_sweep.sbatch"), "sweep.txt", cwd=tmp_path)
    assert slurm.wait(f"{job}_3", 60)["ExitCode"] == "2:0"


def process_of(job: str, rank: int) -> int:
    """The process id of a rank of a job, from its environment in /proc."""
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            words = (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode(), b"SLURM_STEP_ID=0"}
        if wanted <= set(words) and b"launch/train.py" in command:
            return int(folder.name)
    raise AssertionError(f"no process of job {job}, rank {rank}")


def test_the_scripts_are_clean_for_shellcheck(tmp_path):
    scripts = [*SCRIPTS.glob("*.sbatch"), SCRIPTS / "job.sh", *Path(__file__).parent.glob("*.sh")]
    assert len(scripts) >= 6
    try:
        done = subprocess.run(
            ["shellcheck", "-x", "-P", str(SCRIPTS), *map(str, scripts)], capture_output=True
        )
    except FileNotFoundError:
        pytest.skip("shellcheck is not installed")
    assert done.returncode == 0, done.stdout.decode()
