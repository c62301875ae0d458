"""``scalesnn doctor``: is this job going to run? Asked on every rank, answered in one table with cures.

    scalesnn doctor --data-path /data/imagenet                               this machine
    srun --ntasks-per-node=8 scalesnn doctor --data-path /data/imagenet      every rank of a Slurm job
    torchrun … -m scalesnn.cli doctor …                                      every rank of torchrun's

Each rank looks at its own machine (``local``); then the ranks meet, compare what they found, and try the
network between the nodes (``together``). Exit code 1 on a problem; warnings alone leave it at 0.
"""

from scalesnn.doctor.command import add_doctor_command, add_preflight_argument, run_preflight
from scalesnn.doctor.findings import Finding

__all__ = ["Finding", "add_doctor_command", "add_preflight_argument", "run_preflight"]
