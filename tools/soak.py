"""Kill, signal, start twice and resume trainings at random, and check that nothing is lost or mixed up.

    nice python tools/soak.py --minutes 30 --seed 1

Every life is a fork of this process that runs ``Trainer.main`` on a part of the shipped images: the product's
data, checkpoints, folders and signals, with a small spiking net, so that a life takes a second. What must
hold:

- no step that was saved is lost: a run goes on from what was saved last in its folder, or from later;
- each step's loss is that of the unbroken run, however often it was killed before;
- a folder has one writer at a time;
- folders that do not say that they are runs stay as they are, byte for byte;
- exit codes are 0, 2 for a folder in use, 75, 128 + signal, or the signal itself; no traceback;
- in the end metrics.jsonl has every step once, and every finished epoch is evaluated once.

Prints one JSON object; exit code 1 if anything was found.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn

from scalesnn import functional, layer, neuron
from scalesnn.data.opening import SAMPLE
from scalesnn.model.train_classify import Trainer

NAMES = ("exp", "exp-2", "sweep")
SEEDS = {"exp": 1, "exp-2": 2, "sweep": 3}
EPOCHS, BATCH, IMAGES = 4, 50, 60  # images of a class
STEPS = EPOCHS * 10 * IMAGES // BATCH


class SoakTrainer(Trainer):
    """A small spiking net, and a diary of what the run does."""

    diary: Path

    def load_model(self, args: Any, num_classes: int) -> nn.Module:
        """Convolution, normalisation, neurons, classifier."""
        net = nn.Sequential(
            layer.Conv2d(3, 4, 3, stride=2),
            layer.BatchNorm2d(4),
            neuron.IFNode(),
            layer.AdaptiveAvgPool2d(2),
            layer.Flatten(),
            layer.Linear(16, num_classes),
        )
        functional.set_step_mode(net, "m")
        return net

    def preprocess_train_sample(self, args: Any, x: torch.Tensor) -> torch.Tensor:
        """Two time-steps."""
        return functional.repeat_over_time(x, 2)

    def preprocess_test_sample(self, args: Any, x: torch.Tensor) -> torch.Tensor:
        """Two time-steps."""
        return functional.repeat_over_time(x, 2)

    def process_model_output(self, args: Any, y: torch.Tensor) -> torch.Tensor:
        """The mean over time."""
        return y.mean(0)

    def before_train_one_epoch(self, args: Any, model: nn.Module, epoch: int) -> None:
        """Begin the diary."""
        self.listen()

    def before_test_one_epoch(self, args: Any, model: nn.Module, epoch: int) -> None:
        """Begin the diary."""
        self.listen()
        self.note("evaluates", self.run.progress.step)

    def listen(self) -> None:
        """Write down every save and every step from here on."""
        if hasattr(self, "listening"):
            return
        self.listening = True
        self.note("open", self.run.progress.step, seed=self.run.args.seed)
        save, log_step = self.run.checkpoints.save, self.run.tracker.log_step

        def saved(*args: Any, **kwargs: Any) -> Path:
            path = save(*args, **kwargs)
            self.note("saved", self.run.progress.step)
            return path

        def logged(record: dict[str, Any]) -> None:
            self.note("step", record["step"], loss=float(record["loss"]))
            log_step(record)

        self.run.checkpoints.save = saved  # type: ignore[method-assign, assignment]
        self.run.tracker.log_step = logged  # type: ignore[method-assign]

    def note(self, what: str, step: int, **more: Any) -> None:
        """One line of the diary, whole and in order among all processes."""
        line = {"pid": os.getpid(), "run": self.run.folder.name, "what": what, "step": step, **more}
        handle = os.open(self.diary, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(handle, (json.dumps(line) + "\n").encode())
        os.close(handle)


def slow_disk() -> None:
    """Let every fsync take a few milliseconds, so that kills meet it."""
    real = os.fsync

    def fsync(handle: int) -> None:
        time.sleep(0.003)
        real(handle)

    os.fsync = fsync


def life(root: Path, words: list[str], environment: dict[str, str], log: Path) -> int:
    """Fork a process that trains; returns its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.environ.update(environment)
        trainer = SoakTrainer()
        trainer.diary = root / "diary"
        trainer.main(trainer.get_args_parser().parse_args(words))
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except KeyboardInterrupt:
        code = 130
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def common(root: Path, output: Path) -> list[str]:
    """The settings of every life."""
    return (
        f"--data-path {root / 'data'} --output-dir {output} --loader torchvision --workers 0 --device cpu "
        f"--wandb disabled --batch-size {BATCH} --epochs {EPOCHS} --save-every 3 --metrics-every 1 "
        "--spike-metrics-every 0 --train-crop-size 16 --val-resize-size 16 --val-crop-size 16 "
        "--auto-augment none --lr 0.02 --lr-warmup-epochs 1 --hang-timeout 120 --no-cpu-binding "
        "--disable-uda --max-requeues 1000"
    ).split()


def make_data(root: Path) -> None:
    """A part of the shipped images."""
    for split, count in (("train", IMAGES), ("val", 40)):
        for folder in (SAMPLE / split).iterdir():
            target = root / "data" / split / folder.name
            target.mkdir(parents=True)
            for image in sorted(folder.iterdir())[:count]:
                shutil.copy(image, target)


def make_foreign(output: Path) -> None:
    """Folders with names like those of runs, which are somebody else's."""
    for name in ("exp-3", "sweep", "exp-thesis", "sweep-2"):
        (output / name / "checkpoints" / "step_00000999").mkdir(parents=True)
        (output / name / "notes.txt").write_text(f"{name} is mine")
    (output / "sweep" / "checkpoints" / "step_00000999").rmdir()  # else --resume latest is refused, rightly


def fingerprint(folder: Path) -> str:
    """Changes with anything in a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_mtime_ns}\n".encode())
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


def choose(
    draw: random.Random, output: Path, job: int, restarts: Counter[str]
) -> tuple[list[str], dict[str, str]]:
    """Flags and environment of a life."""
    name = draw.choice(NAMES)
    words = ["--run-name", name, "--seed", str(SEEDS[name])]
    environment: dict[str, str] = {}
    kind = draw.choices(("latest", "fresh", "path", "job", "clean"), (10, 2, 3, 4, 1))[0]
    if kind == "latest":
        words += ["--resume", "latest"]
    elif kind == "path":
        begun = sorted(
            p.parent for p in output.glob(f"{name}/run.json") if (p.parent / "checkpoints/latest").exists()
        )
        words += ["--resume", str(draw.choice(begun))] if begun else []
    elif kind == "job":  # its script says --clean; from its second start on it is a restart
        job_name = f"{name}-job{job % 3}"
        environment = {"SLURM_JOB_ID": job_name, "SLURM_RESTART_COUNT": str(restarts[job_name])}
        restarts[job_name] += 1
        words[1] = job_name
        words += ["--clean"]
    elif kind == "clean":
        words += ["--clean"]
    return words, environment


def trouble(draw: random.Random, output: Path, child: int) -> str:
    """Wait a while, then do something to a process; returns what."""
    what = draw.choices(("kill", "TERM", "USR1", "INT", "INT twice", "nothing"), (8, 3, 2, 2, 1, 1))[0]
    moment = draw.choice(("any", "any", "writing", "evaluation"))
    deadline = time.monotonic() + draw.uniform(0.2, 4.0)
    while time.monotonic() < deadline and alive(child):
        if moment == "writing" and any(output.glob("*/checkpoints/.writing_*")):
            break
        time.sleep(0.002 if moment == "writing" else 0.02)
    if moment == "evaluation":
        diary = output.parent / "diary"
        deadline = time.monotonic() + 4
        while time.monotonic() < deadline and alive(child):
            last = diary.read_bytes().splitlines()[-1:] if diary.exists() else []
            if last and b'"evaluates"' in last[0]:
                break
            time.sleep(0.01)
    number = {"kill": signal.SIGKILL, "TERM": signal.SIGTERM, "USR1": signal.SIGUSR1}.get(what, signal.SIGINT)
    if what != "nothing":
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)
            if what == "INT twice":
                time.sleep(draw.uniform(0, 0.5))
                os.kill(child, number)
    return f"{what} ({moment})"


def alive(child: int) -> bool:
    """Whether a child still runs."""
    try:
        return Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def reap(child: int, patience: float = 240) -> int:
    """Wait for a process; its exit code, or minus the signal. One that does not end is killed: -99."""
    deadline = time.monotonic() + patience
    while alive(child):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return -99
        time.sleep(0.02)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def check_diary(
    diary: Path, expected: dict[int, dict[int, float]], cleaned: Counter[str]
) -> tuple[list[str], Counter[str]]:
    """What the diary says against the rules, and how much of it there is."""
    found: list[str] = []
    counts: Counter[str] = Counter()
    writer: dict[str, int] = {}
    gone: set[tuple[str, int]] = set()
    saved: dict[str, int] = {}
    reached: dict[str, int] = {}
    seeds: dict[str, int] = {}
    for line in map(json.loads, diary.read_text().splitlines()):
        run, pid, step, what = line["run"], line["pid"], line["step"], line["what"]
        counts[what] += 1
        if (run, pid) in gone:
            found.append(f"{run}: process {pid} wrote after process {writer[run]} had begun")
        if what == "open":
            if run in writer:
                gone.add((run, writer[run]))
            if step == 0 and saved.get(run):
                cleaned[run] += 1  # allowed only where --clean was asked for: counted by the caller
                saved[run] = 0
            elif not saved.get(run, 0) <= step <= max(reached.get(run, 0), saved.get(run, 0)):
                found.append(f"{run}: resumed at step {step}, but {saved.get(run)} was saved")
            writer[run], seeds[run], reached[run] = pid, line["seed"], step
        elif what == "step":
            reached[run] = step
            want = expected[seeds[run]].get(step)
            if want is None or abs(want - line["loss"]) > 1e-6 * max(1.0, abs(want)):
                found.append(f"{run}: step {step} has the loss {line['loss']}, the unbroken run {want}")
        elif what == "saved":
            saved[run] = step
    return found, counts


def check_metrics(output: Path) -> list[str]:
    """Gaps and repetitions in what finished runs wrote."""
    found: list[str] = []
    for path in output.glob("*/metrics.jsonl"):
        records = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        steps = [r["step"] for r in records if r["kind"] == "step"]
        if steps != list(range(1, len(steps) + 1)):
            found.append(f"{path}: steps are {steps[:80]}")
        tests = [r["step"] for r in records if r["kind"] == "epoch" and r["split"] == "test"]
        if len(set(tests)) != len(tests):
            found.append(f"{path}: evaluated twice after steps {tests}")
        per_epoch = STEPS // EPOCHS
        due = [step for step in range(per_epoch, len(steps) + 1, per_epoch) if step < len(steps)]
        if missing := [step for step in due if step not in tests]:
            found.append(f"{path}: not evaluated after steps {missing}")
    return found


def main() -> int:
    """Run the soak; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30, help="how long (30)")
    parser.add_argument("--seed", type=int, default=1, help="of the kills and starts (1)")
    parser.add_argument(
        "--folder", type=Path, help="where to work (default: a temporary folder, deleted at the end)"
    )
    args = parser.parse_args()
    root = args.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    output = root / "runs"
    output.mkdir(parents=True)
    torch.set_num_threads(1)
    make_data(root)
    expected: dict[int, dict[int, float]] = {}
    for seed in SEEDS.values():
        whole = ["--run-name", "whole", "--seed", str(seed), "--output-dir", str(root / f"whole{seed}")]
        code = reap(life(root, [*common(root, output), *whole], {}, root / "whole.log"), 600)
        assert code == 0, (root / "whole.log").read_text()
        lines = map(json.loads, (root / "diary").read_text().splitlines())
        expected[seed] = {line["step"]: line["loss"] for line in lines if line["what"] == "step"}
        (root / "diary").unlink()
        assert len(expected[seed]) == STEPS
    slow_disk()
    make_foreign(output)
    foreign = {path: fingerprint(path) for path in output.iterdir()}
    draw, found, kinds, codes = random.Random(args.seed), [], Counter(), Counter()
    restarts: Counter[str] = Counter()
    cleans = lives = doubles = 0
    end = time.monotonic() + 60 * args.minutes
    while time.monotonic() < end:
        (root / "lives.log").unlink(missing_ok=True)
        plans = [choose(draw, output, lives, restarts) for _ in range(draw.choice((1, 1, 1, 2, 2, 3)))]
        if len(plans) > 1 and draw.random() < 0.6:  # one command line, submitted twice
            plans = [plans[0]] * len(plans)
        doubles += len(plans) > 1
        cleans += sum("--clean" in words for words, _ in plans)
        children = []
        for words, environment in plans:
            children.append(life(root, [*common(root, output), *words], environment, root / "lives.log"))
            if draw.random() < 0.3:
                time.sleep(draw.uniform(0, 1))
        for child in children:
            kinds[trouble(draw, output, child)] += 1
        for child in children:
            codes[reap(child)] += 1
        lives += len(children)
        said = (root / "lives.log").read_text(errors="replace") if (root / "lives.log").exists() else ""
        if "Traceback" in said:
            found.append(f"a traceback: {said[said.index('Traceback') :][:1500]}")
        for line in re.findall(r"^scalesnn: (.*)$", said, re.M):
            gone = "there is no such folder" in line  # another process was asked to --clean it just then
            if "damaged" in line or ("cannot be used" in line and not gone):
                found.append(line)
        for path, before in foreign.items():
            if fingerprint(path) != before:
                found.append(f"{path} was changed")
                foreign[path] = fingerprint(path)
        if len(found) > 20:
            break
    allowed = {0, 2, 75, 130, 138, 143, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGUSR1, -signal.SIGINT}
    found += [f"exit code {code}, {count} times" for code, count in codes.items() if code not in allowed]
    # what is left goes on to its end, then its metrics are whole
    for name in NAMES:
        words = ["--run-name", name, "--seed", str(SEEDS[name]), "--resume", "latest"]
        code = reap(life(root, [*common(root, output), *words], {}, root / "last.log"), 300)
        if code:
            found.append(
                f"{name}: the last resume ended with {code}: {(root / 'last.log').read_text()[-800:]}"
            )
    fresh: Counter[str] = Counter()
    problems, counts = check_diary(root / "diary", expected, fresh)
    found += problems + check_metrics(output)
    if sum(fresh.values()) > cleans:
        found.append(f"{sum(fresh.values())} runs began again, but --clean was asked for {cleans} times")
    report = {
        "minutes": args.minutes,
        "seed": args.seed,
        "lives": lives,
        "started together": doubles,
        "troubles": dict(kinds.most_common()),
        "exit codes": {str(code): count for code, count in sorted(codes.items())},
        "steps": counts["step"],
        "saved": counts["saved"],
        "evaluations": counts["evaluates"],
        "runs": sum(1 for _ in output.glob("*/run.json")),
        "found": found,
    }
    print(json.dumps(report, indent=1))
    if args.folder is None:
        shutil.rmtree(root)
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
