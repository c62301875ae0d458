"""RUN/tb: scalars for TensorBoard.

RUN/tb itself has the tutorial's tags (train_acc1, train_acc5, train_loss, test_acc1, test_acc5, test_loss,
and ema_test_…) over the epoch; RUN/tb/steps has everything logged during an epoch, over the optimizer step.
They are two folders because their axes differ: on resume TensorBoard is told from which point to forget, per
folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scalesnn.tracking.records import named_scalars

__all__ = ["TensorBoardSink"]


class TensorBoardSink:
    """Write scalars to event files.

    Args:
        run_folder: the run's folder; event files go to ``run_folder/tb`` and ``run_folder/tb/steps``.
        last_step: resumed after this optimizer step; -1 for a new run. Later points of earlier files are
            purged.
        last_epoch: the last epoch whose records are kept on resume.

    Raises:
        OSError: the folder cannot be written (the tracker then switches this sink off).
    """

    name = "TensorBoard"

    def __init__(self, run_folder: Path, last_step: int = -1, last_epoch: int = -1) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run_folder / "tb"
        again = folder.exists()  # without older event files there is nothing to forget
        self._epochs = SummaryWriter(str(folder), purge_step=last_epoch + 1 if again else None)
        self._steps = SummaryWriter(str(folder / "steps"), purge_step=last_step + 1 if again else None)

    def log(self, record: dict[str, Any]) -> None:
        """Write the numbers of one record."""
        of_an_epoch = record.get("kind") == "epoch"
        writer = self._epochs if of_an_epoch else self._steps
        axis = int(record.get("epoch" if of_an_epoch else "step", 0))
        for name, value in named_scalars(record).items():
            writer.add_scalar(name, value, axis)
        if of_an_epoch:
            writer.flush()
            self._steps.flush()

    def event(self, event: dict[str, Any]) -> None:
        """Events have no place among scalars; alerts are kept as text."""
        if event.get("event") == "alert":
            self._steps.add_text(
                "alerts", f"**{event.get('title')}** {event.get('text')}", int(event.get("step", 0))
            )

    def close(self, summary: dict[str, Any]) -> list[str]:
        """Flush and close."""
        self._epochs.close()
        self._steps.close()
        return []
