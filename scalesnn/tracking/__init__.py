"""Watching a run: console, metrics.jsonl, TensorBoard, W&B; throughput and cost; the health of spiking
layers.
"""

from scalesnn.tracking.arguments import add_tracking_arguments
from scalesnn.tracking.profiler import StepProfiler
from scalesnn.tracking.spikes import SpikeMonitor
from scalesnn.tracking.timer import StepTimer
from scalesnn.tracking.tracker import NullTracker, Tracker, create_tracker

__all__ = [
    "NullTracker",
    "SpikeMonitor",
    "StepProfiler",
    "StepTimer",
    "Tracker",
    "add_tracking_arguments",
    "create_tracker",
]
