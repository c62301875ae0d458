"""Run folders: each says whose it is, one process at a time owns it, nothing saved is written over."""

import argparse
import contextlib
import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import time

import pytest
import yaml

from scalesnn import neuron, surrogate
from scalesnn.base import UserError
from scalesnn.training import run_lock
from scalesnn.training.run_config import describe_run, write_config
from scalesnn.training.run_folder import Request, look_up, open_folder
from scalesnn.training.run_lock import FolderInUseError, RunLock


def ask(folder, name="net", **given):
    return Request(str(folder), name, **given)


def opened(request):
    """What ``open_folder`` chose; its lock is given back."""
    chosen = open_folder(request)
    chosen.lock.release()
    return chosen


def run(folder, name="net", *, steps=(), **given):
    """A run that came and went: it began to train and saved checkpoints of some steps."""
    chosen = opened(ask(folder, name, **given))
    (chosen.path / "config.yaml").touch()
    for step in steps:
        (chosen.path / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    return chosen.path


@contextlib.contextmanager
def child(work):
    """A process that does ``work`` and then only lives; yields its process id and what ``work`` returned."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writing, f"{work()}\n".encode())
            time.sleep(100)
        finally:
            os._exit(0)
    os.close(writing)
    try:
        with os.fdopen(reading) as said:
            yield pid, said.readline().strip()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def living(folder):
    """A process that owns ``folder``."""
    return child(lambda: RunLock.acquire(folder))


# ---- identity ----


def test_a_taken_name_gets_a_number(tmp_path):
    assert [run(tmp_path).name for _ in range(3)] == ["net", "net-2", "net-3"]


def test_a_run_that_was_refused_leaves_its_name_to_the_next(tmp_path):
    opened(ask(tmp_path))
    assert opened(ask(tmp_path)).path.name == "net"


def test_numbers_are_counted_not_spelt(tmp_path):
    for _ in range(10):
        last = run(tmp_path, steps=[1])
    assert last.name == "net-10"
    assert opened(ask(tmp_path, resume="latest")).path.name == "net-10"
    assert run(tmp_path).name == "net-11"


def test_a_name_that_ends_in_a_number_is_a_name_of_its_own(tmp_path):
    for name in ("seed-1", "seed-2", "seed-3"):
        run(tmp_path, name, steps=[1])
    assert run(tmp_path, "seed", clean=True).name == "seed"
    assert opened(ask(tmp_path, "seed", resume="latest", settings={"lr": 1})).path.name == "seed-4"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["seed", "seed-1", "seed-2", "seed-3", "seed-4"]
    assert all((tmp_path / f"seed-{n}" / "checkpoints").is_dir() for n in (1, 2, 3))


def test_resume_latest_does_not_take_another_experiment_s_folder(tmp_path):
    run(tmp_path, "exp", steps=[4])
    run(tmp_path, "exp-2", steps=[9])
    assert opened(ask(tmp_path, "exp", resume="latest")).path.name == "exp"


@pytest.mark.parametrize("foreign", ["folder", "file", "link", "old run", "other json"])
def test_what_does_not_say_that_it_is_a_run_is_left_alone(tmp_path, foreign):
    other = tmp_path / "elsewhere"
    other.mkdir()
    if foreign == "file":
        (tmp_path / "net").write_text("thesis")
    elif foreign == "link":
        run(tmp_path / "elsewhere", "mine", steps=[1])
        (tmp_path / "net").symlink_to(other / "mine")
    else:
        (tmp_path / "net").mkdir()
        (tmp_path / "net" / "thesis").write_text("!")
    if foreign == "old run":
        (tmp_path / "net" / "config.yaml").touch()
    if foreign == "other json":
        (tmp_path / "net" / "run.json").write_text('{"base": "net", "number": 1}')
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    for given in ({}, {"clean": True}, {"resume": "latest"}):
        chosen = opened(ask(tmp_path, **given))
        assert chosen.path.name.startswith("net-")
    assert set(before) <= {str(p) for p in tmp_path.rglob("*")}


def test_a_copied_or_renamed_run_bears_its_new_name_only(tmp_path):
    folder = run(tmp_path, steps=[1], job="slurm 7")
    subprocess.run(["cp", "-r", str(folder), str(tmp_path / "net-old")], check=True)
    subprocess.run(["cp", "-r", str(folder), str(tmp_path / "net-5")], check=True)
    assert opened(ask(tmp_path, job="slurm 7", restart=True)).path.name == "net"
    RunLock.acquire(tmp_path / "net-old").release()
    opened(ask(tmp_path, resume="latest", name="net-old"))


def test_clean_deletes_the_runs_of_the_name_and_no_copy(tmp_path):
    for _ in range(2):
        folder = run(tmp_path, steps=[1])
    run(tmp_path, "network", steps=[1])
    subprocess.run(["cp", "-r", str(folder), str(tmp_path / "net-kept")], check=True)
    assert opened(ask(tmp_path, clean=True)).path.name == "net"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net", "net-kept", "network"]
    assert not (tmp_path / "net" / "checkpoints").exists()
    assert (tmp_path / "net-kept" / "checkpoints").exists()


def test_of_several_runs_of_a_name_the_one_with_these_settings_is_resumed(tmp_path):
    for lr in (0.1, 0.2, 0.3):
        run(tmp_path, steps=[1], settings={"lr": lr})
    for lr, name in ((0.2, "net-2"), (0.1, "net"), (0.5, "net-3")):
        chosen = opened(ask(tmp_path, resume="latest", settings={"lr": lr}))
        assert chosen.path.name == name


def test_a_run_killed_before_its_first_checkpoint_does_not_hide_the_one_before(tmp_path):
    run(tmp_path, steps=[3])
    run(tmp_path)
    assert opened(ask(tmp_path, resume="latest")).path.name == "net"


def test_resume_best_without_a_run_ends_and_makes_no_folder(tmp_path):
    folder = run(tmp_path, settings={"lr": 0.1, "T": 4}, steps=[1])
    with pytest.raises(UserError, match=rf"nothing to resume in .*; the nearest is {folder}, with other T"):
        open_folder(ask(tmp_path, "other", settings={"lr": 0.1, "T": 2}, resume="best"))
    assert list(tmp_path.iterdir()) == [folder]


def test_a_fresh_start_names_the_nearest_run(tmp_path):
    run(tmp_path, "far", steps=[1], settings={"lr": 1, "tau": 3, "T": 8, "opt": "adamw"})
    run(tmp_path, "near", steps=[1], settings={"lr": 0.2})
    (notice,) = opened(ask(tmp_path, resume="latest", settings={"lr": 0.1})).notices
    assert "starts fresh" in notice
    assert f"the nearest is {tmp_path / 'near'}, with other lr" in notice


def test_a_run_of_before_is_not_resumed_by_name_but_by_its_path(tmp_path):
    (tmp_path / "net" / "checkpoints" / "step_00000001").mkdir(parents=True)
    with pytest.raises(UserError, match=re.escape(f"--resume {tmp_path / 'net'} begins a new run")):
        opened(ask(tmp_path, resume="latest"))
    chosen = opened(ask(tmp_path, resume=str(tmp_path / "net")))
    assert (chosen.path.name, chosen.resume) == ("net-2", str(tmp_path / "net"))


@pytest.mark.parametrize("path", ["", "checkpoints", "checkpoints/latest", "checkpoints/step_00000002"])
def test_resume_of_a_path_goes_on_in_its_folder_only_below_the_same_output(tmp_path, path):
    folder = run(tmp_path / "a", steps=[2])
    (folder / "checkpoints" / "latest").write_text("step_00000002\n")
    chosen = opened(ask(tmp_path / "a", "other", resume=str(folder / path)))
    assert chosen.path == folder
    assert opened(ask(tmp_path / "b", resume=str(folder / path))).path == tmp_path / "b" / "net"


def test_a_name_that_is_given_begins_a_run_of_that_name_with_the_checkpoint(tmp_path):
    folder = run(tmp_path, steps=[2])
    chosen = opened(ask(tmp_path, "fork", named=True, resume=str(folder)))
    assert (chosen.path.name, chosen.resume) == ("fork", str(folder))


def test_a_path_that_leads_nowhere_is_refused_before_a_folder_is_made(tmp_path):
    for path in (tmp_path / "no", tmp_path):
        with pytest.raises(UserError, match=re.escape(str(path))):
            opened(ask(tmp_path / "runs", resume=str(path)))
    assert list((tmp_path / "runs").iterdir()) == []


def test_clean_and_resume_of_the_same_contradict_each_other(tmp_path):
    folder = run(tmp_path, steps=[1])
    for resume in ("latest", "best", str(folder)):
        with pytest.raises(UserError, match="--clean deletes"):
            opened(ask(tmp_path, clean=True, resume=resume))
    assert (folder / "checkpoints").exists()


def test_looking_changes_nothing(tmp_path):
    folder = run(tmp_path, steps=[1])
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert look_up(ask(tmp_path)).path.name == "net-2"
    assert look_up(ask(tmp_path, clean=True)).path.name == "net"
    assert look_up(ask(tmp_path, resume="latest")).path == folder
    assert look_up(ask(tmp_path, resume=str(folder))).path == folder
    assert look_up(ask(tmp_path / "none")).path == tmp_path / "none" / "net"
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_an_output_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output-dir"):
        opened(ask(tmp_path / "file" / "runs"))


# ---- ownership ----


def test_a_folder_has_one_owner_and_is_free_when_that_is_killed(tmp_path):
    folder = run(tmp_path, steps=[1])
    with living(folder) as (pid, _):
        for resume in ("latest", "best", str(folder)):
            with pytest.raises(FolderInUseError, match=f"process {pid} on host {socket.gethostname()}"):
                open_folder(ask(tmp_path, resume=resume))
        with pytest.raises(FolderInUseError, match=str(pid)):
            open_folder(ask(tmp_path, clean=True))
        assert opened(ask(tmp_path)).path.name == "net-2"
    assert opened(ask(tmp_path, resume="latest")).path == folder


def test_clean_deletes_nothing_if_one_of_the_runs_lives(tmp_path):
    folders = [run(tmp_path, steps=[1]) for _ in range(3)]
    with living(folders[2]), pytest.raises(FolderInUseError):
        open_folder(ask(tmp_path, clean=True))
    assert all((folder / "checkpoints").exists() for folder in folders)
    assert opened(ask(tmp_path, clean=True)).path.name == "net"


def test_one_process_cannot_own_a_folder_twice_nor_lose_it_by_asking(tmp_path):
    first = open_folder(ask(tmp_path))
    with pytest.raises(FolderInUseError, match="this process"):
        RunLock.acquire(first.path, patience=0)

    def try_it():
        run_lock._held.clear()  # of the parent
        return RunLock._try(first.path) is not None

    with child(try_it) as (_, said):
        assert said == "False"
    first.lock.release()
    with child(try_it) as (_, said):
        assert said == "True"


def test_a_child_of_the_owner_does_not_keep_the_folder(tmp_path):
    """A data loader's process that outlives a killed training."""
    folder = run(tmp_path, steps=[1])

    def own_it_and_fork():
        lock = RunLock.acquire(folder)
        worker = os.fork()
        if worker == 0:
            time.sleep(100)
            os._exit(lock is None)
        return worker

    with child(own_it_and_fork) as (_, worker), pytest.raises(FolderInUseError):
        open_folder(ask(tmp_path, resume="latest"))
    try:
        assert opened(ask(tmp_path, resume="latest")).path == folder
    finally:
        os.kill(int(worker), signal.SIGKILL)


@pytest.mark.parametrize("resume", [None, "latest"])
def test_of_runs_that_start_at_the_same_moment_each_has_its_folder(tmp_path, resume):
    """Four processes, one gate: four names; of those that resume one begins, and the others are refused."""
    gate = time.monotonic() + 0.3

    def start():
        while time.monotonic() < gate:
            time.sleep(0)
        try:
            return open_folder(ask(tmp_path, resume=resume)).path.name
        except FolderInUseError as error:
            return error

    with contextlib.ExitStack() as stack:
        said = [stack.enter_context(child(start))[1] for _ in range(4)]
    names = sorted(line for line in said if " " not in line)
    assert names == (["net", "net-2", "net-3", "net-4"] if resume is None else ["net"])
    assert all("in use by process" in line for line in said if " " in line)
    assert sorted(p.name for p in tmp_path.iterdir()) == names


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    (notice,) = opened(ask(tmp_path)).notices
    assert "no locks on its file system" in notice


# ---- restarts ----


def test_a_restart_goes_on_in_the_job_s_own_folder_and_does_not_clean_or_rewind(tmp_path):
    first = {"job": "slurm 7", "settings": {"lr": 1}}
    start = run(tmp_path, "start", steps=[5])
    for given in ({"clean": True}, {"resume": str(start)}, {"resume": "latest"}, {}):
        name = f"net{len(given)}{given.get('resume', '')[-4:]}"
        folder = run(tmp_path, name, named=True, **first, **given)
        again = opened(ask(tmp_path, name, named=True, restart=True, **first, **given))
        # killed before its first checkpoint: it begins as it began
        assert (again.path, again.resume) == (folder, given["resume"] if name.endswith("tart") else None)
        (folder / "checkpoints" / "step_00000009").mkdir(parents=True)
        again = opened(ask(tmp_path, name, named=True, restart=True, **first, **given))
        assert (again.path, again.resume) == (folder, "latest")
        assert (folder / "checkpoints" / "step_00000009").exists()
        first["job"] += "0"


@pytest.mark.parametrize("resume", [None, "latest", "best"])
def test_ranks_that_start_again_together_take_their_folder_and_what_they_resumed(tmp_path, resume):
    run(tmp_path, steps=[1])
    folder = run(tmp_path, steps=[3])
    run(tmp_path, "net", steps=[1])
    again = opened(ask(tmp_path, again=str(folder), resume=resume, clean=resume is None))
    assert again.path == folder
    assert again.resume == (resume or "latest")  # its own checkpoint of the first steps
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 3


def test_two_trainings_of_one_job_find_their_own_folders(tmp_path):
    for lr in (0.1, 0.2, 0.1):
        run(tmp_path, steps=[1], job="slurm 7", settings={"lr": lr})
    restart = {"job": "slurm 7", "restart": True}
    assert opened(ask(tmp_path, settings={"lr": 0.2}, **restart)).path.name == "net-2"
    twins = [open_folder(ask(tmp_path, settings={"lr": 0.1}, **restart)) for _ in range(2)]
    assert [twin.path.name for twin in twins] == ["net-3", "net"]


def test_first_starts_are_remembered_in_the_run(tmp_path):
    folder = run(tmp_path, clean=True, job="slurm 7")
    (start,) = json.loads((folder / "run.json").read_text())["starts"]
    assert (start["job"], start["clean"], start["resume"]) == ("slurm 7", True, None)


# ---- config.yaml ----


def test_config_tells_settings_neurons_surrogates_and_versions(tmp_path):
    node = neuron.LIFNode(tau=3.0, v_threshold=0.7, surrogate_function=surrogate.ATan(alpha=4.0))
    config = describe_run(argparse.Namespace(lr=0.1, model="net", explicit={"lr"}), node, strategy="single")
    write_config(tmp_path, config)
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert written == config
    assert written["settings"] == {"lr": 0.1, "model": "net"}
    (entry,) = written["neurons"]
    assert entry["type"] == "LIFNode"
    assert "tau=3.0" in entry["settings"]
    assert "0.7" in entry["settings"]
    assert "alpha=4.0" in entry["surrogate"]
    assert written["versions"]["torch"]


def test_a_resumed_run_keeps_the_earlier_config(tmp_path):
    for lr in (0.1, 0.1, 0.2, 0.3):
        write_config(tmp_path, {"lr": lr})
    assert sorted(os.listdir(tmp_path)) == ["config.1.yaml", "config.2.yaml", "config.yaml"]
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {"lr": 0.3}
