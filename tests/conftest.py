"""What every test shares: one computing thread, so that runs are deterministic and workers do not fight."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
