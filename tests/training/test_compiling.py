"""``--compile``: the network is one graph of torch.compile, trains as without it, or is refused by name."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_runs import SMALL, environment
from torch import Tensor, nn

from scalesnn import functional, layer, neuron, surrogate
from scalesnn.base import UserError
from scalesnn.memory import apply_policy
from scalesnn.model import spiking_resnet
from scalesnn.model.train_imagenet_example import SResNetTrainer
from scalesnn.training import compiling
from scalesnn.training.compiling import CompiledForward, check_compile, compile_network
from scalesnn.training.out_of_memory import Fallback

GIVEN = ["--config", "sample", "--max-steps", "5", "--batch-size", "8", "--T", "2", "--metrics-every", "1"]
GIVEN += ["--spike-metrics-every", "3", "--device", "cpu", "--wandb", "disabled", "--no-cpu-binding"]


@pytest.fixture(autouse=True)
def threads_and_compiler_as_they_were() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()


def resnet18() -> nn.Module:
    torch.manual_seed(0)
    net = spiking_resnet.spiking_resnet18(
        num_classes=10, spiking_neuron=neuron.LIFNode, surrogate_function=surrogate.ATan(), detach_reset=True
    )
    functional.set_step_mode(net, "m")
    return net.to(memory_format=torch.channels_last)


def small_net() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 6), neuron.IFNode(surrogate_function=surrogate.ATan(), step_mode="m"))
    return net.train()


def small_images(classes: int) -> nn.Module:
    def spike() -> nn.Module:
        return neuron.LIFNode(surrogate_function=surrogate.ATan(), step_mode="m")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1, self.sn1 = layer.Conv2d(3, 8, 3, 2), layer.BatchNorm2d(8), spike()
            self.conv2, self.bn2, self.sn2 = layer.Conv2d(8, 8, 3, 2, 1), layer.BatchNorm2d(8), spike()
            self.fc = layer.Linear(8, classes)

        def forward(self, x: Tensor) -> Tensor:
            x = self.bn1(self.conv1(x), neuron=self.sn1)
            x = self.bn2(self.conv2(x), neuron=self.sn2)
            return self.fc(x.mean((-1, -2)))

    net = Net()
    functional.set_step_mode(net, "m")
    return net


def losses(output: Path) -> list[float]:
    lines = [json.loads(line) for line in next(output.glob("*/metrics.jsonl")).read_text().splitlines()]
    return [line["loss"] for line in lines if line.get("kind") == "step"]


def train_sample(output: Path, trainer_class: type[SResNetTrainer], *words: str) -> list[float]:
    """Losses of a few steps on the shipped images, spike health measured at some."""
    trainer = trainer_class()
    trainer.main(trainer.get_args_parser().parse_args([*GIVEN, "--output-dir", str(output), *words]))
    return losses(output)


class SmallTrainer(SResNetTrainer):
    """The shipped images in a net of two units."""

    def load_model(self, args: Any, num_classes: int) -> nn.Module:
        return small_images(num_classes)


@pytest.mark.parametrize(
    "trainer_class", [SmallTrainer, pytest.param(SResNetTrainer, marks=pytest.mark.long)]
)
def test_the_shipped_images_train_alike_with_compile(
    trainer_class: type[SResNetTrainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = train_sample(tmp_path / "compiled", trainer_class, "--compile")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert compiled == train_sample(tmp_path / "plain", trainer_class)
    assert len(compiled) == 5


@pytest.mark.long
@pytest.mark.parametrize("trainer_class", [SmallTrainer, SResNetTrainer])
def test_the_shipped_images_train_alike_with_inductor(
    trainer_class: type[SResNetTrainer], tmp_path: Path
) -> None:
    compiled = train_sample(tmp_path / "compiled", trainer_class, "--compile")
    assert compiled == pytest.approx(train_sample(tmp_path / "plain", trainer_class), rel=1e-3)


RANK = """
import sys
sys.path[:0] = sys.argv[1:3]
from test_compiling import SmallTrainer, compiling
compiling.BACKEND = "aot_eager"
trainer = SmallTrainer()
trainer.main(trainer.get_args_parser().parse_args(sys.argv[3:]))
"""


@pytest.mark.long
@pytest.mark.distributed
@pytest.mark.parametrize(
    "strategy", [["--strategy", "ddp"], *(["--deepspeed_config", f"zero{stage}"] for stage in range(3))]
)
def test_two_ranks_train_alike_with_compile(strategy: list[str], tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    here = Path(__file__).parent
    found = []
    for name, words in (("compiled", ["--compile"]), ("plain", [])):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
        command += [str(tmp_path / "rank.py"), str(here), str(here.parent / "support"), *GIVEN, *strategy]
        command += [*words, "--output-dir", str(tmp_path / name)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment())
        assert ended.returncode == 0, ended.stderr
        found.append(losses(tmp_path / name))
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert len(found[0]) == 5


@pytest.mark.long
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_loss_and_gradients_of_resnet18_are_the_plain_ones(backend: str, autocast: bool) -> None:
    net = resnet18()
    plain = copy.deepcopy(net)
    net.forward = CompiledForward(net, backend)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(2, 3, 32, 32, generator=generator)
        found: list[tuple[Tensor, list[Tensor]]] = []
        for model in (plain, net):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logits = model(functional.repeat_over_time(images, 4)).float().mean(0)
            loss = nn.functional.cross_entropy(logits, torch.tensor([1, 2]))
            model.zero_grad()
            loss.backward()
            functional.reset_net(model)
            found.append((loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]))
        tolerance = 0.0 if backend == "aot_eager" else 2e-2 if autocast else 1e-5
        torch.testing.assert_close(found[0][0], found[1][0], rtol=tolerance, atol=tolerance)
        if backend == "aot_eager" or not autocast:
            for one, two in zip(found[0][1], found[1][1], strict=True):
                torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance * float(one.abs().max()))
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1


def test_only_training_steps_that_nobody_looks_into_are_compiled() -> None:
    net = small_net()
    net.forward = forward = CompiledForward(net, "eager")
    calls = []
    forward.compiled = lambda *x: calls.append("compiled") or forward.own(*x)
    x = torch.randn(3, 2, 4)
    net(x)
    functional.reset_net(net)
    assert calls == ["compiled"]
    net[1].observer = lambda *_: calls.append("observed")
    net(x)
    net[1].observer = None
    assert calls == ["compiled", "observed"]
    functional.reset_net(net)
    net.eval()(x)
    functional.reset_net(net)
    with torch.no_grad():
        net.train()(x)
    assert calls == ["compiled", "observed"]


class Breaks(nn.Module):
    """A network of the user's own that no graph holds."""

    def forward(self, x: Tensor) -> Tensor:
        print(x.sum().item())
        return x * 2


def test_a_network_that_is_no_one_graph_is_one_line() -> None:
    net = Breaks()
    net.forward = CompiledForward(net, "eager")
    with pytest.raises(
        UserError, match=r"--compile: torch.compile cannot take this network into one graph \(.+\); leave"
    ):
        net(torch.randn(3, requires_grad=True))


def asked(
    sharding: str = "single", policy: str = "none", device: str = "cpu"
) -> tuple[SimpleNamespace, SimpleNamespace]:
    args = SimpleNamespace(compile=True, activation_checkpoint=policy)
    return args, SimpleNamespace(sharding=sharding, device=torch.device(device))


@pytest.mark.parametrize("sharding", ["zero3", "fsdp"])
def test_strategies_that_gather_parameters_are_refused_by_name(sharding: str) -> None:
    with pytest.raises(UserError, match=f"--compile: {sharding} gathers the parameters"):
        check_compile(*asked(sharding))
    for whole in ("single", "ddp", "zero0", "zero1", "zero2"):
        check_compile(*asked(whole))


@pytest.mark.parametrize("policy", ["layer", "block", "time:2", "time:2,detach", "layer+time:4,bn=chunk"])
def test_policies_that_recompute_are_refused_by_name(policy: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"--activation-checkpoint none only, got {policy}: ")):
        check_compile(*asked(policy=policy))
    check_compile(*asked(policy="auto"))
    net = apply_policy(resnet18(), policy)
    with pytest.raises(UserError, match="auto chose"):
        compile_network(asked(policy="auto")[0], net)


def test_missing_compilers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "HAS_COMPILER", False)
    with pytest.raises(UserError, match=r"C\+\+ compiler"):
        check_compile(*asked())
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="Triton"):
        check_compile(*asked(device="cuda"))


def test_out_of_memory_tries_no_policy_under_compile() -> None:
    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError, match="out of memory with --compile, which leaves no other"):
        Fallback(small_net(), 3, None, print, held_by="--compile").run(full)


def test_the_command_line_refuses_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trainer = SResNetTrainer()
    words = [*SMALL, "--output-dir", str(tmp_path), "--compile", "--activation-checkpoint", "layer"]
    with pytest.raises(SystemExit) as stopped:
        trainer.main(trainer.get_args_parser().parse_args(words))
    assert stopped.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not os.listdir(tmp_path)


def test_every_op_of_ours_is_checked_by_opcheck() -> None:
    ops = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("scalesnn::")}
    tests = "".join(file.read_text() for file in (Path(__file__).parents[1] / "kernels").glob("test_*.py"))
    checked = re.findall(r"opcheck\(\s*torch\.ops\.scalesnn\.(\w+)\.default", tests)
    assert len(ops) >= 11
    assert ops == {f"scalesnn::{name}" for name in checked}
