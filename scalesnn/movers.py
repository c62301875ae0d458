"""What is said of a name that SpikingJelly has and scalesnn has not: that it is missing, and what is nearest.

The names are those of SpikingJelly 2.0.0 (and those of 0.0.0.0.14 that public code still imports).
"""

from __future__ import annotations

import difflib
import dis
import sys
from collections.abc import Iterable, Mapping

__all__ = ["NEAREST", "missing"]

OWN_NEURON = "neuron.BaseNode: a subclass with a neuronal_charge of its own"
OWN_STATE = "base.MemoryModule: a subclass that registers its memories"
OWN_LOOP = "a forward of your own over the steps, in step mode 's'"
BITS = "nothing to call: spikes are kept as bits by the layers themselves"
STATELESS = "neuron.{}, whose forward in step mode 's' is one step"
LEARNING = "nothing: scalesnn trains by surrogate gradients only"
WHOLE_NET = "model.spiking_resnet, model.sew_resnet or model.ms_resnet"
SPIKES = {  # functions of surrogates
    "atan": "ATan",
    "deterministic_pass": "DeterministicPass",
    "erf": "Erf",
    "fake_numerical_gradient": "FakeNumericalGradient",
    "leaky_k_relu": "LeakyKReLU",
    "log_tailed_relu": "LogTailedReLU",
    "nonzero_sign_log_abs": "NonzeroSignLogAbs",
    "piecewise_exp": "PiecewiseExp",
    "piecewise_leaky_relu": "PiecewiseLeakyReLU",
    "piecewise_quadratic": "PiecewiseQuadratic",
    "q_pseudo_spike": "QPseudoSpike",
    "rect": "Rect",
    "s2nn": "S2NN",
    "sigmoid": "Sigmoid",
    "soft_sign": "SoftSign",
    "squarewave_fourier_series": "SquarewaveFourierSeries",
    "super_spike": "SuperSpike",
}


def _names(hints: Mapping[str, str]) -> dict[str, str]:
    """``{hint: "A B"}`` → ``{"A": hint, "B": hint}``."""
    return {name: hint for hint, names in hints.items() for name in names.split()}


# module → name → what comes nearest
NEAREST: dict[str, dict[str, str]] = {
    "scalesnn.layer": _names(
        {
            "layer.BatchNorm1d": (
                "BatchNormThroughTime1d TemporalEffectiveBatchNorm1d ThresholdDependentBatchNorm1d"
            ),
            "layer.BatchNorm2d": (
                "BatchNormThroughTime2d TemporalEffectiveBatchNorm2d ThresholdDependentBatchNorm2d NeuNorm"
            ),
            "layer.BatchNorm3d": (
                "BatchNormThroughTime3d TemporalEffectiveBatchNorm3d ThresholdDependentBatchNorm3d"
            ),
            "layer.convert_sync_batchnorm(model)": "SynchronizedBatchNorm2d SyncBatchNorm",
            "layer.Conv2d": "WSConv2d",
            "layer.Linear": "WSLinear",
            "layer.Linear and layer.Dropout": "DropConnectLinear",
            "layer.Upsample": "MaxUnpool1d MaxUnpool2d MaxUnpool3d",
            "layer.MultiStepContainer, with time in front": "TLastMultiStepContainer",
            "layer.SeqToANNContainer, with time in front": "TLastSeqToANNContainer",
            "functional.set_step_mode(model, 'm')": "StepModeContainer",
            "layer.AvgPool1d over the votes": "VotingLayer",
            "a forward hook, module.register_forward_hook": "PrintShapeModule",
            OWN_LOOP: "ElementWiseRecurrentContainer LinearRecurrentContainer",
            OWN_STATE: "Delay SynapseFilter",
            "layer.SeqToANNContainer around an attention of your own": (
                "ChannelQKAttention MultiDimensionalAttention QKAttention "
                "SpikeDrivenSelfAttention SpikingSelfAttention TemporalWiseAttention "
                "TokenQKAttention"
            ),
            "functional.detach_net between steps": "GradwithTrace OTTTSequential ReplaceforGrad SpikeTraceOp",
            "a sum over the time dimension": "SpikeCountToBinary TemporalBinSum",
            LEARNING: "STDPLearner",
        }
    ),
    "scalesnn.neuron": _names(
        {
            "neuron.IFNode": (
                "HalfThresholdIFNode SimpleIFNode ActivationAwareIFNode OutlierAwareThresholdNode "
                "DSRIFNode ILIFNode STBIFNode TernaryIFNode MultiStepIFNode ILCIFNode"
            ),
            "neuron.LIFNode": (
                "CUBALIFNode ComplementaryLIFNode DSRLIFNode ILCCUBALIFNode ILCLIFNode KLIFNode "
                "LIAFNode MPBNLIFNode MultiStepLIFNode SimpleLIFNode TernaryLIFNode"
            ),
            "neuron.LIFNode, with functional.detach_net between time-steps": "OTTTLIFNode SLTTLIFNode",
            "neuron.ParametricLIFNode": "GatedLIFNode MultiStepParametricLIFNode",
            OWN_NEURON: (
                "AdaptBaseNode ILCBaseNode MPBNBaseNode SimpleBaseNode NoisyBaseNode "
                "NoisyCUBALIFNode NoisyILCBaseNode NoisyILCCUBALIFNode EIFNode IzhikevichNode "
                "QIFNode HGNode RAFNode FewSpikeNode FewSpikeTable FlexSN MultiStepEIFNode "
                "MultiStepGeneralNode"
            ),
            "neuron.LIFNode with v_threshold=float('inf') and store_v_seq=True: read v": (
                "NonSpikingBaseNode NonSpikingIFNode NonSpikingLIFNode NoisyNonSpikingBaseNode "
                "NoisyNonSpikingIFNode"
            ),
            "layer.Linear over the time dimension, then neuron.IFNode": "PSN MaskedPSN SlidingPSN",
            "torch.randn": "powerlaw_psd_gaussian",
        }
    ),
    "scalesnn.functional": _names(
        {
            "functional.reset_net": "collect_reset_modules invalidate_reset_cache reset_collected_modules",
            "torch.nn.init.kaiming_normal_ on each weight": "kaiming_normal_conv_linear_weight",
            "functional.multi_step_forward, with time in front": "t_last_multi_step_forward",
            "functional.seq_to_ann_forward, with time in front": "t_last_seq_to_ann_forward",
            "functional.set_backend(net, 'auto')": "neuron_implementation",
            BITS: (
                "bit_pack_spike_dense bit_spike_compress bit_spike_decompress packed_spike_linear "
                "sparse_linear"
            ),
            STATELESS.format("IFNode"): (
                "if_step if_multi_step if_linear stbif_step stbif_multi_step ilif_step "
                "ilif_multi_step ternary_if_step activation_aware_if_step "
                "activation_aware_if_multi_step"
            ),
            STATELESS.format("LIFNode"): (
                "lif_charge lif_step lif_multi_step lif_linear cuba_lif_step klif_step liaf_step "
                "lava_cuba_lif_step clif_step ternary_lif_step gated_lif_step"
            ),
            STATELESS.format("ParametricLIFNode"): "plif_step plif_multi_step",
            OWN_NEURON: (
                "eif_step eif_multi_step izhikevich_step izhikevich_multi_step qif_step "
                "qif_multi_step raf_step voltage_reset masked_psn_step sliding_psn_step"
            ),
            OWN_STATE: "delay delay_step synapse_filter_step neunorm_step",
            LEARNING: (
                "mstdp_linear_step mstdpet_linear_step mstdpet_reward_step stdp_conv1d_step "
                "stdp_conv2d_step stdp_linear_step"
            ),
            "cross_entropy of every step's logits, averaged": "temporal_efficient_training_cross_entropy",
            "torch.nn.functional.one_hot": "redundant_one_hot",
            "spikes.cumsum(0).cumsum(0) == 1, over time in front": "first_spike_index",
            "a loss of torch.nn.functional": "spike_similar_loss kernel_dot_product set_threshold_margin",
        }
    ),
    "scalesnn.surrogate": _names(
        {
            "surrogate.DeterministicPass": "MultiLevelSpikeCount",
            "surrogate.DeterministicPass, of torch.bernoulli": "PoissonPass poisson_pass",
            "the surrogate's own derivative(x) and primitive(x)": "plot_surrogate_function check_manual_grad",
            **{
                f"surrogate.{kind} and its derivative(x)": f"{name} {name}_backward"
                for name, kind in SPIKES.items()
            },
        }
    ),
    "scalesnn.base": _names(
        {
            "base.StepModule with supported_step_modes = ('s',)": "SingleStepModule",
            "base.MemoryModule.named_memories()": "extract_memories load_memories memories named_memories",
            "torch.func.functional_call": "to_functional_forward",
        }
    ),
    "scalesnn": _names(
        {
            "functional.repeat_over_time(images, T)": "encoding",
            "neuron.BaseNode.observer of a node, or --spike-metrics-every in training": "monitor",
            "`scalesnn energy` for operations, --profile for time": "op_counter profiler",
            "--strategy ddp, deepspeed or fsdp (docs/strategies.md)": "distributed",
            "--activation-checkpoint (docs/memory.md)": "memopt",
            "mixed precision is on by itself on a GPU; --disable-amp turns it off": "precision",
            OWN_LOOP: "rnn",
            LEARNING: "learning",
            "nothing: use SpikingJelly's beside scalesnn, on plain tensors": (
                "ann2snn quantize lava_exchange lynxi_exchange nir_exchange examples datasets visualizing"
            ),
        }
    ),
    "scalesnn.model": _names(
        {
            WHOLE_NET: (
                "spiking_vgg spiking_vggws_ottt parametric_lif_net snas_net spike_dhs masnn "
                "maxformer qkformer spikformer spike_driven_transformer tv_ref_classify"
            ),
        }
    ),
}


def missing(module: str, name: str, known: Iterable[str]) -> AttributeError | ImportError:
    """The error for a ``name`` that ``module`` does not have, to be raised by its ``__getattr__``.

    Args:
        known: the names that it has.

    Returns:
        an ImportError where the name is being imported (``from module import name``, which would hide the
        words of an AttributeError), else an AttributeError.
    """
    hint = NEAREST[module].get(name)
    if hint is not None:
        text = f"{module} has no {name!r}, which SpikingJelly has; nearest: {hint}"
    else:
        text = f"module {module!r} has no attribute {name!r}"
        near = difflib.get_close_matches(name, [*known], n=1)
        text += f"; did you mean {near[0]!r}?" if near else ""
    caller = sys._getframe(2)
    is_import = dis.opname[caller.f_code.co_code[caller.f_lasti]] == "IMPORT_FROM"
    return ImportError(text, name=module) if is_import else AttributeError(text)
