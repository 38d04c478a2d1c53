"""What a program that XLA has compiled for a GPU will cost there: the kernels it launches and the bytes they move."""

import itertools
import re
from math import prod
from typing import NamedTuple

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
BYTES |= {"s64": 8, "u64": 8, "f64": 8}
NO_KERNEL = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all opt-barrier async-done copy-done".split()
)
SLICES = "slice", "dynamic-slice", "gather"


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
                trips = re.search(r'known_trip_count":\{"n":"(\d+)"', instruction.attributes)
                place = len(loops)
                parts = [_cost(found, _named(x, instruction), device, depth + 1, loops) for x in ("body", "condition")]
                loop = Loop(depth, int(trips.group(1)) if trips else 1, Cost(*map(sum, zip(*parts, strict=True))))
                loops.insert(place, loop)
                cost = loop.cost.times(loop.trips)
            case "conditional":
                sides = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", instruction.attributes)
                listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
                sides = sides or re.findall(r"%?([\w.\-]+)", listed.group(1) if listed else "")
                cost = max(_cost(found, side, device, depth + 1, loops) for side in sides)
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
