"""The exponential moving average of the weights, kept where the weights are kept.

Each rank averages only what it holds of every parameter (a half of it on two ranks under ZeRO or FSDP2, all
of it under DDP), so no strategy ever gathers the model for it. Running statistics are averaged along.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from scalesnn.parallel.state import Shard, persistent_buffers, write_values
from scalesnn.parallel.strategy import Strategy

__all__ = ["ModelEma", "adjusted_decay"]


def adjusted_decay(decay: float, *, global_batch: int, steps: int, epochs: int) -> float:
    """The decay per update, so that the average spans the same share of a run whatever its batch and length.

    As in torchvision's reference training: 1 - min(1, (1 - decay) · global batch · steps / epochs).
    """
    return 1.0 - min(1.0, (1.0 - decay) * global_batch * steps / epochs)


class ModelEma:
    """Averaged weights: w ← decay · w + (1 - decay) · weights, every ``steps`` steps.

    Args:
        strategy: prepared.
        decay: share of the old average that an update keeps.
        steps: updates of the weights between updates of the average.
    """

    def __init__(self, strategy: Strategy, decay: float, steps: int = 1) -> None:
        self.strategy, self.decay, self.steps = strategy, decay, steps
        self.updates = 0  # 0: the next update copies
        self._values: dict[str, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}
        self._copy()

    @torch.no_grad()
    def _copy(self) -> None:
        self._values = {n: s.values.detach().clone() for n, s in self.strategy.parameter_shards().items()}
        self._buffers = {n: b.detach().clone() for n, b in persistent_buffers(self.strategy.module).items()}

    @torch.no_grad()
    def update(self, step: int, *, warming_up: bool = False) -> None:
        """Take the weights after ``step`` into the average, if it is their turn.

        Args:
            step: number of updates of the weights so far.
            warming_up: the learning rate is still warming up: the average starts anew with the next update.
        """
        if step % self.steps == 0:
            if self.updates == 0:
                self._copy()
            else:
                shards = self.strategy.parameter_shards()
                for name, value in self._values.items():
                    value.lerp_(shards[name].values, 1.0 - self.decay)
                for name, buffer in persistent_buffers(self.strategy.module).items():
                    if buffer.is_floating_point():
                        self._buffers[name].lerp_(buffer, 1.0 - self.decay)
                    else:
                        self._buffers[name].copy_(buffer)
            self.updates += 1
        if warming_up:
            self.updates = 0

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context the network has the averaged weights and buffers; collective.

        Running statistics of the average are averaged over ranks first.
        """
        self.sync_buffers()
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def sync_buffers(self) -> None:
        """Give all ranks the mean of their averaged buffers."""
        self.strategy.average_tensors(list(self._buffers.values()))

    @torch.no_grad()
    def _exchange(self) -> None:
        own = {n: s.values.detach().clone() for n, s in self.strategy.parameter_shards().items()}
        self.strategy.write_parameters(self._values)
        for name, values in own.items():
            self._values[name].copy_(values)
        for name, buffer in persistent_buffers(self.strategy.module).items():
            mine = self._buffers[name].clone()
            self._buffers[name].copy_(buffer)
            write_values(buffer, mine.reshape(-1))

    # ---- checkpoints ----

    def shards(self) -> dict[str, Shard]:
        """The average as shards ``ema.NAME``; collective (buffers are averaged over ranks)."""
        self.sync_buffers()
        own = self.strategy.parameter_shards()
        found = {f"ema.{n}": Shard(value, own[n].start, own[n].shape) for n, value in self._values.items()}
        for name, buffer in self._buffers.items():
            found[f"ema.{name}"] = Shard(buffer.reshape(-1), 0, tuple(buffer.shape))
        return found

    def plain(self) -> dict[str, Any]:
        """What is no tensor."""
        return {"updates": self.updates, "decay": self.decay}

    def shards_to_load(self, saved: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
        """Runs wanted of a checkpoint; none where it was written without an average (this one then starts
        from the loaded weights)."""
        if not any(name.startswith("ema.") for name in saved):
            return {}
        own = self.strategy.parameter_shards()
        runs = {f"ema.{n}": (own[n].start, value.numel()) for n, value in self._values.items()}
        runs.update({f"ema.{n}": (0, buffer.numel()) for n, buffer in self._buffers.items()})
        return runs

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor], plain: Mapping[str, Any] | None) -> None:
        """Put back what ``shards`` and ``plain`` gave; without it, start from the weights."""
        if plain is None or not values:
            self.updates = 0
            self._copy()
            return
        for full_name, tensor in values.items():
            name = full_name.removeprefix("ema.")
            target = self._values[name] if name in self._values else self._buffers[name]
            target.copy_(tensor.view(target.shape))
        self.updates = int(plain["updates"])
