"""A PTX module as C++ for ptx_machine.h: its variables, its kernels, and a launcher for each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from ptx_instructions import (
    REGISTERS,
    SIZES,
    TYPES,
    Names,
    UnknownPtxError,
    instruction,
    label,
    register,
    split_operands,
)

__all__ = ["Entry", "UnknownPtxError", "entries", "statements", "translate"]


def statements(body: str) -> Iterator[str]:
    """The statements of a function's body: braces that open and close a scope, ``label:``, and the rest."""
    at = 0
    pattern = re.compile(r"\s*(?:([{}])|([$\w]+):(?!:)|([^;]*);)")
    while found := pattern.match(body, at):
        at = found.end()
        yield found[1] or (f"{found[2]}:" if found[2] else found[3].strip())
    if body[at:].strip():
        raise UnknownPtxError(f"the end of a function: `{body[at:].strip()[:80]}`")


PARAMETER = re.compile(  # .ptr says where a pointer points to
    r"\.param(?:\s+\.align\s+(\d+))?\s+\.(\w+)(?:\s+\.ptr(?:\s+\.global)?(?:\s+\.align\s+\d+)?)?"
    r"\s+(\w+)(?:\[(\d+)\])?"
)
VARIABLE = re.compile(
    r"\.(global|const|shared|local)((?:\s+\.align\s+\d+)?)\s+\.(\w+)\s+(\w+)\s*(\[\s*\d*\s*\])?\s*(?:=\s*([^;]+))?"
)


def _variable(text: str, names: Names, offset: list[int]) -> str:
    """The C++ of a variable; shared ones get their place in the block's memory."""
    found = VARIABLE.fullmatch(text)
    if not found:
        raise UnknownPtxError(f"`{text}`")
    space, align, kind, name, array, initial = found.groups()
    alignment = int(align.split()[-1]) if align else SIZES[kind]
    count = int((array or "[1]").strip("[] ") or 0)
    if space == "shared":
        if not count or initial:
            raise UnknownPtxError(f"shared memory of a size given at launch: `{text}`")
        offset[0] = -(-offset[0] // alignment) * alignment
        names.variables[name] = f"((u64){offset[0]})"
        names.shared.add(name)
        offset[0] += count * SIZES[kind]
        return ""
    names.variables[name] = f"((u64)&V_{name})"
    values = "" if initial is None else f" = {{{initial.strip('{} ')}}}"
    static = "" if space == "local" else "static "
    return f"alignas({alignment}) {static}{TYPES[kind]} V_{name}[{count}]{values};"


@dataclass
class Entry:
    """A kernel: its name, parameters (kind, size, alignment, name), threads a block, and body."""

    name: str
    parameters: list[tuple[str, int, int, str]]
    threads: int
    body: str


def entries(ptx: str) -> list[Entry]:
    """The kernels of a module.

    Raises:
        UnknownPtxError: functions that are called, or parameters of unknown kinds.
    """
    text = without_comments(ptx)
    if found := re.search(r"\.func\b[^;{]*", text):
        raise UnknownPtxError(f"a function that is called: `{' '.join(found[0].split())[:80]}`")
    kernels = []
    for found in re.finditer(r"\.entry\s+(\w+)\s*\(([^)]*)\)([^{]*)\{", text):
        parameters = []
        for parameter in filter(None, (p.strip() for p in found[2].split(","))):
            of = PARAMETER.fullmatch(parameter)
            if not of:
                raise UnknownPtxError(f"a parameter: `{parameter}`")
            size = SIZES[of[2]] * int(of[4] or 1)
            parameters.append((of[2] if not of[4] else "bytes", size, int(of[1] or SIZES[of[2]]), of[3]))
        threads = re.search(r"\.(?:max|req)ntid\s+(\d+)", found[3])
        if not threads:
            raise UnknownPtxError(f"kernel {found[1]} does not say how many threads a block has")
        kernels.append(Entry(found[1], parameters, int(threads[1]), _to_brace(text, found.end())))
    return kernels


def _to_brace(text: str, at: int) -> str:
    depth, end = 1, at
    while depth:
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
    return text[at : end - 1]


def without_comments(ptx: str) -> str:
    """The text without comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", ptx, flags=re.DOTALL)


def _function(entry: Entry, outer: Names, offset: list[int], read_only: bool) -> str:
    names = Names(variables=dict(outer.variables), shared=set(outer.shared))
    place = 0
    for _, size, alignment, name in entry.parameters:
        place = -(-place // alignment) * alignment
        names.parameters[name] = place
        place += size
    lines, declared, tables = [], [], list(statements(entry.body))
    for text in tables:
        if found := re.fullmatch(r"(?s)(\$?\w+:)?\s*\.branchtargets\s+(.*)", text):
            names.tables[lines_before(tables, text)] = split_operands(found[2])
    for text in tables:
        if text in ("{", "}"):
            lines.append(text)
        elif text.endswith(":"):
            lines.append(f"{label(text[:-1])}:;")
        elif found := re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text, re.DOTALL):
            if found[1] not in REGISTERS:
                raise UnknownPtxError(f"registers of an unknown kind: `{text}`")
            for name in split_operands(found[2]):
                ranged = re.fullmatch(r"(%?\w+)<(\d+)>", name)
                many = [f"{ranged[1]}{k}" for k in range(int(ranged[2]))] if ranged else [name]
                where = declared if ranged else lines  # others may belong to a scope
                where.extend(f"{REGISTERS[found[1]]} {register(one)};" for one in many)
        elif text.startswith((".shared", ".local")):
            declared.append(_variable(text, names, offset))
        elif not text or text.startswith((".pragma", ".branchtargets")):
            continue
        elif text.startswith("."):
            raise UnknownPtxError(f"unknown directive: `{text}`")
        else:
            lines.append(instruction(text, names))
    given = [
        (TYPES.get(kind, f"Bytes<{size}, {align}>"), k)
        for k, (kind, size, align, _) in enumerate(entry.parameters)
    ]
    arguments = "".join(f", {kind} a{k}" for kind, k in given[1:])
    packed = "".join(
        f"    std::memcpy(packed.bytes + {names.parameters[entry.parameters[k][3]]}, &a{k}, sizeof a{k});\n"
        for _, k in given[1:]
    )
    short = entry.name.removeprefix("scalesnn_")
    launcher = (
        f'extern "C" void launch_{short}(int columns, int rows{arguments}) {{\n'
        f"    Bytes<{max(place, 1)}, 16> packed = {{}};\n{packed}"
        f"    launch(columns, rows, {entry.threads}, SHARED_BYTES, {str(read_only).lower()}, "
        f"[=] {{ ptx_{entry.name}(packed.bytes); }});\n}}\n"
    )
    body = "\n".join(f"    {line}" for line in [*declared, *lines])
    return f"static void ptx_{entry.name}(const u8* parameters) {{\n{body}\n}}\n{launcher}"


def lines_before(all_statements: list[str], text: str) -> str:
    """The label before a statement."""
    return all_statements[all_statements.index(text) - 1][:-1]


def translate(ptx: str) -> str:
    """A module as C++, for ptx_machine.h: for every kernel ``launch_NAME(columns, rows, ...)``, whose
    parameters are the kernel's but for the first.

    Raises:
        UnknownPtxError: something in it is not known.
    """
    text = without_comments(ptx)
    names, offset = Names(), [0]
    outside = text
    kernels = entries(ptx)
    for entry in kernels:
        outside = outside.replace(entry.body, "")
    variables = [
        _variable(v.strip().removeprefix(".visible").strip(), names, offset)
        for v in re.findall(
            r"^\s*((?:\.visible\s+)?\.(?:global|const|shared)\s[^;]*);", outside, re.MULTILINE
        )
    ]
    read_only = ".nc" in text
    functions = [_function(entry, names, offset, read_only) for entry in kernels]
    head = f"""using namespace ptx;
static constexpr unsigned SHARED_BYTES = {offset[0]};
"""
    return head + "\n".join([*variables, *functions])
