"""What a program that XLA has compiled will cost: the kernels it launches, the bytes they move, and what its devices
exchange."""

import itertools
import re
from collections.abc import Iterator
from math import prod
from typing import NamedTuple

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
BYTES |= {"s64": 8, "u64": 8, "f64": 8}
NO_KERNEL = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all opt-barrier async-done copy-done".split()
)
SLICES = "slice", "dynamic-slice", "gather"
EXCHANGES = "all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter", "collective-broadcast"


class Cost(NamedTuple):
    """Of a program, or of a loop's iteration."""

    launches: float
    bytes_moved: float
    seconds: float  # at least: the sum over kernels of the longer of a launch and of moving its bytes

    def times(self, n: float) -> "Cost":
        return Cost(*(n * x for x in self))


class Loop(NamedTuple):
    """A loop of the program; `cost` is that of an iteration with everything within it."""

    depth: int
    trips: int
    cost: Cost


class Exchange(NamedTuple):
    """Of a program's devices."""

    kind: str  # one of EXCHANGES
    num_bytes: int  # of its result on one device
    trips: tuple[int, ...]  # of the loops that it is in, the outer ones first

    @property
    def times(self) -> int:
        """How often the program makes it."""
        return prod(self.trips)


class Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: list[str]
    attributes: str


class Device(NamedTuple):
    """What a kernel costs at least."""

    bytes_per_second: float
    launch_seconds: float


def cost_of(text: str, device: Device) -> tuple[Cost, list[Loop]]:
    """The cost of an optimised program, and its loops, the outer ones first.

    Every instruction that computes is a kernel. Loops are multiplied by their known trip counts; one without counts
    once. Of a branch, the dearer side counts. A kernel moves what it reads and writes: of an array of which it reads
    slices, these; of one that it updates in place, the update.

    Args:
      text: `compiled.as_text()`.
    """
    found, entry = _computations(text)
    loops: list[Loop] = []
    return _cost(found, entry, device, 0, loops), loops


def exchanges_of(text: str) -> list[Exchange]:
    """What the devices of an optimised program exchange, on all sides of its branches. A loop without a known trip
    count counts once."""
    found, entry = _computations(text)
    return list(_exchanges(found, entry, ()))


def _exchanges(found: dict[str, list[Instruction]], name: str, trips: tuple[int, ...]) -> Iterator[Exchange]:
    for instruction in found.get(name, []):
        match instruction.opcode:
            case "while":
                for part in ("body", "condition"):
                    yield from _exchanges(found, _named(part, instruction), (*trips, _trips(instruction)))
            case "conditional":
                for side in _sides(instruction):
                    yield from _exchanges(found, side, trips)
            case "call" | "fusion" | "async-start":
                yield from _exchanges(found, _named("(?:to_apply|calls)", instruction), trips)
            case opcode if (kind := opcode.removesuffix("-start")) in EXCHANGES:
                yield Exchange(kind, _size(instruction.shape), trips)


def _trips(loop: Instruction) -> int:
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
    return int(known.group(1)) if known else 1


def _sides(branch: Instruction) -> list[str]:
    sides = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", branch.attributes)
    listed = re.search(r"branch_computations=\{([^}]*)\}", branch.attributes)
    return sides or re.findall(r"%?([\w.\-]+)", listed.group(1) if listed else "")


def _computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    found: dict[str, list[Instruction]] = {}
    name = entry = ""
    for line in text.splitlines():
        if head := re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{", line):
            name = head.group(2)
            found[name] = []
            entry = name if head.group(1) else entry
        elif line.startswith("}"):
            name = ""
        elif name and (instruction := _instruction(re.sub(r"/\*.*?\*/", "", line.strip()))):
            found[name].append(instruction)
    return found, entry


def _instruction(line: str) -> Instruction | None:
    parts = re.match(r"^(?:ROOT )?%?([\w.\-]+) = (\(.*?\)(?:\{[^}]*\})?|\S+) ([\w\-]+)\((.*)$", line)
    if parts is None:
        return None
    name, shape, opcode, rest = parts.groups()
    depths = itertools.accumulate(rest, lambda depth, x: depth + (x == "(") - (x == ")"), initial=1)
    end = next((i for i, depth in enumerate(depths) if depth == 0), len(rest))
    operands = [part.split(" ")[-1].strip("%)") for part in rest[:end].split(", ")]
    return Instruction(name, shape, opcode, operands, rest[end:])


def _named(attribute: str, instruction: Instruction) -> str:
    match = re.search(rf"{attribute}=%?([\w.\-]+)", instruction.attributes)
    return match.group(1) if match else ""


def _cost(found: dict[str, list[Instruction]], name: str, device: Device, depth: int, loops: list[Loop]) -> Cost:
    whole = Cost(0, 0, 0)
    for instruction in found.get(name, []):
        match instruction.opcode:
            case "while":
                place = len(loops)
                parts = [_cost(found, _named(x, instruction), device, depth + 1, loops) for x in ("body", "condition")]
                loop = Loop(depth, _trips(instruction), Cost(*map(sum, zip(*parts, strict=True))))
                loops.insert(place, loop)
                cost = loop.cost.times(loop.trips)
            case "conditional":
                cost = max(_cost(found, side, device, depth + 1, loops) for side in _sides(instruction))
            case "call" | "async-start":
                cost = _cost(found, _named("(?:to_apply|calls)", instruction), device, depth, loops)
            case opcode if opcode in NO_KERNEL:
                continue
            case _:
                moved = _bytes_moved(found, name, instruction)
                cost = Cost(1, moved, max(device.launch_seconds, moved / device.bytes_per_second))
        whole = Cost(*map(sum, zip(whole, cost, strict=True)))
    return whole


def _size(shape: str) -> int:
    arrays = re.findall(r"([a-z]\w*)\[([\d,]*)\]", shape)
    return sum(BYTES.get(dtype, 0) * prod(int(n) for n in sizes.split(",") if n) for dtype, sizes in arrays)


def _bytes_moved(found: dict[str, list[Instruction]], computation: str, kernel: Instruction) -> float:
    shapes = {x.name: x.shape for x in found[computation]}
    read = [_size(shapes.get(x, "")) for x in kernel.operands]
    body = found.get(_named("calls", kernel), []) if kernel.opcode == "fusion" else []
    if not body:
        return 2 * read[1] if kernel.opcode == "dynamic-update-slice" else _size(kernel.shape) + sum(read)
    users: dict[str, list[Instruction]] = {x.name: [] for x in body}
    for x in body:
        for operand in x.operands if x.opcode != "parameter" else []:
            if operand in users:
                users[operand].append(x)

    def uses(name: str) -> list[tuple[Instruction, str]]:
        """The instructions that use an array, and under which name, as it is or through a view of it."""
        found = []
        for x in users[name]:
            found += uses(x.name) if x.opcode in ("bitcast", "get-tuple-element") else [(x, name)]
        return found

    sizes = {x.name: _size(x.shape) for x in body}
    moved = in_place = 0
    for parameter in (x for x in body if x.opcode == "parameter"):
        whole, parts = sizes[parameter.name], 0
        for user, name in uses(parameter.name):
            if user.opcode in SLICES:
                parts += sizes[user.name]
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                in_place += whole - sizes.get(user.operands[1], whole)
            else:
                parts += whole
        moved += min(whole, parts)
    return moved + max(0, _size(kernel.shape) - in_place)
