"""What a person sees while the run goes on: a live line on a terminal, plain lines in a log file.

A terminal gets one line that renews itself, with everything else scrolling above it. Anything else (a pipe,
a file, a Slurm log) gets whole plain lines at a sober pace: no colours, no control characters. NO_COLOR is
honoured.
"""

from __future__ import annotations

import sys
import time
from typing import IO, Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

__all__ = ["ConsoleSink", "duration"]

_HEADER_EVERY = 20
_COLUMNS = f"{'epoch':>9}  {'split':<9}{'loss':>9}{'acc@1':>8}{'acc@5':>8}{'images/s':>10}  {'time':>8}"


def duration(seconds: float) -> str:
    """Seconds as a person reads them: ``0:42``, ``12:05``, ``3:04:09``, ``2 d 03:10``."""
    whole = max(0, round(seconds))
    days, rest = divmod(whole, 86_400)
    hours, minutes, secs = rest // 3600, rest % 3600 // 60, rest % 60
    if days:
        return f"{days} d {hours:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"


class ConsoleSink:
    """Print progress, the table of epochs, notices and alerts.

    Args:
        stream: where to print; a terminal gets the live line. Default: stdout.
        plain_every_s: without a terminal, at most one progress line in this many seconds.
    """

    name = "console"

    def __init__(self, stream: IO[str] | None = None, plain_every_s: float = 10.0) -> None:
        self._stream = stream or sys.stdout
        self._console = Console(file=stream, highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._tty = self._console.is_terminal and not self._console.is_dumb_terminal
        self._every_s = 0.2 if self._tty else plain_every_s
        self._next_progress = 0.0
        self._last_key: tuple[Any, Any] | None = None
        self._rows = 0

    def is_due(self, record: dict[str, Any]) -> bool:
        """Whether the next progress line is due: enough time has gone by, or this is the last step."""
        return time.monotonic() >= self._next_progress or record.get("step") == record.get("total_steps")

    def progress(self, record: dict[str, Any]) -> None:
        """Renew the live line, or print a plain line."""
        self._next_progress = time.monotonic() + self._every_s
        line = _progress_line(record)
        if not self._tty:
            self._say(line)
            return
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        done = record.get("step", 0) / max(record.get("total_steps", 0), 1)
        filled = round(20 * min(1.0, done))
        bar = Text("━" * filled, style="green") + Text("━" * (20 - filled), style="bright_black")
        text = bar + Text(" " + line)
        text.no_wrap, text.overflow = True, "ellipsis"
        self._live.update(text, refresh=True)

    def log(self, record: dict[str, Any]) -> None:
        """Print one row of the table of epochs; step records are the progress line's business."""
        if record.get("kind") != "epoch":
            return
        if self._rows % _HEADER_EVERY == 0:
            self._say(_COLUMNS, "bold")
        key = (record.get("epoch"), record.get("step"))
        of = f"/{record['epochs']}" if "epochs" in record else ""
        epoch = "" if key == self._last_key else f"{int(record.get('epoch', 0)) + 1}{of}"
        self._last_key = key
        self._rows += 1
        cells = [f"{epoch:>9}  {record.get('split', ''):<9}"]
        for name, width, digits in (("loss", 9, 4), ("acc1", 8, 2), ("acc5", 8, 2), ("images_per_s", 10, 0)):
            value = record.get(name)
            cells.append(f"{value:>{width}.{digits}f}" if isinstance(value, int | float) else " " * width)
        seconds = record.get("epoch_s")
        cells.append(f"  {duration(seconds):>8}" if isinstance(seconds, int | float) else "")
        self._say("".join(cells).rstrip(), "" if record.get("split") == "train" else "cyan")

    def event(self, event: dict[str, Any]) -> None:
        """Print notices and alerts; other events are silent."""
        if event.get("event") == "notice":
            self._say(f"scalesnn: {event['text']}")
        elif event.get("event") == "alert":
            self._say(f"scalesnn: {event['title']}: {event['text']}", "bold yellow")

    def close(self, summary: dict[str, Any]) -> list[str]:
        """Take the live line away and print the summary."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        width = max((len(key) for key in summary), default=0)
        for key, value in summary.items():
            shown = f"{value:.4f}".rstrip("0").rstrip(".") if isinstance(value, float) else value
            self._say(f"{key.replace('_', ' '):<{width}}  {shown}")
        return []

    def _say(self, text: str, style: str = "") -> None:
        if self._tty:
            self._console.print(Text(text, style=style))
        else:
            self._stream.write(text + "\n")
            self._stream.flush()


def _progress_line(record: dict[str, Any]) -> str:
    parts = []
    if "epoch" in record:
        of = f"/{record['epochs']}" if "epochs" in record else ""
        parts.append(f"epoch {int(record['epoch']) + 1}{of}")
    if "step" in record:
        of = f"/{record['total_steps']}" if record.get("total_steps") else ""
        parts.append(f"step {record['step']}{of}")
    for key, label, digits in (("loss", "loss", 4), ("acc1", "acc@1", 2)):
        if isinstance(record.get(key), int | float):
            parts.append(f"{label} {record[key]:.{digits}f}")
    if isinstance(record.get("lr"), int | float):
        parts.append(f"lr {record['lr']:.4g}")
    if isinstance(record.get("images_per_s"), int | float):
        parts.append(f"{record['images_per_s']:.0f} images/s")
    if isinstance(record.get("time_left_s"), int | float):
        parts.append(f"{duration(record['time_left_s'])} left")
    return " · ".join(parts)
