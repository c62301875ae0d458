"""PTX instructions as C++: one statement each, on registers that are bits (their meaning: ptx_machine.h).

What is not known, an opcode, a modifier or an operand, is an ``UnknownPtxError`` with the instruction. The
instructions follow the PTX ISA 9. A GPU's approximations (``ex2.approx``, …) are computed to the last bit.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = [
    "REGISTERS",
    "SIZES",
    "TYPES",
    "Names",
    "UnknownPtxError",
    "instruction",
    "label",
    "register",
    "split_operands",
]

TYPES = {
    "pred": "bool",
    **{f"{kind}{bits}": f"u{bits}" for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": f"s{bits}" for bits in (8, 16, 32, 64)},
    "f32": "float",
    "f64": "double",
}
REGISTERS = {"pred": "bool", "b16": "u16", "b32": "u32", "b64": "u64", "f32": "u32", "f64": "u64"}
REGISTERS.update({f"{kind}{bits}": f"u{bits}" for kind in "su" for bits in (16, 32, 64)})
SIZES = {"b8": 1, "u8": 1, "s8": 1} | {k: int(k[1:]) // 8 for k in TYPES if k[1:] in ("16", "32", "64")}
SPECIAL = {"tid": "threadIdx", "ctaid": "blockIdx", "ntid": "blockDim", "nctaid": "gridDim"}
CACHING = {
    *("weak", "volatile", "relaxed", "acquire", "release", "acq_rel", "cta", "cluster", "gpu", "sys"),
    *("ca", "cg", "cs", "cv", "lu", "wb", "wt", "unified"),
}
COMPARISONS = {
    "eq": "x == y",
    "lt": "x < y",
    "le": "x <= y",
    "gt": "x > y",
    "ge": "x >= y",
    "lo": "x < y",
    "ls": "x <= y",
    "hi": "x > y",
    "hs": "x >= y",
    "num": "x == x && y == y",
    "nan": "x != x || y != y",
    "ltu": "!(x >= y)",
    "leu": "!(x > y)",
    "gtu": "!(x <= y)",
    "geu": "!(x < y)",
    "neu": "!(x == y)",
    "equ": "!(x < y || x > y)",
    "ne": "x < y || x > y",
}
ROUNDED = {"rni": "std::nearbyint", "rzi": "std::trunc", "rmi": "std::floor", "rpi": "std::ceil"}


class UnknownPtxError(Exception):
    """PTX that the translation does not know."""


@dataclass
class Names:
    """What the names of a function stand for: its parameters' offsets, variables as C++ addresses."""

    parameters: dict[str, int] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    shared: set[str] = field(default_factory=set)
    tables: dict[str, list[str]] = field(default_factory=dict)  # labels of brx.idx
    count: int = 0  # of warp operations


@dataclass
class Instruction:
    """One instruction; what has been understood of its modifiers is taken away."""

    text: str
    name: str
    modifiers: list[str]
    operands: list[str]
    names: Names

    def unknown(self, what: str) -> UnknownPtxError:
        """The error that says what of this instruction is not known."""
        return UnknownPtxError(f"{what} in PTX instruction `{self.text}`")

    def take(self, *words: str) -> str | None:
        """The first of ``words`` that is a modifier, taken away; None where none is."""
        for word in words:
            if word in self.modifiers:
                self.modifiers.remove(word)
                return word
        return None

    def type(self) -> str:
        """The C++ type of the last modifier, which is taken away."""
        if not self.modifiers or self.modifiers[-1] not in TYPES:
            raise self.unknown("no known type")
        return TYPES[self.modifiers.pop()]

    def value(self, index: int, kind: str) -> str:
        """Operand ``index`` as a C++ expression of type ``kind``."""
        if index >= len(self.operands):
            raise self.unknown(f"no operand {index}")
        text = self.operands[index]
        if text.startswith("!"):
            return f"!{self.bits(text[1:])}"
        return f"as<{kind}>({self.bits(text)})"

    def bits(self, text: str) -> str:
        """An operand as C++ bits: a register, a literal, or an address."""
        text = text.strip()
        if found := re.fullmatch(r"%(tid|ctaid|ntid|nctaid)\.([xyz])", text):
            return f"{SPECIAL[found[1]]}.{found[2]}"
        if text in ("%laneid", "WARP_SZ"):
            return "(shim::current % 32)" if text == "%laneid" else "32u"
        if re.fullmatch(r"%[a-zA-Z]\w*", text):
            return register(text)
        if found := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})", text):
            return f"0x{found[1]}u"
        if found := re.fullmatch(r"0[dD]([0-9A-Fa-f]{16})", text):
            return f"0x{found[1]}ull"
        if found := re.fullmatch(r"(-?)(0[xX][0-9A-Fa-f]+|\d+)U?", text):
            return f"((s64){int(found[1] + found[2], 0) % 2**64}ull)"
        if text in self.names.variables:
            return self.names.variables[text]
        if text in self.names.parameters:
            return f"((u64)parameters + {self.names.parameters[text]})"
        if re.fullmatch(r"[A-Za-z]\w*", text):  # a register of an asm block
            return register(text)
        raise self.unknown(f"unknown operand `{text}`")

    def put(self, value: str, index: int = 0) -> str:
        """The statement that writes ``value`` to the register ``index``."""
        return f"put({register(self.operands[index])}, {value});"

    def site(self) -> int:
        """A number of this warp operation, by which its lanes know each other."""
        self.names.count += 1
        return self.names.count


def register(text: str) -> str:
    """The C++ name of a register."""
    if not re.fullmatch(r"%?\w+", text):
        raise UnknownPtxError(f"`{text}` is no register")
    return "R_" + text.lstrip("%")


def _flush(i: Instruction, kind: str) -> str:
    return f"fz<{str(i.take('ftz') is not None and kind == 'float').lower()}>"


def _is_float(kind: str) -> bool:
    return kind in ("float", "double")


def _arithmetic(i: Instruction) -> str:
    kind = i.type()
    sign = {"add": "+", "sub": "-", "mul": "*", "div": "/"}[i.name]
    if _is_float(kind):
        i.take("rn") or (i.name == "div" and i.take("full", "approx"))
        fz, sat = _flush(i, kind), "saturate" if i.take("sat") else ""
        return i.put(f"{sat}({fz}({fz}({i.value(1, kind)}) {sign} {fz}({i.value(2, kind)})))")
    a, b = i.value(1, kind), i.value(2, kind)
    if i.name == "div":
        return i.put(f"divide<{kind}>({a}, {b})")
    if i.name != "mul":
        return i.put(f"({kind})((u64){a} {sign} (u64){b})")
    return i.put(_product(i, kind))


def _product(i: Instruction, kind: str) -> str:
    """lo, hi or wide: the product of operands 1 and 2."""
    a, b = i.value(1, kind), i.value(2, kind)
    match i.take("lo", "hi", "wide"):
        case "lo":
            return f"({kind})((u64){a} * (u64){b})"
        case "hi":
            return f"multiply_high<{kind}>({a}, {b})"
        case "wide":
            wide = kind[0] + str(2 * int(kind[1:]))
            return f"({wide})(({wide}){a} * ({wide}){b})"
    raise i.unknown("neither lo, hi nor wide")


def _fma(i: Instruction) -> str:
    kind = i.type()
    if not _is_float(kind):
        if i.name == "fma":
            raise i.unknown("an integer fma")
        wide = kind[0] + str(2 * int(kind[1:])) if "wide" in i.modifiers else kind
        return i.put(f"({wide})((u64){_product(i, kind)} + (u64){i.value(3, wide)})")
    mode = {"rn": "FE_TONEAREST", "rz": "FE_TOWARDZERO", "rm": "FE_DOWNWARD", "rp": "FE_UPWARD"}
    rounding = i.take(*mode) or "rn"
    fz, sat = _flush(i, kind), "saturate" if i.take("sat") else ""
    a, b, c = (f"{fz}({i.value(k, kind)})" for k in (1, 2, 3))
    return i.put(f"{sat}({fz}(fma_rounded<{mode[rounding]}, {kind}>({a}, {b}, {c})))")


def _one_argument(i: Instruction) -> str:
    kind = i.type()
    if not _is_float(kind):
        unsigned = "u" + kind[1:]
        zero = f"({kind})(0 - ({unsigned}){i.value(1, kind)})"
        if i.name not in ("neg", "abs"):
            raise i.unknown("an integer")
        return i.put(zero if i.name == "neg" else f"({i.value(1, kind)} < 0 ? {zero} : {i.value(1, kind)})")
    if i.name not in ("neg", "abs"):
        i.take("rn", "approx")
    fz = _flush(i, kind)
    x = f"{fz}({i.value(1, kind)})"
    result = {
        "neg": f"-{x}",
        "abs": f"std::fabs({x})",
        "rcp": f"{kind}(1) / {x}",
        "sqrt": f"std::sqrt({x})",
        "rsqrt": f"({kind})(1 / std::sqrt((double){x}))",
        "ex2": f"({kind})std::exp2((double){x})",
        "lg2": f"({kind})std::log2((double){x})",
        "sin": f"({kind})std::sin((double){x})",
        "cos": f"({kind})std::cos((double){x})",
        "tanh": f"({kind})std::tanh((double){x})",
    }[i.name]
    return i.put(f"{fz}({result})")


def _least(i: Instruction) -> str:
    kind = i.type()
    function = {"min": "minimum", "max": "maximum"}[i.name]
    if not _is_float(kind):
        sign = "<" if i.name == "min" else ">"
        return i.put(
            f"({i.value(1, kind)} {sign} {i.value(2, kind)} ? {i.value(1, kind)} : {i.value(2, kind)})"
        )
    fz = _flush(i, kind)
    return i.put(f"{function}({fz}({i.value(1, kind)}), {fz}({i.value(2, kind)}))")


def _remainder(i: Instruction) -> str:
    kind = i.type()
    return i.put(f"remainder<{kind}>({i.value(1, kind)}, {i.value(2, kind)})")


def _bitwise(i: Instruction) -> str:
    kind, sign = i.type(), {"and": "&", "or": "|", "xor": "^"}[i.name]
    return i.put(f"({kind})({i.value(1, kind)} {sign} {i.value(2, kind)})")


def _not(i: Instruction) -> str:
    kind = i.type()
    return i.put(f"{'!' if kind == 'bool' or i.name == 'cnot' else '~'}{i.value(1, kind)}")


def _shift(i: Instruction) -> str:
    kind, function = i.type(), {"shl": "shift_left", "shr": "shift_right"}[i.name]
    return i.put(f"{function}<{kind}>({i.value(1, kind)}, {i.value(2, 'u32')})")


def _funnel(i: Instruction) -> str:
    i.type()
    left, wrap = i.take("l", "r") == "l", i.take("wrap", "clamp") == "wrap"
    a, b, n = (i.value(k, "u32") for k in (1, 2, 3))
    return i.put(f"funnel({a}, {b}, {n}, {str(left).lower()}, {str(wrap).lower()})")


def _count(i: Instruction) -> str:
    kind = i.type()
    function = {"popc": "std::popcount", "clz": "std::countl_zero", "brev": "reverse"}[i.name]
    return i.put(f"(u64){function}({i.value(1, kind)})")


def _field(i: Instruction) -> str:
    kind = i.type()
    if i.name == "bfe":
        return i.put(f"extract<{kind}>({i.value(1, kind)}, {i.value(2, 'u32')}, {i.value(3, 'u32')})")
    a, b = i.value(1, kind), i.value(2, kind)
    return i.put(f"insert<{kind}>({a}, {b}, {i.value(3, 'u32')}, {i.value(4, 'u32')})")


def _permute(i: Instruction) -> str:
    i.type()
    return i.put("permute({}, {}, {})".format(*(i.value(k, "u32") for k in (1, 2, 3))))


def _logic(i: Instruction) -> str:
    i.type()
    return i.put("logic({}, {}, {}, {})".format(*(i.value(k, "u32") for k in (1, 2, 3, 4))))


def _compare(i: Instruction) -> str:
    kind = i.type()
    fz = _flush(i, kind)
    test = i.take(*COMPARISONS)
    if test is None or (
        test in ("num", "nan", "equ", "neu", "ltu", "leu", "gtu", "geu") and not _is_float(kind)
    ):
        raise i.unknown("no known comparison")
    if kind == "bool":
        raise i.unknown("a comparison of predicates")
    join = {"and": "&&", "or": "||", "xor": "!=", None: None}[i.take("and", "or", "xor")]
    x, y = f"{fz}({i.value(1, kind)})", f"{fz}({i.value(2, kind)})"
    if not _is_float(kind):
        x, y = i.value(1, kind), i.value(2, kind)
    targets = i.operands[0].split("|")
    text = ""
    for target, value in zip(targets, ("holds", "!holds"), strict=False):
        joined = value if join is None else f"({value}) {join} {i.value(3, 'bool')}"
        text += f" {register(target)} = {joined};" if target != "_" else ""
    return f"const {kind} x = {x}, y = {y}; const bool holds = {COMPARISONS[test]};{text}"


def _select(i: Instruction) -> str:
    kind = i.type()
    return i.put(f"({i.value(3, 'bool')} ? {i.value(1, kind)} : {i.value(2, kind)})")


def _move(i: Instruction) -> str:
    kind = i.type()
    target, source = i.operands
    if target.startswith("{"):  # one register into several
        parts = elements(target)
        width = int(kind[1:]) // len(parts) if kind[0] in "us" else 0
        if width not in (8, 16, 32):
            raise i.unknown("parts of unknown width")
        whole = i.value(1, kind)
        put = (
            f"put({register(part)}, (u{width})(whole >> {k * width}));"
            for k, part in enumerate(parts)
            if part != "_"
        )
        return f"u64 whole = {whole}; {' '.join(put)}"
    if source.startswith("{"):  # several into one
        parts = elements(source)
        width = int(kind[1:]) // len(parts)
        joined = " | ".join(
            f"(u64)as<u{width}>({i.bits(part)}) << {k * width}" for k, part in enumerate(parts)
        )
        return i.put(f"({kind})({joined})")
    plain = {"float": "u32", "double": "u64"}.get(kind, kind)
    return i.put(i.value(1, plain))


def elements(text: str) -> list[str]:
    """The registers of ``{a, b}``."""
    return [part.strip() for part in text.strip("{} ").split(",")]


def _convert(i: Instruction) -> str:
    words = [word for word in i.modifiers if re.fullmatch(r"(b?f16(x2)?)|[subf](8|16|32|64)", word)]
    if len(words) != 2:
        raise i.unknown("no pair of types")
    for word in words:
        i.modifiers.remove(word)
    to, of = words
    ftz = i.take("ftz") is not None
    rounding = i.take(*ROUNDED, "rn")
    sat = i.take("sat") is not None
    if sat and to not in ("f32", "f64"):
        raise i.unknown("a saturated conversion")
    flush = f"fz<{str(ftz).lower()}>"
    half = {"f16": "to_f16", "bf16": "to_bf16"}
    if to in ("f16x2", "bf16x2") and of == "f32" and rounding == "rn":
        high, low = (f"(u32){half[to[:-2]]}({flush}({i.value(k, 'float')}))" for k in (1, 2))
        return i.put(f"{high} << 16 | {low}")
    if to in half and of == "f32" and rounding == "rn":
        return i.put(f"{half[to]}({flush}({i.value(1, 'float')}))")
    if of in half and to == "f32" and rounding is None:
        return i.put(f"from_{of}({i.value(1, 'u16')})")
    if to not in TYPES or of not in TYPES:
        raise i.unknown("an unknown conversion")
    target, source = TYPES[to], TYPES[of]
    x = i.value(1, source)
    if source == "float":
        x = f"{flush}({x})"
    if _is_float(source) and rounding in ROUNDED:
        x = f"{ROUNDED[rounding]}({x})"
        if not _is_float(target):
            return i.put(f"to_integer<{target}>({x})")
    elif _is_float(source) and not _is_float(target):
        raise i.unknown("an integer without rounding")
    result = f"({target}){x}"
    if target == "float":
        result = f"{flush}({result})"
    return i.put(f"saturate({result})" if sat else result)


def _address(i: Instruction, index: int, space: str | None) -> str:
    found = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]", i.operands[index])
    if not found:
        raise i.unknown("an unknown address")
    base = f"as<u64>({i.bits(found[1])})"
    if space == "shared":
        base = f"((u64)shared_memory + {base})"
    return f"({base} + {found[2] or 0})"


def _memory(i: Instruction) -> str:
    """ld and st, of one register or a vector."""
    kind = i.type()
    space = i.take("global", "shared", "local", "param", "const")
    count = int((i.take("v2", "v4", "v8") or "v1")[1:])
    i.modifiers = [m for m in i.modifiers if m not in CACHING and not m.startswith(("L1::", "L2::"))]
    i.take("cta")
    read_only = i.take("nc") is not None
    size = SIZES[{"float": "f32", "double": "f64"}.get(kind, kind)]
    load = i.name == "ld"
    raw = {"float": "u32", "double": "u64"}.get(kind, kind)
    registers = elements(i.operands[0 if load else 1])
    if len(registers) != count:
        raise i.unknown("a vector of another length")
    lines = [f"u64 at = {_address(i, 1 if load else 0, space)}; check(at, {size * count});"]
    function = "load_read_only" if read_only else "load"
    for k, name in enumerate(registers):
        place = f"at + {k * size}"
        if load:
            lines.append(f"put({register(name)}, {function}<{raw}>({place}));" if name != "_" else "")
        else:
            store = "store" if space in ("shared", "local", "param") else "store_global"
            lines.append(f"{store}<{raw}>({place}, as<{raw}>({i.bits(name)}));")
    return " ".join(lines)


def _atomic(i: Instruction) -> str:
    kind = i.type()
    space = i.take("global", "shared")
    i.modifiers = [m for m in i.modifiers if m not in CACHING]
    change = i.take("add", "min", "max", "and", "or", "xor", "exch", "inc", "dec", "cas")
    first = 2 if i.name == "atom" else 1
    x = i.value(first, kind)
    flush = f"fz<{str(kind == 'float' and space == 'global').lower()}>"
    total = f"{flush}({flush}(v) + {flush}(x))" if _is_float(kind) else f"({kind})((u64)v + (u64)x)"
    if _is_float(kind) and change not in ("add", "exch"):
        raise i.unknown("an atomic operation on floating point")
    result = {
        "add": total,
        "exch": "x",
        "min": "v < x ? v : x",
        "max": "v > x ? v : x",
        "and": "(v & x)",
        "or": "(v | x)",
        "xor": "(v ^ x)",
        "inc": "v >= x ? 0 : v + 1",
        "dec": "v == 0 || v > x ? x : v - 1",
        "cas": "v == x ? y : v",
    }[change or ""]
    other = f"{kind} y = {i.value(first + 1, kind)}; " if change == "cas" else ""
    address = _address(i, first - 1, space)
    call = f"atomic<{kind}>({address}, [=]({kind} v) {{ return ({kind})({result}); }})"
    done = i.put(call) if i.name == "atom" and i.operands[0] != "_" else f"{call};"
    return f"{kind} x = {x}; {other}{done}"


def _convert_address(i: Instruction) -> str:
    i.type()
    to = i.take("to") is not None
    space = i.take("global", "shared", "local", "const", "param")
    offset = {("shared", True): " - (u64)shared_memory", ("shared", False): " + (u64)shared_memory"}
    return i.put(i.value(1, "u64") + offset.get((space or "", to), ""))


def _vote(i: Instruction) -> str:
    i.take("sync")
    kind = i.type()
    mode = i.take("ballot", "any", "all", "uni")
    word = f"ballot({i.value(1, 'bool')}, {i.value(2, 'u32')}, {i.site()})"
    if mode == "ballot" and kind == "u32":
        return i.put(word)
    test = {"any": "word != 0", "all": "word == ~0u", "uni": "word == 0 || word == ~0u"}.get(mode or "")
    if test is None:
        raise i.unknown("an unknown vote")
    return f"u32 word = {word}; {i.put(test)}"


def _shuffle(i: Instruction) -> str:
    i.take("sync")
    i.type()
    mode = i.take("up", "down", "bfly", "idx")
    if mode is None or len(i.operands) != 5:
        raise i.unknown("an unknown shuffle")
    target, *inside = i.operands[0].split("|")
    a, b, c, mask = (i.value(k, "u32") for k in (1, 2, 3, 4))
    note = f" {register(inside[0])} = inside;" if inside else ""
    call = f"shuffle(Shuffle::{mode}, {a}, {b}, {c}, {mask}, {i.site()}, inside)"
    return f"bool inside; put({register(target)}, {call});{note}"


def _reduce(i: Instruction) -> str:
    i.take("sync")
    kind = i.type()
    join = i.take("add", "min", "max", "and", "or", "xor")
    result = {
        "add": "a + b",
        "min": "a < b ? a : b",
        "max": "a > b ? a : b",
        "and": "a & b",
        "or": "a | b",
        "xor": "a ^ b",
    }[join or ""]
    function = f"[]({kind} a, {kind} b) {{ return ({kind})({result}); }}"
    return i.put(f"reduce<{kind}>({i.value(1, kind)}, {i.value(2, 'u32')}, {i.site()}, {function})")


def _barrier(i: Instruction) -> str:
    i.take("cta"), i.take("aligned")
    if i.take("warp") and i.take("sync"):
        return f"exchange(0, {i.value(0, 'u32')}, {i.site()});"
    if not i.take("sync") or i.operands != ["0"]:
        raise i.unknown("a barrier of part of a block")
    return "__syncthreads();"


def _fence(i: Instruction) -> str:
    i.modifiers = [m for m in i.modifiers if m not in CACHING and m not in ("gl", "sc")]
    return ""


def _branch(i: Instruction) -> str:
    i.take("uni")
    return f"goto {label(i.operands[0])};"


def _branch_by_index(i: Instruction) -> str:
    i.take("idx"), i.take("uni")
    labels = i.names.tables[i.operands[1]]
    cases = " ".join(f"case {k}: goto {label(name)};" for k, name in enumerate(labels))
    return f'switch ({i.value(0, "u32")}) {{ {cases} default: fail("a branch beyond its table"); }}'


def _return(i: Instruction) -> str:
    i.take("uni")
    return "return;"


def _trap(i: Instruction) -> str:
    return 'fail("trap");'


INSTRUCTIONS: dict[str, Callable[[Instruction], str]] = {
    **dict.fromkeys(("add", "sub", "mul", "div"), _arithmetic),
    **dict.fromkeys(("fma", "mad"), _fma),
    **dict.fromkeys(
        ("neg", "abs", "rcp", "sqrt", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh"), _one_argument
    ),
    **dict.fromkeys(("min", "max"), _least),
    **dict.fromkeys(("and", "or", "xor"), _bitwise),
    **dict.fromkeys(("not", "cnot"), _not),
    **dict.fromkeys(("shl", "shr"), _shift),
    **dict.fromkeys(("popc", "clz", "brev"), _count),
    **dict.fromkeys(("bfe", "bfi"), _field),
    **dict.fromkeys(("ld", "st"), _memory),
    **dict.fromkeys(("atom", "red"), _atomic),
    **dict.fromkeys(("bar", "barrier"), _barrier),
    **dict.fromkeys(("membar", "fence"), _fence),
    **dict.fromkeys(("ret", "exit"), _return),
    "rem": _remainder,
    "shf": _funnel,
    "prmt": _permute,
    "lop3": _logic,
    "setp": _compare,
    "selp": _select,
    "mov": _move,
    "cvt": _convert,
    "cvta": _convert_address,
    "vote": _vote,
    "shfl": _shuffle,
    "redux": _reduce,
    "bra": _branch,
    "brx": _branch_by_index,
    "trap": _trap,
}


def label(name: str) -> str:
    """The C++ name of a label."""
    return "L_" + name.replace("$", "_")


def split_operands(text: str) -> list[str]:
    """``a, {b, c}, [d]`` at its outer commas."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|[^,{])+", text)]


def instruction(text: str, names: Names) -> str:
    """The C++ statement of one instruction.

    Raises:
        UnknownPtxError: something of it is not known.
    """
    guard, rest = re.fullmatch(r"(?:@(!?%\w+)\s+)?(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
    opcode, _, operands = rest.replace("\n", " ").replace("\t", " ").partition(" ")
    name, *modifiers = opcode.split(".")
    i = Instruction(text, name, modifiers, split_operands(operands), names)
    if name not in INSTRUCTIONS:
        raise i.unknown(f"unknown opcode `{name}`")
    try:
        line = INSTRUCTIONS[name](i)
    except (KeyError, ValueError, IndexError) as error:
        raise i.unknown(f"what is not known ({error})") from error
    if i.modifiers:
        raise i.unknown(f"unknown modifier `.{i.modifiers[0]}`")
    condition = f"if ({'!' if guard[0] == '!' else ''}{register(guard.lstrip('!'))}) " if guard else ""
    return f"{condition}{{ {line} }}"
