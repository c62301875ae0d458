"""Damaged, foreign and malicious checkpoints: one clear line, or the checkpoint before; never code from a
file."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_runs
import torch
from torch import nn

from scalesnn.base import UserError
from scalesnn.parallel import Topology
from scalesnn.parallel.single import SingleStrategy
from scalesnn.training.checkpoint import CheckpointManager, Progress
from scalesnn.training.checkpoint_index import checksum
from scalesnn.training.ema import ModelEma
from scalesnn.training.export import read_weights


class Flags:
    """What a strategy reads of the command line."""

    gradient_accumulation = 1
    clip_grad_norm = None
    sync_bn = False
    on_nan = "stop"
    disable_amp = True


def make_strategy(width: int = 4, opt: str = "sgd", **flags: Any) -> SingleStrategy:
    """A prepared strategy with a small network."""
    torch.manual_seed(width)
    args = Flags()
    args.__dict__.update(flags)
    strategy = SingleStrategy(args, Topology())
    strategy.setup_device("cpu")
    net = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(width * 16, 2))

    def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
        if opt == "sgd":
            return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return torch.optim.AdamW(model.parameters(), lr=0.1)

    strategy.prepare(net, make_optimizer, lambda o: torch.optim.lr_scheduler.StepLR(o, 3))
    return strategy


def train_step(strategy: SingleStrategy, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 3, 6, 6, generator=generator)
    loss = nn.functional.cross_entropy(strategy.model(x), torch.arange(6) % 2)
    strategy.backward(loss)
    strategy.step()
    return float(loss.detach())


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RUN/checkpoints with steps 1 and 2."""
    folder = tmp_path_factory.mktemp("pristine") / "checkpoints"
    strategy = make_strategy()
    manager = CheckpointManager(folder, strategy, ema=ModelEma(strategy, 0.9))
    for step in (1, 2):
        train_step(strategy, step)
        manager.save(Progress(step=step, best_acc1=step / 3), extra={"step": step})
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    shutil.copytree(pristine, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def edit_index(checkpoint: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change an index and give it the right checksum again, as somebody with intent would."""
    path = checkpoint / "index.json"
    document = json.loads(path.read_text())
    edit(document["body"])
    document["sha256"] = checksum(document["body"])
    path.write_text(json.dumps(document))


def shard(checkpoint: Path) -> Path:
    return checkpoint / "rank_00000.safetensors"


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def set_file_name(body: dict[str, Any], name: str) -> None:
    body["files"] = {name: next(iter(body["files"].values()))}
    for entry in body["tensors"].values():
        entry["entries"] = [[start, length, name] for start, length, _ in entry["entries"]]


def pickled(target: Path, sentinel: Path) -> None:
    target.write_bytes(pickle.dumps(Bomb(sentinel)))


DAMAGE: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "shard truncated": (lambda c, _: truncate(shard(c), 1000), "has 1000 bytes instead of"),
    "shard empty": (lambda c, _: truncate(shard(c), 0), "has 0 bytes instead of"),
    "bit flipped in a tensor": (lambda c, _: flip(shard(c), -9), "does not match its checksum"),
    "bit flipped in the header": (lambda c, _: flip(shard(c), 20), "does not match its checksum"),
    "bit flipped in the header's length": (lambda c, _: flip(shard(c), 6), "does not match its checksum"),
    "shard missing": (lambda c, _: shard(c).unlink(), "rank_00000.safetensors is missing"),
    "shard is a folder": (lambda c, _: (shard(c).unlink(), shard(c).mkdir()), "rank_00000.safetensors"),
    "shard of another step": (
        lambda c, _: shutil.copy(shard(c.with_name("step_00000001")), shard(c)),
        "rank_00000.safetensors",
    ),
    "shard is a malicious pickle": (lambda c, s: pickled(shard(c), s), "bytes instead of"),
    "index missing": (lambda c, _: (c / "index.json").unlink(), "no index.json"),
    "index empty": (lambda c, _: truncate(c / "index.json", 0), "not valid JSON"),
    "index truncated": (lambda c, _: truncate(c / "index.json", 500), "not valid JSON"),
    "index is a malicious pickle": (lambda c, s: pickled(c / "index.json", s), "not valid JSON"),
    "index nested without end": (
        lambda c, _: (c / "index.json").write_text("[" * 200_000),
        "not valid JSON",
    ),
    "index of something else": (lambda c, _: (c / "index.json").write_text('{"a": 1}'), "not of scalesnn"),
    "number changed in the index": (
        lambda c, _: (c / "index.json").write_text(
            (c / "index.json").read_text().replace('"step": 2', '"step": 3')
        ),
        "does not match its checksum",
    ),
    "version of the future": (
        lambda c, _: (c / "index.json").write_text(
            (c / "index.json").read_text().replace('"version": 1', '"version": 9')
        ),
        "version 9, this scalesnn reads 1",
    ),
    "file outside the folder": (
        lambda c, _: edit_index(c, lambda b: set_file_name(b, "../../secret.safetensors")),
        "lies elsewhere",
    ),
    "absolute file": (
        lambda c, _: edit_index(c, lambda b: set_file_name(b, "/etc/x.safetensors")),
        "lies elsewhere",
    ),
    "tensor with a hole": (
        lambda c, _: edit_index(c, lambda b: b["tensors"]["model.0.weight"]["entries"][0].__setitem__(1, 5)),
        "does not hold all of model.0.weight",
    ),
    "tensor of negative size": (
        lambda c, _: edit_index(
            c, lambda b: b["tensors"]["model.0.weight"].__setitem__("shape", [-4, 3, 3, 3])
        ),
        "model.0.weight",
    ),
    "unknown number type": (
        lambda c, _: edit_index(c, lambda b: b["tensors"]["model.0.weight"].__setitem__("dtype", "C64")),
        "does not hold all of model.0.weight",
    ),
    "index without tensors": (lambda c, _: edit_index(c, lambda b: b.pop("tensors")), "not complete"),
    "empty folder": (
        lambda c, _: [path.unlink() for path in c.iterdir()],
        "no index.json",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_checkpoint_is_refused_in_one_line(folder: Path, tmp_path: Path, case: str) -> None:
    damage, expected = DAMAGE[case]
    checkpoint = folder / "step_00000002"
    damage(checkpoint, tmp_path / "sentinel")
    strategy = make_strategy()
    before = strategy.full_model_state()
    with pytest.raises(UserError) as caught:
        CheckpointManager(folder, strategy).load(checkpoint)
    message = str(caught.value)
    assert expected in message
    assert str(checkpoint) in message
    assert "\n" not in message
    assert not (tmp_path / "sentinel").exists()
    after = strategy.full_model_state()
    assert all(torch.equal(before[name], after[name]) for name in before), "a refused checkpoint left traces"
    with pytest.raises(UserError, match=r"step_00000002"):
        read_weights(checkpoint)


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_newest_checkpoint_gives_way_to_the_one_before(
    folder: Path, tmp_path: Path, case: str
) -> None:
    DAMAGE[case][0](folder / "step_00000002", tmp_path / "sentinel")
    said: list[str] = []
    progress, extra = CheckpointManager(folder, make_strategy(), notice=said.append).load("latest")
    assert progress.step == 1
    assert extra == {"step": 1}
    assert "step_00000002 is damaged" in said[0]
    assert "step_00000001" in said[-1]
    assert not (tmp_path / "sentinel").exists()


def test_training_refuses_a_damaged_checkpoint_with_exit_code_2(folder: Path, tmp_path: Path) -> None:
    """The command as a user gives it: one line, no traceback, nothing trained."""
    images = small_runs.make_images(tmp_path / "images", 4, 1)
    checkpoint = folder / "step_00000002"
    flip(shard(checkpoint), -9)
    done = small_runs.run("--data-path", images, "--output-dir", tmp_path / "runs", "--resume", checkpoint)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    reason = "rank_00000.safetensors does not match its checksum"
    assert line == f"scalesnn: checkpoint {checkpoint} cannot be used: {reason}"
    assert not list((tmp_path / "runs").glob("*/metrics.jsonl"))


def test_all_checkpoints_damaged_is_an_error(folder: Path) -> None:
    for step in (1, 2):
        truncate(shard(folder / f"step_0000000{step}"), 10)
    with pytest.raises(UserError, match=r"all 2 checkpoints .* are damaged"):
        CheckpointManager(folder, make_strategy()).load("latest")


def test_damaged_checkpoint_is_removed_as_new_ones_are_written(folder: Path) -> None:
    truncate(folder / "step_00000002" / "index.json", 10)
    strategy = make_strategy()
    manager = CheckpointManager(folder, strategy, keep=2, notice=lambda text: None)
    progress, _ = manager.load("latest")
    progress.step = 2
    manager.save(progress)
    progress.step = 3
    manager.save(progress)
    assert sorted(p.name for p in folder.glob("step_*")) == ["step_00000002", "step_00000003"]
    assert CheckpointManager(folder, make_strategy()).load("latest")[0].step == 3


@pytest.mark.parametrize("pointer", ["", "nonsense\n", "../../etc\n", "step_00000009\n"])
def test_pointer_that_points_nowhere_is_done_without(folder: Path, pointer: str) -> None:
    (folder / "latest").write_text(pointer)
    assert CheckpointManager(folder, make_strategy()).load("latest")[0].step == 2


def test_pointer_decides_which_is_latest(folder: Path) -> None:
    (folder / "latest").write_text("step_00000001\n")
    assert CheckpointManager(folder, make_strategy()).load("latest")[0].step == 1


@pytest.mark.parametrize(
    ("width", "opt", "expected"),
    [
        (5, "sgd", r"of another model: 0\.weight is \[4, 3, 3, 3\], here \[5, 3, 3, 3\]"),
        (4, "adamw", "written with the optimizer SGD, this run has AdamW"),
    ],
)
def test_checkpoint_of_another_model_or_optimizer_is_refused(
    folder: Path, width: int, opt: str, expected: str
) -> None:
    with pytest.raises(UserError, match=expected):
        CheckpointManager(folder, make_strategy(width, opt)).load("latest")


def test_missing_and_foreign_paths_are_refused(folder: Path, tmp_path: Path) -> None:
    sentinel = tmp_path / "sentinel"
    pickled(tmp_path / "model.pt", sentinel)
    manager = CheckpointManager(folder, make_strategy())
    with pytest.raises(UserError, match="there is no such folder"):
        manager.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="it is a file, not a folder"):
        manager.load(tmp_path / "model.pt")
    with pytest.raises(UserError, match="holds no checkpoint to resume from"):
        CheckpointManager(tmp_path / "empty", make_strategy()).load("latest")
    assert not sentinel.exists()


def test_no_file_of_a_checkpoint_is_a_pickle(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with pytest.raises(Exception, match=r".*"), path.open("rb") as file:
                pickle.load(file)


def test_checkpoint_that_cannot_be_written_leaves_the_old_ones(folder: Path, monkeypatch: Any) -> None:
    strategy = make_strategy()
    manager = CheckpointManager(folder, strategy)
    progress, _ = manager.load("latest")

    def full_disk(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    progress.step = 3
    with pytest.raises(UserError, match="could not be written: No space left on device"):
        manager.save(progress)
    monkeypatch.undo()
    assert CheckpointManager(folder, make_strategy()).load("latest")[0].step == 2
    manager.save(progress)
    assert CheckpointManager(folder, make_strategy()).load("latest")[0].step == 3
    assert not list(folder.glob(".*"))
