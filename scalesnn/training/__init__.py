"""The parts of the Trainer: arguments, optimizers, metrics, run folder, checkpoints, the loop."""

__all__: list[str] = []
