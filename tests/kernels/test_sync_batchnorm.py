"""BatchNorm over a process group: two ranks with unequal shares equal one process with the whole batch."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from scalesnn import functional, layer, neuron, surrogate

SHARES = [(0, 3), (3, 4)]  # of four samples


def make(backend: str, space: int) -> tuple[Any, Any, neuron.LIFNode]:
    torch.manual_seed(0)
    kind = layer.BatchNorm2d if space == 2 else layer.BatchNorm1d
    first, second = kind(6, step_mode="m").double(), kind(6, step_mode="m").double()
    with torch.no_grad():
        first.weight.uniform_(0.5, 2)
    node = neuron.LIFNode(step_mode="m", surrogate_function=surrogate.ATan(), backend=backend)
    for norm in (first, second):
        norm.backend = backend
    return first, second, node


def run(backend: str, space: int, start: int, stop: int, norms: Any = None) -> dict[str, torch.Tensor]:
    first, second, node = make(backend, space)
    if norms is not None:
        norms(torch.nn.ModuleList([first, second]))
    generator = torch.Generator().manual_seed(3)
    x = (torch.randn(3, 4, 6, 5, 5, generator=generator, dtype=torch.float64) * 2 + 1)[:, start:stop]
    x = (x if space == 2 else x.flatten(3)).clone().requires_grad_()
    y = second(first(x, neuron=node))
    weights = torch.linspace(-1, 1, 3 * 4 * 150).view(3, 4, 6, 5, 5)[:, start:stop]
    (y.view(weights.shape) * weights).sum().backward()
    return {
        "x": x.grad, "weight": first.weight.grad, "bias": first.bias.grad, "y": y.detach(),
        "mean": first.running_mean, "var": first.running_var, "mean2": second.running_mean,
    }  # fmt: skip


def worker(rank: int, port: int, backend: str, space: int, folder: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group(
        "gloo", init_method=address, rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    result = run(backend, space, *SHARES[rank], norms=layer.convert_sync_batchnorm)
    torch.save(result, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.distributed
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("backend", "space"), [("auto", 2), ("torch", 2), ("torch", 1)])
def test_statistics_and_gradients_over_two_ranks(backend: str, space: int, tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    mp.spawn(worker, (port, backend, space, str(tmp_path)), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    whole = run("torch", space, 0, 4)
    for name in ("x", "y"):
        torch.testing.assert_close(
            torch.cat([part[name] for part in parts], 1), whole[name], rtol=1e-9, atol=1e-11
        )
    for name in ("weight", "bias"):
        torch.testing.assert_close(parts[0][name] + parts[1][name], whole[name], rtol=1e-9, atol=1e-11)
    for part in parts:
        for name in ("mean", "var", "mean2"):
            torch.testing.assert_close(part[name], whole[name], rtol=1e-10, atol=1e-12)


def test_conversion_leaves_the_state_dict_alone() -> None:
    from scalesnn.base import UserError

    model = torch.nn.Sequential(layer.BatchNorm2d(3))
    with pytest.raises(UserError, match="initialised"):
        layer.convert_sync_batchnorm(model)
    assert set(model.state_dict()) == set(torch.nn.Sequential(torch.nn.BatchNorm2d(3)).state_dict())
    functional.reset_net(model)
