"""A run without a network or images, in a process of its own: logs what the trainer logs, and ends as it is
told.

    python a_run.py RUN --first 5 --last 9 --end kill --wandb online …
"""

import argparse
import os
import signal
import time
from pathlib import Path

from scalesnn.tracking import add_tracking_arguments, create_tracker

STEPS_PER_EPOCH = 4

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--last", type=int, default=8)
    parser.add_argument("--end", default="finished")
    add_tracking_arguments(parser)
    args = parser.parse_args()

    args.run.mkdir(exist_ok=True)
    tracker = create_tracker(
        args,
        args.run,
        {"lr": 0.1, "T": 4},
        resumed=args.first > 0,
        total_steps=args.last,
        first_step=args.first,
    )
    for step in range(args.first + 1, args.last + 1):
        record = {"step": step, "epoch": (step - 1) // STEPS_PER_EPOCH, "images_seen": 8 * step}
        tracker.progress({**record, "loss": 1 / step})
        tracker.log_step({**record, "loss": 1 / step, "spikes/sn1/firing_rate_t": [0.1, 0.2], "step_s": 0.1})
        if step % STEPS_PER_EPOCH == 0:
            scores = {"acc1": step, "acc5": 2.0 * step}
            tracker.log_epoch({**record, "split": "train", "loss": 1 / step, **scores})
            tracker.log_epoch({**record, "split": "test", "loss": 2 / step, **scores})
        if step == args.last and args.end == "alert":
            tracker.alert("NaN in the loss", "step 1 was skipped")
    if args.wandb_log_model:
        (args.run / "step_1").mkdir()
        (args.run / "step_1" / "weights").write_text("weights")
        tracker.log_checkpoint(args.run / "step_1", best=True, seconds=0.1)
        tracker.log_checkpoint(args.run / "step_0")  # which is gone by now
    if args.end == "kill":
        time.sleep(2)  # W&B has begun, and has these records
        os.kill(os.getpid(), signal.SIGKILL)
    tracker.close({"state": "preempted" if args.end == "preempted" else "finished", "best_test_acc1": 1.0})
