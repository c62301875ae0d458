"""The fused ops: one CUDA C++ source (neuron.cu), compiled by CuPy for GPUs and by the C++ compiler for CPUs.

Kernels know tensors, not modules. ``unit.fused_unit`` is what the layers call; ``ops``, ``normalisation``,
``packing`` and ``spike_layers`` hold the torch.library custom ops; ``spikes`` what is known about tensors of
spikes. Equations, shapes, memory: docs/kernels.md.
"""

from __future__ import annotations

from scalesnn.kernels.unit import NeuronParameters, Normalisation, fused_unit, usable

__all__ = ["NeuronParameters", "Normalisation", "fused_unit", "usable"]
