"""What every test shares: one computing thread (runs are deterministic and two workers do not fight for two cores)."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
