"""How fast a streaming kernel can be on a GPU, from its machine code: a model.

A neuron-step is one neuron at one time-step. The predicted share of the memory's bandwidth is the least of 1
and

    in flight   bytes asked for before the first is used, by all threads of an SM,
                ÷ (bandwidth × latency ÷ SMs)
    overlap     bytes of a loop's round, by all threads of an SM, in the time that a round takes alone (the
                latency, and CYCLES an instruction), ÷ (bandwidth ÷ SMs)
    a pipe      the rate at which the busiest pipe, or the issue of instructions, lets neuron-steps through,
                ÷ the rate at which their bytes come

Assumed: loads come from DRAM after the latency under load, taken as about twice the idle latency of
microbenchmarks (466 cycles on the A100, 479 on the H100, Luo et al. 2024); SHARE of a pipe's slots can be
filled; lanes of a pipe as in the CUDA C++ Programming Guide's table of arithmetic throughput; every store
reaches DRAM once, and nothing is fetched that is not asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

from sass import Instruction, Kernel, Loop

__all__ = ["DEVICES", "Device", "Prediction", "hot_loop", "in_flight", "predict", "resident_threads"]

SHARE = 0.85  # of a pipe's slots
CYCLES = 2.0  # an instruction takes, in a warp that runs alone
THREADS = 256  # of a block


@dataclass(frozen=True)
class Device:
    """A GPU; rates are lanes per cycle and SM.

    Attributes:
        bandwidth: of DRAM, bytes per second. clock: Hz under load. latency: of DRAM under load, seconds.
        threads: most that an SM holds. float32, float64: lanes.
    """

    name: str
    architecture: str
    multiprocessors: int
    bandwidth: float
    clock: float
    latency: float
    threads: int
    float32: int
    float64: int

    @property
    def bytes_per_cycle(self) -> float:
        """An SM's share of the bandwidth."""
        return self.bandwidth / self.multiprocessors / self.clock

    @property
    def in_flight(self) -> float:
        """Bytes that an SM must have asked for at any time, to use all of the bandwidth."""
        return self.bandwidth * self.latency / self.multiprocessors


DEVICES = (
    Device("A100", "sm_80", 108, 2.04e12, 1.41e9, 0.7e-6, 2048, 64, 32),
    Device("H100", "sm_90", 132, 3.35e12, 1.75e9, 0.7e-6, 2048, 128, 64),
    Device("B200", "sm_100", 148, 8.0e12, 1.85e9, 0.9e-6, 2048, 128, 64),
    Device("RTX 5090", "sm_120", 170, 1.79e12, 2.4e9, 0.7e-6, 1536, 128, 2),
)
FMA = ("FADD", "FMUL", "FFMA", "IMAD", "HADD2", "HFMA2", "HMUL2")
SPECIAL = ("MUFU", "F2F", "I2F", "F2I", "S2R", "FCHK", "POPC", "SHFL", "VOTE")
CONTROL = ("BRA", "BSSY", "BSYNC", "EXIT", "NOP", "BAR", "WARPSYNC", "RET", "CALL")
MEMORY = ("LDG", "STG", "LDS", "STS", "LDL", "STL", "LDC", "LD", "ST")


def _pipe(instruction: Instruction) -> str:
    name = instruction.name
    if name in FMA:
        return "fma"
    if name in SPECIAL:
        return "special"
    if name[0] == "D" and name not in ("DEPBAR",):
        return "float64"
    if name in MEMORY:
        return "memory"
    return "other" if name in CONTROL or name[0] == "U" else "alu"


def resident_threads(registers: int, device: Device) -> int:
    """Threads that an SM holds: whole blocks, registers dealt out in units of 8 a thread."""
    each = max(-(-registers // 8) * 8, 24)
    return min(device.threads // THREADS, 65536 // (each * THREADS)) * THREADS


@dataclass(frozen=True)
class Prediction:
    """Of one kernel on one GPU.

    Attributes:
        instructions: dynamic, per neuron-step. in_flight: bytes of an SM. share: of the bandwidth.
        limit: what the share is limited by.
    """

    registers: int
    spills: int
    threads: int
    instructions: float
    in_flight: float
    share: float
    limit: str


def hot_loop(kernel: Kernel) -> Loop:
    """The outermost loop with most global loads."""
    return max(kernel.loops, key=lambda loop: sum(i.name == "LDG" for i, _ in kernel.path(loop, lambda _: 1)))


def in_flight(path: list[tuple[Instruction, float]]) -> int:
    """The most bytes that a thread has asked for and not yet used, along a way through its loop."""
    waiting: list[tuple[str, int]] = []
    most = 0
    for instruction, _ in path:
        used = set(instruction.registers())
        for place, (register, _) in enumerate(waiting):
            if register in used and instruction.name != "LDG":
                waiting = waiting[place + 1 :]  # loads come back in the order in which they were sent
                break
        if instruction.name == "LDG":
            waiting.append((instruction.registers()[0], instruction.bytes))
            most = max(most, sum(size for _, size in waiting))
    return most


def predict(
    kernel: Kernel,
    path: list[tuple[Instruction, float]],
    device: Device,
    steps: float,
    traffic: float,
    read: float,
) -> Prediction:
    """The model.

    Args:
        path: the way once through the kernel's loop (``Kernel.path``).
        steps: neuron-steps of that way. traffic: bytes of a neuron-step. read: those that are loads.
    """
    threads = resident_threads(kernel.registers, device)
    count = sum(n for _, n in path) / steps
    asked = min(in_flight(path), read * steps) * threads
    per_cycle = device.bytes_per_cycle / traffic  # neuron-steps an SM must do in a cycle
    pipes: dict[str, float] = {"issue": count / 128}
    lanes = {"fma": device.float32, "alu": 64, "special": 16, "float64": device.float64, "memory": 32}
    for instruction, n in path:
        pipe = _pipe(instruction)
        if pipe in lanes:
            pipes[pipe] = pipes.get(pipe, 0.0) + n / steps / lanes[pipe]
    busiest = max(pipes, key=lambda pipe: pipes[pipe])
    alone = device.latency * device.clock + CYCLES * count * steps
    limits = {
        "in flight": asked / device.in_flight,
        "overlap": threads * steps * traffic / alone / device.bytes_per_cycle,
        busiest: SHARE / (per_cycle * pipes[busiest]),
    }
    limit = min(limits, key=lambda name: limits[name])
    share, limited = min(1.0, limits[limit]), limit if limits[limit] < 1 else ""
    return Prediction(kernel.registers, kernel.spills, threads, count, asked, share, limited)
