"""Machine code of a GPU kernel, read without a GPU: NVRTC compiles, nvdisasm disassembles, loops are found.

A kernel's dynamic instruction count is that of the longest way through the body of its outermost loop, each
inner loop taken as often as it is told. Left out, as it is hardly ever run: the slow way of a division
(a CALL), and the other side of BRA.DIV (a warp that has diverged).
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

__all__ = ["Instruction", "Kernel", "Loop", "kernel_of", "nvdisasm", "nvrtc_compile"]

OPTIONS = ("-std=c++17", "--fmad=false", "-ftz=true")  # as CuPy compiles (kernels/cuda.py)
WIDTHS = {".U8": 1, ".S8": 1, ".U16": 2, ".S16": 2, ".64": 8, ".128": 16}  # bytes; else 4


def nvrtc_compile(code: str, architecture: str) -> bytes:
    """The cubin that NVRTC makes, no driver needed.

    Raises:
        RuntimeError: it does not compile.
    """
    from cuda.bindings import nvrtc

    _, program = nvrtc.nvrtcCreateProgram(code.encode(), b"kernel.cu", 0, [], [])
    options = [option.encode() for option in (*OPTIONS, f"--gpu-architecture={architecture}")]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = bytearray(nvrtc.nvrtcGetProgramLogSize(program)[1])
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(log.decode(errors="replace"))
    cubin = bytearray(nvrtc.nvrtcGetCUBINSize(program)[1])
    nvrtc.nvrtcGetCUBIN(program, cubin)
    return bytes(cubin)


@cache
def nvdisasm() -> str:
    """The disassembler's path: the one of the package nvidia-cuda-nvdisasm.

    Raises:
        FileNotFoundError: it is not installed.
    """
    for folder in map(Path, sys.path):
        for path in folder.glob("nvidia/cu*/bin/nvdisasm"):
            return str(path)
    raise FileNotFoundError("nvdisasm is not installed: pip install nvidia-cuda-nvdisasm")


def _disassemble(cubin: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [nvdisasm(), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@dataclass(frozen=True)
class Instruction:
    """One of SASS: its opcode with all its parts, its operands, and whether a predicate decides on it."""

    opcode: str
    operands: str
    guarded: bool

    @property
    def name(self) -> str:
        """The opcode's first part."""
        return self.opcode.partition(".")[0]

    @property
    def bytes(self) -> int:
        """What a thread reads or writes, if this is a load or a store."""
        return next((n for part, n in WIDTHS.items() if part in self.opcode.replace("desc", "")), 4)

    @property
    def target(self) -> int | None:
        """Where a branch goes; ptxas leaves some loops by a CALL whose target is an address."""
        found = re.search(r"(0x[0-9a-f]+)$", self.operands)
        return int(found[1], 16) // 16 if self.name in ("BRA", "CALL") and found else None

    def registers(self) -> list[str]:
        """The registers that it names, in order; the first is what a load fills."""
        return re.findall(r"\bR\d+\b", self.operands)


@dataclass
class Loop:
    """A natural loop: the block of its head, all its blocks, the loops in it."""

    head: int
    blocks: set[int]
    children: list[Loop] = field(default_factory=list)


@dataclass
class Kernel:
    """A kernel's instructions and registers; blocks are named by the index of their first instruction."""

    name: str
    instructions: list[Instruction]
    registers: int

    @property
    def spills(self) -> int:
        """Loads and stores of local memory."""
        return sum(i.name in ("LDL", "STL") for i in self.instructions)

    @cached_property
    def blocks(self) -> dict[int, range]:
        """Basic blocks."""
        starts = {0}
        for index, instruction in enumerate(self.instructions):
            if instruction.name in ("BRA", "EXIT", "RET") or instruction.target is not None:
                starts.add(index + 1)
                if instruction.target is not None:
                    starts.add(instruction.target)
        marks = [s for s in sorted(starts) if s < len(self.instructions)] + [len(self.instructions)]
        return {a: range(a, b) for a, b in itertools.pairwise(marks)}

    @cached_property
    def successors(self) -> dict[int, list[int]]:
        """Where each block may go, without the other side of BRA.DIV."""
        found = {}
        for start, block in self.blocks.items():
            last = self.instructions[block[-1]]
            ways = []
            if last.target is not None and last.opcode != "BRA.DIV":
                ways.append(last.target)
            ends = last.name in ("BRA", "EXIT", "RET") or last.target is not None
            if not ends or last.guarded or last.opcode == "BRA.DIV":
                ways += [block[-1] + 1] if block[-1] + 1 in self.blocks else []
            found[start] = ways
        return found

    @cached_property
    def loops(self) -> list[Loop]:
        """The outermost loops, with those in them."""
        dominators = self._dominators()
        found: dict[int, set[int]] = {}
        predecessors: dict[int, list[int]] = {}
        for block in dominators:
            for next_block in self.successors[block]:
                predecessors.setdefault(next_block, []).append(block)
        for block in dominators:
            for head in set(self.successors[block]) & dominators[block]:
                body, waiting = found.setdefault(head, {head}), [block]
                while waiting:
                    inner = waiting.pop()
                    if inner not in body:
                        body.add(inner)
                        waiting += predecessors.get(inner, [])
        roots: list[Loop] = []
        made: list[Loop] = []
        for head, body in sorted(found.items(), key=lambda item: -len(item[1])):
            loop = Loop(head, body)
            parents = [other for other in made if head in other.blocks]
            (min(parents, key=lambda other: len(other.blocks)).children if parents else roots).append(loop)
            made.append(loop)
        return roots

    def _dominators(self) -> dict[int, set[int]]:
        order, seen, waiting = [], {0}, [0]
        while waiting:
            block = waiting.pop()
            order.append(block)
            for next_block in self.successors[block]:
                if next_block not in seen:
                    seen.add(next_block)
                    waiting.append(next_block)
        found = {block: set(order) for block in order}
        found[0] = {0}
        changed = True
        while changed:
            changed = False
            for block in order[1:]:
                above = [found[b] for b in order if block in self.successors[b]]
                now = set.intersection(*above) | {block}
                changed, found[block] = changed or now != found[block], now
        return found

    def path(self, loop: Loop, trips: Callable[[Loop], float]) -> list[tuple[Instruction, float]]:
        """The longest way once through a loop: its instructions, and how often each is run.

        Args:
            trips: how often a loop in it is run.
        """
        owner = {block: child for child in loop.children for block in child.blocks}

        @cache
        def best(block: int) -> tuple[float, list[tuple[Instruction, float]]]:
            child = owner.get(block)
            if child is None:
                own = [(self.instructions[i], 1.0) for i in self.blocks[block]]
                if any(instruction.name == "CALL" and instruction.target is None for instruction, _ in own):
                    own = []
                exits = self.successors[block]
            else:
                times = trips(child)
                own = [(i, n * times) for i, n in self.path(child, trips)] if times else []
                exits = [e for b in sorted(child.blocks) for e in self.successors[b] if e not in child.blocks]
            rest: tuple[float, list[tuple[Instruction, float]]] = (0.0, [])
            for way in exits:
                if way in loop.blocks and way != loop.head:
                    rest = max(rest, best(way), key=lambda found: found[0])
            return sum(n for _, n in own) + rest[0], own + rest[1]

        return best(loop.head)[1]


def kernel_of(cubin: bytes) -> Kernel:
    """The kernel of a module that has one."""
    found = re.findall(
        rb"\x04\x2f\x08\x00....(..)\x00\x00", cubin, re.DOTALL
    )  # EIATTR_REGCOUNT, once or twice
    registers = {int.from_bytes(count, "little") for count in found}
    _, functions = json.loads(_disassemble(cubin, "-json"))
    if len(functions) != 1 or len(registers) != 1:
        raise ValueError(f"a module of one kernel is read, got {len(functions)}")
    instructions = list(_instructions(functions[0]["sass-instructions"]))
    return Kernel(functions[0]["function-name"], instructions, registers.pop())


def _instructions(found: list[dict[str, Any]]) -> Iterator[Instruction]:
    for one in found:
        opcode, operands = one["opcode"], one.get("operands", "")
        by_operand = opcode.startswith("BRA") and "," in operands  # BRA.U !UP0, target
        yield Instruction(opcode, operands, "predicate" in one or by_operand)
