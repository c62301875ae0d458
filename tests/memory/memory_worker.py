"""One rank of two: a few training steps under every policy with one strategy, compared with ``none``.

``python memory_worker.py STRATEGY POLICY…`` with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set; strategy
zero3-tight is ZeRO-3 that keeps no gathered weight. Prints, from rank 0, JSON: policy → largest differences
of losses and trained weights, all-gathers of a step, and how many convolutions keep their input as bits.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from memory_nets import forms, images, make
from torch import Tensor, nn

from scalesnn import functional
from scalesnn.memory import apply_policy
from scalesnn.parallel import Topology, create_strategy

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NET, STEPS = "spiking_resnet18", 2  # in float64: in float32 a last bit of step 1 may flip a spike of step 2


def deepspeed_config(strategy: str) -> str:
    """The path of its configuration."""
    path = CONFIGS / f"{strategy.removesuffix('-tight')}.json"
    if not strategy.endswith("-tight"):
        return str(path)
    config = json.loads(path.read_text())
    tight = (
        "max_live_parameters",
        "max_reuse_distance",
        "prefetch_bucket_size",
        "param_persistence_threshold",
    )
    config["zero_optimization"].update({f"stage3_{name}": 0 for name in tight})
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
        json.dump(config, file)
    return file.name


def arguments(strategy: str) -> Any:
    """The flags that strategies read."""
    return SimpleNamespace(
        strategy="auto" if strategy.startswith("zero") else strategy,
        deepspeed_config=deepspeed_config(strategy) if strategy.startswith("zero") else None,
        fsdp_config=str(CONFIGS / "fsdp.yaml") if strategy == "fsdp" else None,
        deepspeed=False, local_rank=None, world_size=None, dist_url="env://", dist_timeout=2.0,
        sync_bn=True, clip_grad_norm=None, gradient_accumulation=1, on_nan="stop", ddp_static_graph=False,
        ddp_bf16_gradients=False, ddp_broadcast_buffers=False, disable_amp=True, batch_size=2, lr=0.05,
        momentum=0.9, weight_decay=0.0, opt="sgd", verbose=False, explicit=set(),
    )  # fmt: skip


def train(name: str, policy: str) -> tuple[list[float], dict[str, Tensor], int, int]:
    """Losses, trained state on rank 0, all-gathers of the last step, and inputs that are kept as bits."""
    strategy = create_strategy(arguments(name), Topology.from_environment())
    strategy.setup_device("cpu")
    model = apply_policy(make(NET), policy)
    strategy.prepare(model, lambda m: torch.optim.SGD(m.parameters(), 0.05, momentum=0.9), lambda o: None)
    strategy.model.train()
    x = images(static=True, steps=5) * (1 + 0.1 * strategy.rank)
    losses, gathers, as_bits = [], 0, 0
    for _ in range(STEPS):
        with torch.profiler.profile() as profile:
            loss = nn.functional.cross_entropy(strategy.model(x).mean(0), torch.tensor([1, 2]))
            as_bits = sum(forms(loss))
            strategy.backward(loss)
        gathers = sum(e.count for e in profile.key_averages() if "gather" in e.key and "c10d" in e.key)
        functional.reset_net(strategy.module)
        strategy.step()
        losses.append(float(loss))
    return losses, strategy.full_model_state(), gathers, as_bits


def main() -> None:
    """Train under every policy and compare."""
    name, *policies = sys.argv[1:]
    found = {}
    losses, state, gathers, _ = train(name, "none")
    found["none"] = {"losses": 0.0, "state": 0.0, "gathers": gathers}
    for policy in policies:
        other_losses, other, gathers, as_bits = train(name, policy)
        found[policy] = {
            "losses": max(abs(a - b) for a, b in zip(losses, other_losses, strict=True)),
            "state": max(
                (float((other[k].double() - v.double()).abs().max()) for k, v in state.items()), default=0.0
            ),
            "gathers": gathers,
            "as_bits": as_bits,
        }
    if dist.get_rank() == 0:
        print("RESULT", json.dumps(found), flush=True)
    dist.barrier()


if __name__ == "__main__":
    main()
