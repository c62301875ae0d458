"""A rank that runs out of memory: all ranks start again with a policy that needs less."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from small_runs import SMALL, make_images, records
from torch.distributed import HashStore

from scalesnn.parallel.start_again import StartTogether
from scalesnn.parallel.topology import free_port

ROOT = Path(__file__).resolve().parents[2]
TRAINER = '''
import sys, time
import torch
from scalesnn.memory import policy_of
from scalesnn.model.train_imagenet_example import SResNetTrainer

class Full(SResNetTrainer):
    """Rank 1 runs out of memory in the second backward pass under the policy none."""
    def load_model(self, args, num_classes):
        model = super().load_model(args, num_classes)
        passes = []
        def backward(module, inputs, outputs):
            passes.append(1)
            if len(passes) == 2 and str(policy_of(model)) == "none" and self.topology.rank == 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        model.layer3.register_full_backward_hook(backward)
        return model

trainer = Full()
trainer.main(trainer.get_args_parser().parse_args())
'''


def train(folder: Path, *words: str) -> list[tuple[int, str]]:
    """Exit code and output of two ranks that train the small net."""
    (folder / "full.py").write_text(TRAINER)
    line = [sys.executable, str(folder / "full.py"), *SMALL, "--max-steps=4", "--dist-timeout=1", *words]
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    place |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment = {**os.environ, **place, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    ranks = [
        subprocess.Popen(
            line,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=200)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, text) for rank, text in zip(ranks, said, strict=True)]


STRATEGIES = {
    "ddp": ["--strategy=ddp"],
    "fsdp": ["--strategy=fsdp"],
    "zero2": [f"--deepspeed_config={ROOT / 'configs/zero2.json'}"],
    "zero3": [f"--deepspeed_config={ROOT / 'configs/zero3.json'}"],
}


@pytest.mark.distributed
@pytest.mark.long
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ranks_start_again_where_one_ran_out_in_backward(strategy: str, tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", 16, 2)
    words = [f"--data-path={images}", "--model=spiking_resnet18", *STRATEGIES[strategy]]
    ranks = train(tmp_path, *words, f"--output-dir={tmp_path / 'runs'}", "--run-name=full")
    assert [code for code, _ in ranks] == [0, 0], ranks
    text = ranks[0][1]
    assert "out of memory with none: CUDA out of memory. Tried to allocate 9 GiB" in text
    assert "all ranks started again with layer" in text
    assert [folder.name for folder in (tmp_path / "runs").iterdir() if folder.is_dir()] == ["full"]
    assert [record["step"] for record in records(tmp_path / "runs", "step")] == [1, 2, 3, 4]
    config = yaml.safe_load((tmp_path / "runs/full/config.yaml").read_text())
    assert "layer" in str(config)
    if strategy != "ddp":
        return
    fresh = [*words, f"--output-dir={tmp_path / 'fresh'}", "--activation-checkpoint=layer"]
    assert [code for code, _ in train(tmp_path, *fresh)] == [0, 0]
    losses = [[record["loss"] for record in records(tmp_path / name, "step")] for name in ("runs", "fresh")]
    assert losses[0] == losses[1]


class Together(StartTogether):
    """Notes that the process would be replaced."""

    replaced: list[tuple[int, bool]]

    def replace_process(self, forced: bool = False) -> None:
        self.replaced.append((self.rank, forced))


def of_ranks(count: int) -> list[Together]:
    store, replaced = HashStore(), []
    ranks = [Together(store, rank, count, grace=0.2) for rank in range(count)]
    for rank in ranks:
        rank.replaced = replaced
    return ranks


def in_threads(calls: list) -> list:
    results: list = [None] * len(calls)

    def run(place: int) -> None:
        results[place] = calls[place]()

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    return results


def test_ranks_agree_without_a_collective() -> None:
    ranks = of_ranks(3)
    assert in_threads([lambda r=r: r.agree(None) for r in ranks]) == [None] * 3
    late = lambda: (time.sleep(0.5), ranks[2].agree(None))[1]  # noqa: E731
    found = in_threads([lambda: ranks[0].agree(None), lambda: ranks[1].agree("layer", "full"), late])
    assert found == ["layer"] * 3


def test_the_first_that_asks_decides() -> None:
    ranks = of_ranks(2)
    found = in_threads([lambda: ranks[0].agree("layer"), lambda: ranks[1].agree("time:2")])
    assert found[0] == found[1]
    assert found[0] in ("layer", "time:2")


def test_a_rank_that_is_stuck_in_a_collective_is_replaced_by_its_thread() -> None:
    ranks = of_ranks(2)
    assert ranks[0].agree("layer") == "layer"
    ranks[0].start_again()  # by itself; rank 1 never comes
    end = time.monotonic() + 10
    while not ranks[1].replaced and time.monotonic() < end:
        time.sleep(0.05)
    assert ranks[1].replaced[0] == (1, True)
