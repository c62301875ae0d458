"""How a checkpoint lies on disk: safetensors files, one a rank, and one JSON index. There is no pickle in it.

``torch.distributed.checkpoint`` plans who writes and who reads what; this module gives it planners that
know runs of flattened tensors (:class:`scalesnn.parallel.state.Shard`), and a writer and a reader for the
files::

    step_00001234/
      index.json            format, version, checksum of the rest; then tensors, files and plain values
      rank_00000.safetensors, rank_00001.safetensors …

A tensor called NAME is stored as one-dimensional entries ``NAME@START``. The index says which entries lie
in which file, the whole tensor's shape, and every file's length and SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    LoadPlan,
    LoadPlanner,
    Metadata,
    ReadItem,
    SavePlan,
    SavePlanner,
    StorageReader,
    StorageWriter,
    WriteItem,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from scalesnn.training.checkpoint_index import (
    DTYPE_NAMES,
    DTYPES,
    DamagedCheckpointError,
    Index,
    sync_folder,
)

__all__ = ["RunsLoadPlanner", "SafetensorsReader", "SafetensorsWriter", "ShardsSavePlanner"]

# ---- writing ----


class ShardsSavePlanner(DefaultSavePlanner):
    """Plans the writing of ``{name: Shard}``. What several ranks hold alike is written by one of them, the
    load spread over the ranks (this part is torch's)."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        """One item for every shard of this rank."""
        items = []
        for name, shard in self.state_dict.items():
            if not shard.values.numel():
                continue
            chunk = ChunkStorageMetadata(torch.Size([shard.start]), torch.Size([shard.values.numel()]))
            data = TensorWriteData(
                chunk, TensorProperties(dtype=shard.values.dtype), torch.Size([shard.numel])
            )
            items.append(WriteItem(MetadataIndex(name, [shard.start]), WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The values of an item."""
        return self.state_dict[write_item.index.fqn].values


class SafetensorsWriter(StorageWriter):
    """Writes this rank's safetensors file; on the coordinating rank, the index after all files are safe on
    disk.

    Args:
        folder: the (temporary) folder of the checkpoint; it exists.
        rank: of this process, for the file's name.
        shapes: whole shapes of this rank's tensors.
        plain: for the index.
        commit: called on the coordinating rank when the folder is complete.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        shapes: Mapping[str, tuple[int, ...]],
        plain: dict[str, Any],
        commit: Callable[[], None],
    ) -> None:
        self.folder, self.rank, self.shapes, self.plain, self.commit = folder, rank, shapes, plain, commit

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept between checkpoints."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up: the folder is there."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """The plans as they are."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the items one after another, so that only one tensor at a time is copied from the device."""
        done: Future[list[WriteResult]] = Future()
        if not plan.items:
            done.set_result([])
            return done
        name = f"rank_{self.rank:05d}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        sizes = []
        for item in plan.items:
            assert item.tensor_data is not None
            assert item.index.offset is not None
            dtype, length = item.tensor_data.properties.dtype, item.tensor_data.chunk.sizes[0]
            size = length * dtype.itemsize
            header[f"{item.index.fqn}@{item.index.offset[0]}"] = {
                "dtype": DTYPE_NAMES[dtype],
                "shape": [length],
                "data_offsets": [position, position + size],
            }
            sizes.append(size)
            position += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        digest = hashlib.sha256()
        with (self.folder / name).open("wb") as file:
            for block in (len(text).to_bytes(8, "little"), text):
                digest.update(block)
                file.write(block)
            for item in plan.items:
                values = planner.resolve_data(item)
                assert isinstance(values, Tensor)
                data: Any = values.detach().cpu().contiguous().view(torch.uint8).numpy()
                digest.update(data)
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        about = {"file": name, "bytes": 8 + len(text) + position, "sha256": digest.hexdigest()}
        results = [
            WriteResult(item.index, size, {**about, "shape": list(self.shapes[item.index.fqn])})
            for item, size in zip(plan.items, sizes, strict=True)
        ]
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index, then commit (coordinating rank only, after all ranks have written)."""
        tensors: dict[str, Any] = {}
        files: dict[str, Any] = {}
        for result in (r for of_rank in results for r in of_rank):
            about = result.storage_data
            files[about["file"]] = {"bytes": about["bytes"], "sha256": about["sha256"]}
            stored: Any = metadata.state_dict_metadata[result.index.fqn]
            entry = tensors.setdefault(
                result.index.fqn,
                {"dtype": DTYPE_NAMES[stored.properties.dtype], "shape": about["shape"], "entries": []},
            )
            assert result.index.offset is not None
            length = result.size_in_bytes // stored.properties.dtype.itemsize
            entry["entries"].append([result.index.offset[0], length, about["file"]])
        for entry in tensors.values():
            entry["entries"].sort()
        Index(tensors, files, self.plain).write(self.folder)
        sync_folder(self.folder)
        self.commit()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any local path will do."""
        return True


# ---- reading ----


class RunsLoadPlanner(DefaultLoadPlanner):
    """Plans the reading of runs of flattened tensors into ``{name: one-dimensional tensor}``.

    Args:
        starts: position of each tensor's first value in the flattened whole.
    """

    def __init__(self, starts: Mapping[str, int]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.starts = starts

    def create_local_plan(self) -> LoadPlan:
        """Items for the overlap of what is wanted with what is stored."""
        items: list[ReadItem] = []
        assert self.metadata is not None
        for name, target in self.state_dict.items():
            if target.numel():
                wanted = ChunkStorageMetadata(torch.Size([self.starts[name]]), torch.Size([target.numel()]))
                stored: Any = self.metadata.state_dict_metadata[name]
                items += create_read_items_for_chunk_list(name, stored, [wanted])
        return LoadPlan(items)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Where the values of an item go."""
        target = self.state_dict[read_item.dest_index.fqn]
        return target.narrow(0, read_item.dest_offsets[0], read_item.lengths[0])

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing: ``resolve_tensor`` gives the memory itself."""


class SafetensorsReader(StorageReader):
    """Reads the files that an index names."""

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder, self.index = folder, index

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept between checkpoints."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index in the words of torch.distributed.checkpoint."""
        tensors: dict[str, Any] = {}
        storage: dict[MetadataIndex, str] = {}
        for name, entry in self.index.tensors.items():
            runs = [
                ChunkStorageMetadata(torch.Size([start]), torch.Size([length]))
                for start, length, _ in entry["entries"]
            ]
            size = torch.Size([torch.Size(entry["shape"]).numel()])
            tensors[name] = TensorStorageMetadata(TensorProperties(dtype=DTYPES[entry["dtype"]]), size, runs)
            storage.update({MetadataIndex(name, [start]): file for start, _, file in entry["entries"]})
        return Metadata(tensors, storage_data=storage)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Remember which file holds what."""
        self.storage: dict[MetadataIndex, str] = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the items, file by file."""
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self.storage[item.storage_index], []).append(item)
        for name, items in by_file.items():
            try:
                with safe_open(str(self.folder / name), framework="pt") as file:
                    for item in items:
                        assert item.storage_index.offset is not None
                        stored = file.get_slice(f"{item.storage_index.fqn}@{item.storage_index.offset[0]}")
                        begin, length = item.storage_offsets[0], item.lengths[0]
                        planner.resolve_tensor(item).copy_(stored[begin : begin + length])
            except (SafetensorError, OSError) as error:
                raise DamagedCheckpointError(f"{name} cannot be read ({error})") from None
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any local path will do."""
        return True
