"""``--cuda-graph``: a recorded step trains as an ordinary one; what cannot be recorded is refused by name.

On the CPU a stand-in records torch's operations (support/graph_on_cpu.py).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from graph_on_cpu import CpuRecorder
from small_runs import SMALL, trace
from torch import Tensor, nn

from scalesnn import functional, layer, neuron, surrogate
from scalesnn.base import UserError
from scalesnn.memory import apply_policy
from scalesnn.model import train_classify
from scalesnn.model.train_imagenet_example import SResNetTrainer
from scalesnn.parallel.finite import NonFiniteLossError
from scalesnn.parallel.single import SingleStrategy
from scalesnn.parallel.topology import Topology
from scalesnn.tracking import StepTimer
from scalesnn.training import step_graph
from scalesnn.training.optimizers import make_optimizer
from scalesnn.training.step_graph import WARM_UP, StepGraph, check_cuda_graph, check_fused


class Net(nn.Module):
    """Two units with a residual, and whatever ``extra`` does to the result."""

    def __init__(self, extra: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        torch.manual_seed(0)
        make = lambda: neuron.ParametricLIFNode(surrogate_function=surrogate.ATan())  # noqa: E731
        self.conv1, self.bn1, self.sn1 = layer.Conv2d(3, 32, 3, 1, 1), layer.BatchNorm2d(32), make()
        self.conv2, self.bn2, self.sn2 = layer.Conv2d(32, 32, 3, 1, 1), layer.BatchNorm2d(32), make()
        self.pool, self.fc, self.extra = layer.MaxPool2d(2), layer.Linear(32, 4), extra
        functional.set_step_mode(self, "m")

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x), neuron=self.sn1)
        x = self.pool(self.bn2(self.conv2(x), neuron=self.sn2, residual=x))
        return self.extra(self.fc(x.mean((-1, -2))))


class Training:
    """Ten steps of a net: the losses, and the weights after them."""

    def __init__(self, net: nn.Module, opt: str = "sgd", clip: float = 0.0, on_nan: str = "skip") -> None:
        args = SimpleNamespace(
            opt=opt,
            lr=0.1,
            weight_decay=1e-4,
            momentum=0.9,
            clip_grad_norm=clip,
            on_nan=on_nan,
            fsdp_config=None,
        )
        self.strategy = SingleStrategy(args, Topology())
        self.strategy.setup_device("cpu")
        self.strategy.notice = lambda text: None
        self.strategy.prepare(
            net,
            lambda model: make_optimizer(args, model.parameters()),
            lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
        )
        for group in self.strategy.optimizer.param_groups:
            group["fused"], group["foreach"] = True, False
        self.timer = StepTimer()
        self.measured: set[int] = set()
        self.taken = 0

    def learn(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        with self.timer.phase("forward"):
            logits = self.strategy.model(functional.repeat_over_time(images, 3)).mean(0)
        loss = nn.functional.cross_entropy(logits, targets)
        self.strategy.backward(loss)
        functional.reset_net(self.strategy.module)
        return logits.detach(), loss.detach()

    def eager(self, images: Tensor, targets: Tensor) -> Any:
        logits, loss = self.learn(images, targets)
        return logits, loss, self.strategy.step()

    def graph(self, recorder: CpuRecorder) -> StepGraph:
        due = lambda: self.taken in self.measured  # noqa: E731
        return StepGraph(self.strategy, self.timer, due, self.eager, self.learn, recorder)

    def run(self, step: Callable[..., Any], steps: int = 10, bad: int | None = None) -> list[Any]:
        """[loss, what was done] of every step, then the weights and statistics."""
        found: list[Any] = []
        for self.taken in range(steps):
            generator = torch.Generator().manual_seed(self.taken)
            images = torch.randn(4, 3, 6, 6, generator=generator)
            if self.taken == bad:
                images[0, 0, 0, 0] = torch.nan
            targets = torch.randint(0, 4, (4,), generator=generator)
            _, loss, result = step(images, targets)
            found.append([loss.item(), float(result.grad_norm), result.stepped, result.skipped])
            if self.taken % 3 == 2:
                self.strategy.scheduler.step()
        state = {k: v.clone() for k, v in self.strategy.module.state_dict().items()}
        return [found, state, self.strategy.steps, self.strategy.optimizer.param_groups[0]["lr"]]


def assert_alike(one: list[Any], two: list[Any]) -> None:
    torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_recorded_steps_train_as_ordinary_ones(opt: str, clip: float) -> None:
    """The rate changes by the schedule, the norm is clipped; nothing in the step is read on the host."""
    plain = Training(Net(), opt, clip)
    expected = plain.run(plain.eager)
    training, recorder = Training(Net(), opt, clip), CpuRecorder()
    assert_alike(training.run(training.graph(recorder)), expected)
    assert len(recorder.recordings) == 1
    assert recorder.replays == 10 - WARM_UP - 1
    assert isinstance(training.strategy.optimizer.param_groups[0]["lr"], float), (
        "checkpoints hold plain rates"
    )


@pytest.mark.parametrize("policy", ["layer", "time:2"])
def test_recorded_steps_may_recompute(policy: str) -> None:
    plain = Training(apply_policy(Net(), policy))
    training = Training(apply_policy(Net(), policy))
    assert_alike(training.run(training.graph(CpuRecorder()), 6), plain.run(plain.eager, 6))


@pytest.mark.parametrize("bad", [1, WARM_UP, WARM_UP + 1, 7])
def test_a_step_that_is_not_finite_is_left_out_on_the_device(bad: int) -> None:
    plain = Training(Net())
    expected = plain.run(plain.eager, bad=bad)
    training = Training(Net())
    assert_alike(training.run(training.graph(CpuRecorder()), bad=bad), expected)
    assert expected[0][bad][3]
    stops = Training(Net(), on_nan="stop")
    with pytest.raises(NonFiniteLossError):
        stops.run(stops.graph(CpuRecorder()), bad=bad)
    before = Training(Net())
    assert_alike([stops.strategy.module.state_dict()], [before.run(before.eager, bad)[1]])


def test_measured_steps_and_other_shapes_run_as_ever() -> None:
    training, recorder = Training(Net()), CpuRecorder()
    training.measured = {0, 5, 7}
    plain = Training(Net())
    assert_alike(training.run(training.graph(recorder)), plain.run(plain.eager))
    assert recorder.replays == 10 - 3 - WARM_UP - 1
    graph = training.graph(recorder)
    _, _, result = graph(torch.randn(2, 3, 6, 6), torch.tensor([0, 1]))
    assert result.stepped


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            lambda x: x * abs(x.sum().item()),
            r"needs the host.*test_step_graph.py:\d+: .*item",
        ),
        (lambda x: x[x.abs() < 1e9].view_as(x), r"needs the host.*test_step_graph.py:\d+"),
        (lambda x: x * torch.tensor(1.0), r"needs the host.*test_step_graph.py:\d+: .*torch.tensor"),
        (lambda x: x * torch.where(x == x, 1.0, 2.0), r"needs the host.*test_step_graph.py:\d+: .*where"),
        (lambda x: x + 0 * torch.rand(()), "draws random numbers on the host"),
        (lambda x: x * (1 + 0 * random.random()), "draws random numbers on the host"),
    ],
    ids=["item", "mask", "tensor", "where", "torch's numbers", "python's numbers"],
)
def test_what_needs_the_host_is_refused_with_its_line(
    extra: Callable[[Tensor], Tensor], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_graph, "LIBRARY", ("/torch/", "graph_on_cpu.py"))
    training = Training(Net(extra))
    with pytest.raises(UserError, match=message):
        training.run(training.graph(CpuRecorder()))


def asked(device: str = "cuda", name: str = "single", accumulation: int = 1, policy: str = "none") -> Any:
    args = SimpleNamespace(cuda_graph=True, activation_checkpoint=policy)
    return args, SimpleNamespace(device=torch.device(device), name=name, accumulation=accumulation)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"device": "cpu"}, "--cuda-graph needs a GPU, but this run is on the CPU"),
        ({"name": "ddp"}, "--strategy ddp"),
        ({"name": "deepspeed"}, "--strategy deepspeed"),
        ({"name": "fsdp"}, "--strategy fsdp"),
        ({"accumulation": 4}, "--gradient-accumulation makes it 4"),
        ({"policy": "block"}, "--activation-checkpoint block"),
        ({"policy": "time:2,bn=chunk"}, "bn=chunk"),
    ],
    ids=str,
)
def test_runs_that_cannot_be_recorded_are_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_cuda_graph(*asked(**given))
    check_cuda_graph(*asked(policy="time:2"))
    check_cuda_graph(*asked(policy="auto"))


def test_an_optimizer_that_asks_the_host_is_refused() -> None:
    weights = [torch.zeros(2, requires_grad=True)]
    with pytest.raises(UserError, match="RMSprop has no fused form"):
        check_fused(torch.optim.RMSprop(weights))
    for optimizer in (torch.optim.SGD(weights), torch.optim.AdamW(weights)):
        check_fused(optimizer)


def test_the_command_line_refuses_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trainer = SResNetTrainer()
    words = [*SMALL, "--output-dir", str(tmp_path), "--cuda-graph"]
    with pytest.raises(SystemExit) as stopped:
        trainer.main(trainer.get_args_parser().parse_args(words))
    assert stopped.value.code == 2
    text = capsys.readouterr().err.strip()
    assert text == "scalesnn: --cuda-graph needs a GPU, but this run is on the CPU: leave --cuda-graph out"
    assert not list(tmp_path.iterdir())


def test_the_trainer_trains_alike_with_recorded_steps(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Trainer(SResNetTrainer):
        def load_model(self, args: Any, num_classes: int) -> nn.Module:
            return Net()

    recorders: list[CpuRecorder] = []
    monkeypatch.setattr(train_classify, "check_cuda_graph", lambda args, strategy: None)
    monkeypatch.setattr(step_graph, "CudaRecorder", lambda: recorders.append(CpuRecorder()) or recorders[-1])
    found = []
    for name, words in (("graph", ["--cuda-graph"]), ("plain", [])):
        trainer = Trainer()
        given = [
            *SMALL,
            "--data-path",
            str(images),
            "--output-dir",
            str(tmp_path / name),
            "--max-steps",
            "12",
        ]
        given += ["--spike-metrics-every", "5", "--no-cpu-binding", "--clip-grad-norm", "1", "--model-ema"]
        trainer.main(trainer.get_args_parser().parse_args([*given, *words]))
        found.append(trace(tmp_path / name))
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert len(found[0]) == 12
    assert recorders[0].replays == 12 - 3 - WARM_UP - 1  # measured: steps 1, 5 and 10
