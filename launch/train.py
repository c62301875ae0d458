"""Train a spiking ResNet: the product's own entry.

    deepspeed launch/train.py --deepspeed_config configs/zero2.json     ZeRO-2
    torchrun --nproc-per-node 2 launch/train.py                         DDP
    python launch/train.py                                              one process

``--config RECIPE.yaml`` sets any flag's default; ``-h`` lists the flags.
"""

import signal
import sys
from pathlib import Path

signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])  # "save and requeue" waits until the run can

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

from scalesnn.threads import choose_wait_policy  # noqa: E402

choose_wait_policy()  # before torch is imported

from scalesnn.model.train_imagenet_example import SResNetTrainer  # noqa: E402

if __name__ == "__main__":
    trainer = SResNetTrainer()
    trainer.main(trainer.get_args_parser().parse_args())
