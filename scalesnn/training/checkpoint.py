"""Checkpoints that survive: one format for every strategy and any number of ranks.

``save`` writes to a hidden temporary folder, makes every file durable, renames the folder, and only then
moves the pointer ``latest``; so a checkpoint is complete or it is not there. ``load("latest")`` checks
every byte against its checksum, and where the newest checkpoint is damaged takes the one before it and says
so::

    RUN/checkpoints/
      step_00001200/   step_00001234/      (see checkpoint_storage)
      latest           a line of text: step_00001234
      best             a line of text: step_00001200

An epoch is saved first and evaluated then: ``mark`` notes the outcome in the checkpoint.
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from scalesnn.base import UserError
from scalesnn.parallel.state import Shard, StateLayoutError
from scalesnn.parallel.strategy import Strategy, first_line
from scalesnn.training.checkpoint_index import (
    DTYPES,
    DamagedCheckpointError,
    Index,
    sync_folder,
    write_text_durably,
)
from scalesnn.training.checkpoint_storage import (
    RunsLoadPlanner,
    SafetensorsReader,
    SafetensorsWriter,
    ShardsSavePlanner,
)
from scalesnn.training.data_identity import check_data
from scalesnn.training.random_state import random_state, restore_random_state

if TYPE_CHECKING:
    from scalesnn.training.ema import ModelEma

__all__ = ["CheckpointManager", "Progress", "checkpoint_folders", "find_checkpoints", "newest_first"]

WRITING = ".writing_"
RETIRED = ".retired_"
EVALUATION = "evaluation.json"  # beside a checkpoint's index: best accuracies up to and with it


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        epoch, batch: the epoch, and how many of its batches (per rank) are done.
        step: updates of the weights so far.
        images_seen: by all ranks together.
        best_acc1: best test top-1 so far, in per cent; of the averaged weights too where those are kept.
        global_batch: images per batch over all ranks when this was written; on other ranks ``batch`` is
            converted.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    images_seen: int = 0
    best_acc1: float = 0.0
    best_ema_acc1: float = 0.0
    global_batch: int = 0

    def moved_to(self, global_batch: int) -> Progress:
        """The same place in the data for another global batch.

        Raises:
            UserError: the place lies amid a batch of the new size.
        """
        if not self.global_batch or self.global_batch == global_batch:
            return replace(self, global_batch=global_batch)
        images = self.batch * self.global_batch
        if images % global_batch:
            raise UserError(
                f"the checkpoint stands at image {images} of epoch {self.epoch}, which is no whole number of "
                f"batches of {global_batch}; resume with batch size × processes = {self.global_batch}"
            )
        return replace(self, batch=images // global_batch, global_batch=global_batch)


class CheckpointManager:
    """Writes and reads the checkpoints of a run; all methods but ``latest`` are collective.

    Args:
        folder: RUN/checkpoints; made when first written to.
        strategy: whose model and optimizer are saved.
        keep: how many of the newest to keep, besides the best.
        ema: averaged weights, saved along with the rest.
        background: write in a thread while training goes on; values are copied to the CPU first.
        notice: told of a damaged checkpoint and of changed data (rank 0).
        data: what the run trains on (``describe_data``), kept in each checkpoint and compared by ``load``.
    """

    def __init__(
        self,
        folder: Path | str,
        strategy: Strategy,
        keep: int = 2,
        *,
        ema: ModelEma | None = None,
        background: bool = False,
        notice: Callable[[str], None] | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.data = data
        self.strategy, self.keep, self.ema = strategy, keep, ema
        self.background = background
        self.notice = notice or (lambda text: print(f"scalesnn: {text}", file=sys.stderr, flush=True))
        self.loaded: Path | None = None  # the checkpoint that ``load`` took
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._group: Any = None
        if background and dist.is_initialized():
            self._group = dist.new_group(backend="gloo")  # the writer's own, beside that of training

    # ---- writing ----

    def mark(self, checkpoint: Path, progress: Progress, *, is_best: bool) -> None:
        """Note that a checkpoint was evaluated after it had been saved.

        Args:
            checkpoint: what ``save`` returned.
            progress: with the best accuracies so far, which ``load`` then gives back.
            is_best: let the pointer ``best`` name it.

        Raises:
            UserError: it cannot be written.
        """
        self.wait()
        error = None
        if self.strategy.is_main:
            values = {"best_acc1": progress.best_acc1, "best_ema_acc1": progress.best_ema_acc1}
            try:
                if is_best:  # first: killed between the two, the run evaluates it again
                    write_text_durably(self.folder / "best", checkpoint.name + "\n")
                write_text_durably(checkpoint / EVALUATION, json.dumps(values) + "\n")
                self._prune()
            except OSError as problem:
                error = f"{checkpoint} cannot be written to: {problem.strerror or problem}"
        self._agree(error)

    def save(
        self, progress: Progress, *, extra: Mapping[str, Any] | None = None, is_best: bool = False
    ) -> Path:
        """Write a checkpoint of this moment.

        Args:
            progress: where the run stands.
            extra: plain values to be kept with it; ``load`` gives them back.
            is_best: let the pointer ``best`` name it.

        Returns:
            the checkpoint's folder (complete on return, unless writing goes on in the background).

        Raises:
            UserError: it cannot be written (no space, no permission); checkpoints written before are
                untouched.
        """
        self.wait()
        state = self.strategy.train_state()
        shards = dict(state.shards)
        if self.ema is not None:
            shards.update(self.ema.shards())
        shards.update(self._random_shards())
        plain = {
            "progress": asdict(progress),
            "train": state.plain,
            "ema": self.ema.plain() if self.ema is not None else None,
            "extra": dict(extra or {}),
            "data": self.data,
            "world_size": self.strategy.world_size,
            "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        }
        plain = copy.deepcopy(plain)  # of this moment, though it may be written a little later
        name = f"step_{progress.step:08d}"
        target = self.folder / name
        error = self._make_room(name) if self.strategy.is_main else None
        self._agree(error)
        plain["serial"] = self._next_serial()
        shapes = {tensor: shard.shape for tensor, shard in shards.items()}

        def commit() -> None:
            self._commit(name, is_best)

        writer = SafetensorsWriter(
            self.folder / f"{WRITING}{name}", self.strategy.rank, shapes, plain, commit
        )
        if self.background:
            shards = {n: Shard(s.values.detach().cpu().clone(), s.start, s.shape) for n, s in shards.items()}
            self._thread = threading.Thread(target=self._write, args=(shards, writer), name="checkpoint")
            self._thread.start()
        else:
            self._write(shards, writer)
            self.wait()
        return target

    def wait(self) -> None:
        """Wait until a checkpoint that is being written in the background is complete.

        Raises:
            UserError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise UserError(
                f"the checkpoint in {self.folder} could not be written: {root_cause(error)}"
            ) from error

    def _write(self, shards: dict[str, Shard], writer: SafetensorsWriter) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch explains that without a process group it saves as one
                dcp.save(
                    shards,
                    storage_writer=writer,
                    planner=ShardsSavePlanner(),
                    process_group=self._group,
                    no_dist=self.strategy.world_size == 1,
                )
        except (Exception, dcp.CheckpointException) as error:
            self._error = error

    def _make_room(self, name: str) -> str | None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in (*self.folder.glob(f"{WRITING}*"), *self.folder.glob(f"{RETIRED}*")):
                shutil.rmtree(leftover)
            for leftover in self.folder.glob(".*.tmp"):
                leftover.unlink()
            (self.folder / f"{WRITING}{name}").mkdir()
        except OSError as error:
            return f"checkpoints cannot be written to {self.folder}: {error.strerror or error}"
        return None

    def _agree(self, error: str | None) -> None:
        """Raise on all ranks what rank 0 found."""
        errors = self.strategy.gather_objects(error)
        if errors[0] is not None:
            raise UserError(errors[0])

    def _next_serial(self) -> int:
        if not self.strategy.is_main:
            return 0
        return 1 + max((serial_of(folder) for folder in checkpoint_folders(self.folder)), default=0)

    def _commit(self, name: str, is_best: bool) -> None:
        """Rename, move the pointers, remove what is no longer kept; in this order."""
        target = self.folder / name
        if target.exists():
            target.rename(self.folder / f"{RETIRED}{name}")
        (self.folder / f"{WRITING}{name}").rename(target)
        sync_folder(self.folder)
        if is_best:
            write_text_durably(self.folder / "best", name + "\n")
        write_text_durably(self.folder / "latest", name + "\n")
        self._prune()

    def _prune(self) -> None:
        """Remove the checkpoints that are neither the best nor among the newest."""
        by_age = sorted(checkpoint_folders(self.folder), key=serial_of, reverse=True)
        kept = {read_pointer(self.folder / "best"), *(folder.name for folder in by_age[: self.keep])}
        for folder in by_age:
            if folder.name not in kept:
                retired = self.folder / f"{RETIRED}{folder.name}"
                folder.rename(retired)
        for retired in self.folder.glob(f"{RETIRED}*"):
            shutil.rmtree(retired)

    # ---- reading ----

    def latest(self) -> Path | None:
        """The folder of the newest checkpoint; None where there is none."""
        return next(iter(newest_first(self.folder)), None)

    def best(self) -> Path | None:
        """The folder of the best checkpoint; None where there is none."""
        name = read_pointer(self.folder / "best")
        return self.folder / name if name else None

    def load(
        self, which: Path | str = "latest", changed: frozenset[str] = frozenset()
    ) -> tuple[Progress, dict[str, Any]]:
        """Put model, optimizer, schedule, averaged weights and random numbers back.

        Args:
            which: "latest", "best", or the path of a checkpoint or a run.
            changed: names of settings that differ from the checkpoint's (see ``load_train_state``).

        Returns:
            where the run stands, and what was given to ``save`` as ``extra``; ``extra["unevaluated"]`` is
            gone if ``mark`` came after it.

        Raises:
            UserError: there is none, it is damaged (for "latest": all are), or of another model, optimizer or
                other classes.
        """
        folder, index = self.find(which)
        for text in check_data(index.plain.get("data"), self.data, str(folder)):
            if self.strategy.is_main:
                self.notice(text)
        try:
            self._load(folder, index, changed)
        except StateLayoutError as error:
            raise UserError(f"{folder}: {error}") from None
        known = {field.name for field in fields(Progress)}
        evaluation = self.strategy.broadcast(read_evaluation(folder))
        extra = dict(index.plain["extra"])
        if evaluation:
            extra.pop("unevaluated", None)
        saved = {**index.plain["progress"], **evaluation}
        progress = Progress(**{k: v for k, v in saved.items() if k in known})
        self.strategy.steps = progress.step
        self.loaded = folder
        return progress, extra

    def find(self, which: Path | str = "latest") -> tuple[Path, Index]:
        """The checkpoint to take, every byte of it checked: (folder, index). Raises UserError as ``load``
        does."""
        if str(which) == "latest":
            candidates = newest_first(self.folder)
        elif str(which) == "best":
            best = self.best()
            candidates = [best] if best else []
        else:
            candidates = find_checkpoints(Path(which))
        candidates = self._first(candidates)
        if not candidates:
            best_of = "best " if str(which) == "best" else ""
            raise UserError(f"{self.folder} holds no {best_of}checkpoint to resume from")
        damage: list[str] = []
        for number, folder in enumerate(candidates):
            problem, index = self._examine(folder)
            if index is not None and problem is None:
                if number and self.strategy.is_main:
                    for text in damage:
                        self.notice(f"checkpoint {text}")
                    self.notice(f"going back to {folder}")
                return folder, index
            damage.append(f"{folder} is damaged: {problem}")
            if len(candidates) == 1:
                raise UserError(f"checkpoint {folder} cannot be used: {problem}")
        raise UserError(
            f"all {len(damage)} checkpoints in {candidates[0].parent} are damaged; the newest: {damage[0]}"
        )

    def _first(self, value: list[Path]) -> list[Path]:
        return [Path(p) for p in self.strategy.gather_objects([str(p) for p in value])[0]]

    def _examine(self, folder: Path) -> tuple[str | None, Index | None]:
        """What is wrong with a checkpoint, agreed on by all ranks; each rank checks a part of the files."""
        problem, index = None, None
        try:
            if not folder.is_dir():
                is_file = folder.exists()
                raise DamagedCheckpointError(
                    "it is a file, not a folder" if is_file else "there is no such folder"
                )
            index = Index.read(folder)
            mine = sorted(index.files)[self.strategy.rank :: self.strategy.world_size]
            problem = next((p for p in (index.check_file(folder, name) for name in mine) if p), None)
        except DamagedCheckpointError as error:
            problem = str(error)
        problems = [p for p in self.strategy.gather_objects(problem) if p]
        return (problems[0] if problems else None), index

    def _load(self, folder: Path, index: Index, changed: frozenset[str]) -> None:
        shapes = index.shapes()
        runs = self.strategy.shards_to_load(shapes)
        if self.ema is not None:
            runs.update(self.ema.shards_to_load(shapes))
        prefix = f"random.{self.strategy.rank}."
        runs.update({n: (0, torch.Size(s).numel()) for n, s in shapes.items() if n.startswith(prefix)})
        values = {
            name: torch.empty(length, dtype=DTYPES[index.tensors[name]["dtype"]])
            for name, (_, length) in runs.items()
        }
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dcp.load(
                    values,
                    storage_reader=SafetensorsReader(folder, index),
                    planner=RunsLoadPlanner({name: start for name, (start, _) in runs.items()}),
                    no_dist=self.strategy.world_size == 1,
                )
        except (dcp.CheckpointException, DamagedCheckpointError, KeyError) as error:
            raise UserError(f"checkpoint {folder} cannot be read: {root_cause(error)}") from error
        train = {n: v for n, v in values.items() if n.startswith(("model.", "optimizer."))}
        self.strategy.load_train_state(train, index.plain["train"], changed)
        if self.ema is not None:
            self.ema.load({n: v for n, v in values.items() if n.startswith("ema.")}, index.plain["ema"])
        random_state = {n.removeprefix(prefix): v for n, v in values.items() if n.startswith(prefix)}
        if random_state:
            restore_random_state(random_state)
        else:  # this rank did not exist: numbers of its own, the same in every resume
            first = index.plain["progress"]["step"]
            torch.manual_seed((first << 20) + self.strategy.rank)

    def _random_shards(self) -> dict[str, Shard]:
        prefix = f"random.{self.strategy.rank}."
        return {f"{prefix}{n}": Shard(v, 0, (v.numel(),)) for n, v in random_state().items()}


def checkpoint_folders(folder: Path) -> list[Path]:
    """The checkpoints in a folder, in no order."""
    return [p for p in folder.glob("step_*") if p.is_dir()]


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the one to take first in front."""
    folders = sorted(checkpoint_folders(folder), key=serial_of, reverse=True)
    named = read_pointer(folder / "latest")
    return sorted(folders, key=lambda checkpoint: checkpoint.name != named)


def find_checkpoints(path: Path) -> list[Path]:
    """The checkpoints that a path stands for, the one to take first in front.

    Args:
        path: a run, its ``checkpoints``, a checkpoint, its index, or a pointer file (``latest``, ``best``).

    Raises:
        UserError: there is nothing of the kind.
    """
    path = resolve_folder(path)
    for folder in (path, path / "checkpoints"):
        if found := newest_first(folder):
            return found
    if not path.is_dir():
        problem = "it is a file, not a folder" if path.exists() else "there is no such folder"
        raise UserError(f"checkpoint {path} cannot be used: {problem}")
    if not path.name.startswith("step_") and not (path / "index.json").exists():
        raise UserError(f"{path} holds no checkpoint to resume from")
    return [path]


def serial_of(folder: Path) -> int:
    """Number that grows from one checkpoint to the next; -1 where it cannot be read."""
    try:
        return int(Index.read(folder).plain["serial"])
    except (DamagedCheckpointError, KeyError, TypeError, ValueError):
        return -1


def read_evaluation(folder: Path) -> dict[str, float]:
    """The best accuracies that ``mark`` left in a checkpoint; empty if it was not marked."""
    try:
        return {k: float(v) for k, v in json.loads((folder / EVALUATION).read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def read_pointer(path: Path) -> str | None:
    """The name in ``latest`` or ``best``; None where there is none."""
    try:
        name = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return name if name.startswith("step_") and Path(name).name == name else None


def resolve_folder(path: Path) -> Path:
    """A checkpoint's folder from what a user may point at: itself, its index, or a pointer file."""
    path = path.expanduser()
    if path.name in ("latest", "best") and path.is_file() and (name := read_pointer(path)):
        return path.parent / name
    if path.name == "index.json":
        return path.parent
    return path


def root_cause(error: BaseException) -> str:
    """One line that says why."""
    if isinstance(error, dcp.CheckpointException) and error.failures:
        _, (inner, _) = next(iter(error.failures.items()))
        error = inner
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f' ({error.filename})' if error.filename else ''}"
    return first_line(error)
