"""Trained nets for other software: NIR for simulators and chips, ONNX for runtimes, ``torch.export``."""

__all__: list[str] = []
