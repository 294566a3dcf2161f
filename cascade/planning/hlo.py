"""What a compiled program moves and holds, read from what the compiler writes about it.

`traffic` reads HBM traffic and collectives from the optimized HLO text, `memory` what lies in HBM
from the assignment of buffers.

An optimized program is a list of instructions, most of them fusions. Each reads its operands from
memory and writes its result there, once; what happens inside a fusion stays in registers and in the
chip's fast memory. So traffic is the size of operands and results, times the trip counts of the
loops around, with three exceptions: what is only renamed (tuples, bitcasts), what is only partly
touched (slices, updates in place), and what lives in a fast memory, marked S(1) and up in TPU
layouts. Sizes are as stored: TPU layouts pad the last two dimensions to tiles.

A collective's bytes are those that each chip sends when the participants form a ring, the least
that any algorithm needs (Thakur et al. 2005): for n participants and an operand of s bytes,

    all-gather       s (n - 1)             reduce-scatter, all-to-all    s (n - 1) / n
    all-reduce       2 s (n - 1) / n       collective-permute            s
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# These move nothing: they are other names for the same memory, or no memory at all.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"),
    *("partition-id", "replica-id", "opt-barrier", "add-dependency", "domain"),
}
BITS = {"pred": 8, "token": 0, "opaque": 0}


@dataclass
class Traffic:
    """What one chip moves in one run of the program."""

    hbm_bytes: float = 0.0
    """Bytes read from and written to its memory."""
    counts: Counter[str] = field(default_factory=Counter)
    """Kind of collective -> how often it runs."""
    sent_bytes: Counter[str] = field(default_factory=Counter)
    """Kind of collective -> bytes that the chip sends by it."""

    def add(self, other: Traffic, times: int = 1) -> None:
        """Add so many times the other's traffic to this one."""
        self.hbm_bytes += times * other.hbm_bytes
        for kind in other.counts:
            self.counts[kind] += times * other.counts[kind]
            self.sent_bytes[kind] += times * other.sent_bytes[kind]


def traffic(hlo: str) -> Traffic:
    """Reads the traffic of a program from its text, `compiled.as_text()`.

    Raises ValueError for a text that is no HLO module, and a loop whose trip count it cannot tell.
    """
    program = _parse(hlo)
    return _of_computation(program, program.entry, {})


@dataclass(frozen=True)
class Memory:
    """Bytes in one chip's HBM."""

    argument_bytes: int
    """Bytes of the program's arguments."""
    temporary_bytes: int
    """Bytes of what it holds besides while it runs."""
    peak_bytes: int
    """Bytes of arguments, temporaries, constants, and results that take no argument's place."""


def memory(assignment: str) -> Memory:
    """Reads what lies in HBM from the text of a BufferAssignment.

    The colours in it are memories, and HBM is the one without; what is thread-local are a fusion's
    own scalars. TPUs' tables of tuples are among the temporaries, 16 KiB each, which is little in a
    large program. Raises ValueError if no allocation is listed.
    """
    found = re.findall(r"^allocation \d+: size (\d+), ((?:color \d+, )?)(.*)", assignment, re.M)
    if not found:
        raise ValueError("no allocations: this is not the text of a BufferAssignment")
    sizes: Counter[str] = Counter()
    for size, color, kind in found:
        if not color:
            sizes[re.split(r"[ :]", kind)[0]] += int(size)
    peak = sum(sizes.values()) - sizes["thread-local"]
    return Memory(sizes["parameter"], sizes["preallocated-temp"], peak)


@dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    argument: str
    attributes: str


@dataclass
class _Computation:
    name: str
    instructions: dict[str, _Instruction] = field(default_factory=dict)
    root: str = ""

    def shape(self, name: str) -> str:
        return self.instructions[name].shape

    def users(self, name: str) -> list[_Instruction]:
        """The instructions that read a value, looking through bitcasts."""
        found = []
        for i in self.instructions.values():
            if name in i.operands:
                found += self.users(i.name) if i.opcode == "bitcast" else [i]
        return found

    def origin(self, name: str, through: tuple[str, ...] = ("bitcast",)) -> _Instruction:
        """The instruction that makes a value, looking through those that only pass it on."""
        i = self.instructions[name]
        return self.origin(i.operands[0], through) if i.opcode in through else i


@dataclass
class _Program:
    entry: str = ""
    computations: dict[str, _Computation] = field(default_factory=dict)


# Values of the elements of a computation's parameter tuple, where they are known integers.
_Known = dict[int, int]


def _of_computation(program: _Program, name: str, known: _Known) -> Traffic:
    computation, total, channels = program.computations[name], Traffic(), set()
    for i in computation.instructions.values():
        if i.opcode in FREE or i.opcode.endswith(("-done", "-update")):
            continue
        if i.opcode == "while":
            trips = _trip_count(program, computation, i, known)
            body = _called(i, "body")[0]
            inner = _invariants(program, computation, i, known)
            total.add(_of_computation(program, body, inner), trips)
        elif i.opcode in ("call", "async-start"):
            total.add(_of_computation(program, _called(i, "to_apply|calls")[0], {}))
        elif i.opcode == "conditional":
            names = _called(i, "branch_computations|true_computation|false_computation")
            branches = [_of_computation(program, branch, {}) for branch in names]
            total.add(max(branches, key=lambda branch: branch.hbm_bytes))
        else:
            total.hbm_bytes += _hbm_bytes(program, computation, i)
            _add_collectives(program, computation, i, total, channels)
    return total


def _hbm_bytes(program: _Program, computation: _Computation, i: _Instruction) -> float:
    if i.opcode == "custom-call" and 'custom_call_target="AllocateBuffer"' in i.attributes:
        return 0.0
    if i.opcode.endswith("-start"):  # the shape is a tuple of sources and destinations
        return _bytes(i.shape, hbm=True)
    if i.opcode == "fusion":
        return _of_fusion(program, program.computations[_called(i, "calls")[0]])
    operands = [_bytes(computation.shape(o), hbm=True) for o in i.operands]
    result = _bytes(i.shape, hbm=True)
    if i.opcode in ("dynamic-slice", "slice", "gather"):
        return min(operands[0], result) + result
    if i.opcode == "dynamic-update-slice":
        return 2 * operands[1]
    if i.opcode == "scatter":
        return sum(operands[1:]) + operands[-1]
    return sum(operands) + result


def _of_fusion(program: _Program, inside: _Computation) -> float:
    read = 0.0
    for i in inside.instructions.values():
        if i.opcode != "parameter" or not (size := _bytes(i.shape, hbm=True)):
            continue
        users, part = inside.users(i.name), 0.0
        for user in users:
            first = inside.origin(user.operands[0]).name == i.name if user.operands else False
            if first and user.opcode in ("dynamic-slice", "slice", "gather"):
                part += _bytes(user.shape)
            elif not (first and user.opcode == "dynamic-update-slice"):
                part += size
        read += min(part, size)
    root = inside.instructions[inside.root]
    results = root.operands if root.opcode == "tuple" else (inside.root,)
    written = 0.0
    for name in results:
        # The result's own place, but the size of what is written to it.
        if size := _bytes(inside.shape(name), hbm=True):
            made = inside.origin(name)
            if made.opcode == "dynamic-update-slice":
                size = min(size, _bytes(inside.shape(made.operands[1])))
            elif made.opcode == "parameter":
                size = 0.0
            written += size
    return read + written


def _add_collectives(
    program: _Program,
    computation: _Computation,
    i: _Instruction,
    total: Traffic,
    channels: set[str],
) -> None:
    """Adds the collectives of an instruction, and those inside it if it is a fusion, to `total`.

    TPUs split one collective over several fusions to hide it behind their work; the channel, which
    they share, tells. And their reduce-scatter is a fusion of an all-reduce and a slice.
    """
    if i.opcode == "fusion":
        name = _called(i, "calls")[0]
        inside = program.computations[name]
        for inner in inside.instructions.values():
            _add_collectives(program, inside, inner, total, channels)
        return
    kind = i.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return
    if channel := re.search(r"channel_id=(\d+)", i.attributes):
        if channel[1] in channels:
            return
        channels.add(channel[1])
    if computation.name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    n = _participants(i.attributes)
    size = sum(_bytes(computation.shape(o)) for o in i.operands)
    total.counts[kind] += 1
    total.sent_bytes[kind] += (
        size
        * {
            "all-gather": n - 1,
            "all-reduce": 2 * (n - 1) / n,
            "reduce-scatter": (n - 1) / n,
            "all-to-all": (n - 1) / n,
            "collective-permute": 1,
        }[kind]
    )


def _participants(attributes: str) -> int:
    """Returns how many chips are in a group, from any of the ways to write replica_groups."""
    if named := re.search(r"replica_groups=mesh\[(.*?)\].*?\{('.*?)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        # An axis may be taken in part: 'axis_1':(1)2 is 2 of its chips.
        used = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[axis]) for axis, part in used)
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes):
        return int(iota[2])
    if groups := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(groups[1].split(","))
    return int(1e9)  # a bare {}: everybody, so many that (n - 1) / n is 1


def _trip_count(
    program: _Program, computation: _Computation, loop: _Instruction, known: _Known
) -> int:
    if noted := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(noted[1])
    condition = program.computations[_called(loop, "condition")[0]]
    test = condition.origin(condition.root)
    # A compare, perhaps alone in a fusion, whose parameters are then the fusion's operands.
    names = list(test.operands)
    if test.opcode == "fusion":
        inside = program.computations[_called(test, "calls")[0]]
        test = inside.origin(inside.root)
        order = [inside.origin(o) for o in test.operands]
        names = [names[int(o.argument)] if o.opcode == "parameter" else "" for o in order]
        constants = [int(o.argument) if o.opcode == "constant" else None for o in order]
    else:
        constants = [None, None]
    starts = _initial(computation, loop, known)
    values = []
    for name, constant in zip(names, constants, strict=True):
        made = condition.origin(name, ("bitcast", "copy")) if name else None
        if made is None:
            values.append((constant, None))
        elif made.opcode == "constant":
            values.append((int(made.argument), None))
        else:
            index = _index(made)
            values.append((starts.get(index), index))
    direction = re.search(r"direction=(\w+)", test.attributes)
    if test.opcode != "compare" or direction is None or any(v is None for v, _ in values):
        raise ValueError(f"cannot tell how often the loop {loop.name} runs")
    (left, i), (right, j) = values
    body = program.computations[_called(loop, "body")[0]]
    step = _step(body, i) or _step(body, j) or 1
    distance = abs(right - left) + (direction[1] in ("LE", "GE"))
    return math.ceil(distance / abs(step))


def _step(body: _Computation, index: int | None) -> int | None:
    """Returns what the body adds to an element of its tuple; None if that cannot be told."""
    if index is None:
        return None
    made = body.origin(body.instructions[body.root].operands[index], ("bitcast", "copy"))
    if made.opcode not in ("add", "subtract"):
        return None
    parts = [body.origin(o, ("bitcast", "copy")) for o in made.operands]
    return next((int(p.argument) for p in parts if p.opcode == "constant"), None)


def _initial(computation: _Computation, loop: _Instruction, known: _Known) -> _Known:
    """Returns the elements of a loop's first tuple that are known integers."""
    made = computation.origin(loop.operands[0], ("bitcast", "copy"))
    if made.opcode != "tuple":
        return {}
    found = {}
    for index, name in enumerate(made.operands):
        value = computation.origin(name, ("bitcast", "copy"))
        if value.opcode == "constant" and re.fullmatch(r"-?\d+", value.argument):
            found[index] = int(value.argument)
        elif value.opcode == "get-tuple-element" and _is_parameter(computation, value):
            if (outer := known.get(_index(value))) is not None:
                found[index] = outer
    return found


def _invariants(
    program: _Program, computation: _Computation, loop: _Instruction, known: _Known
) -> _Known:
    """Returns the elements of `_initial` that the body passes on, and so knows in every trip."""
    body = program.computations[_called(loop, "body")[0]]
    last = body.instructions[body.root].operands
    starts = _initial(computation, loop, known)
    same = {}
    for index, value in starts.items():
        made = body.origin(last[index], ("bitcast", "copy"))
        if made.opcode == "get-tuple-element" and _is_parameter(body, made):
            if _index(made) == index:
                same[index] = value
    return same


def _is_parameter(computation: _Computation, element: _Instruction) -> bool:
    return computation.origin(element.operands[0]).opcode == "parameter"


def _index(element: _Instruction) -> int:
    found = re.search(r"index=(\d+)", element.attributes)
    return int(found[1]) if found else -1


def _called(i: _Instruction, keys: str) -> list[str]:
    found = re.findall(rf"\b(?:{keys})=(?:\{{([^}}]*)\}}|(%?[\w.\-]+))", i.attributes)
    return [name.strip().lstrip("%") for a, b in found for name in (a or b).split(",")]


def _bytes(shape: str, hbm: bool = False) -> float:
    """Returns the stored bytes of an array or a tuple of them; with `hbm`, of what lies there."""
    total = 0.0
    for kind, dims, layout in re.findall(r"(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?", shape):
        space = re.search(r"S\((\d+)\)", layout)
        if hbm and space and space[1] != "0":
            continue
        total += math.prod(_stored(dims, layout)) * _bits(kind) / 8
    return total


def _bits(kind: str) -> int:
    if kind in BITS:
        return BITS[kind]
    width = re.match(r"[a-z]+(\d+)", kind)
    return int(width[1]) if width else 0


def _stored(dims: str, layout: str) -> list[int]:
    """Returns the sizes from the outermost dimension to the innermost, padded to the tile."""
    sizes = [int(d.lstrip("<=")) for d in dims.split(",") if d]
    order, _, rest = layout.partition(":")
    inner_first = [int(d) for d in order.split(",") if d]
    stored = [sizes[d] for d in reversed(inner_first)] if inner_first else sizes
    if (tile := re.match(r"T\(([\d,]+)\)", rest)) and stored:
        for back, size in enumerate(reversed(tile[1].split(",")), 1):
            if back <= len(stored):
                stored[-back] = -(-stored[-back] // int(size)) * int(size)
    return stored


def _parse(hlo: str) -> _Program:
    program, current = _Program(), _Computation("")
    for line in re.sub(r"/\*.*?\*/", "", hlo).splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = program.computations[header[2]] = _Computation(header[2])
            if header[1]:
                program.entry = header[2]
        elif made := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)", line):
            i = _instruction(made[2], made[3])
            current.instructions[i.name] = i
            if made[1]:
                current.root = i.name
    if not program.entry:
        raise ValueError("no ENTRY computation: this is not the text of an HLO module")
    return program


def _instruction(name: str, text: str) -> _Instruction:
    end = _closing(text) if text[0] == "(" else text.index(" ")
    shape, rest = text[:end], text[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    end = _closing("(" + rest) - 1
    argument, attributes = rest[: end - 1], rest[end:]
    operands = tuple(re.findall(r"%([\w.\-]+)", argument))
    return _Instruction(name, shape, opcode, operands, argument, attributes)


def _closing(text: str) -> int:
    """Returns the position after the parenthesis that closes the one the text begins with."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if not depth:
            return i + 1
    raise ValueError(f"unbalanced: {text[:80]}")
