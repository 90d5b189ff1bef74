"""Read the text of a program's optimised HLO: what the program moves, and how often.

Instructions are distinguished by the number of loops around them: a decode program loops over tokens and, within, over
layers, so that an instruction in the inner loop runs once per layer and token.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
MOVES = ("copy", "transpose")
"""Instructions that only move what is there; within a fusion they cost nothing of their own."""

_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "bf16": 2,
    "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\(")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLEE = re.compile(r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CHANNEL = re.compile(r"channel_id=(\d+)")
# The devices of a group: [groups, devices]<=..., {{0, 1, ...}, ...}, or mesh[axes' sizes] {axes}.
_GROUPS = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]*)\}|mesh\[([^\]]*)\] \{([^}]*)\})")
_AXIS = re.compile(r"'([^']*)'=(\d+)")
_NUMBER = re.compile(r"^\s+%?([\w.\-]+) = [su]32\[\]\S* constant\((\d+)\)")
_LESS = re.compile(r"ROOT .* compare\(%?([\w.\-]+), %?([\w.\-]+)\), direction=LT")
_ELEMENT = re.compile(r"^\s+%?([\w.\-]+) = .* get-tuple-element\(.*\), index=(\d+)")
_RESULTS = re.compile(r"^\s+ROOT .* tuple\((.*?)\)")
_SUM = re.compile(r"^\s+%?([\w.\-]+) = [su]32\[\]\S* add\(%?([\w.\-]+), %?([\w.\-]+)\)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_ON_CHIP = "S(1)"  # the memory space of a core's own fast memory


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction of a compiled program.

    Attributes:
      name, opcode: as HLO has them; the two halves of an asynchronous one count as one.
      nbytes: of its result, on one device.
      shape: of its (first) result, such as "bf16[8,4096]".
      in_hbm: whether the result is in HBM, not in a core's own memory.
      loops: number of loops around it.
      runs: how often it runs; loops without a constant trip count are counted once.
      cycles: of a run, as the compiler of a TPU estimates them.
      received: bytes that a device receives from others in a run, of a collective; by rings, as TPUs do it.
      is_conditional: whether it is in a branch that may not be taken.
      channel: of a collective within a fusion.
    """

    name: str
    opcode: str
    nbytes: int
    shape: str
    in_hbm: bool
    loops: int
    is_conditional: bool
    channel: str = ""
    runs: int = 1
    received: float = 0.0
    cycles: int = 0


def instructions(text: str) -> Iterator[Instruction]:
    """List the instructions of a module's text, each as often as it is called from different places.

    Within a fusion only collectives are listed; a sum that is sliced at once is a "reduce-scatter". A collective that
    runs beside several fusions, all of which name its channel, is listed once.
    """
    computations = _computations(text)
    entry = next(name for name, (is_entry, _) in computations.items() if is_entry)
    channels = set()
    for one in _walk(computations, entry, 0, 1, False):
        if not one.channel or one.channel not in channels:
            yield one
        channels.add(one.channel)


def _computations(text: str) -> dict[str, tuple[bool, list[str]]]:
    found: dict[str, tuple[bool, list[str]]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            lines = []
            found[match[2]] = (match[1] is not None, lines)
        elif line.startswith(" "):
            lines.append(line)
    return found


def _walk(
    computations: dict[str, tuple[bool, list[str]]], name: str, loops: int, runs: int, is_conditional: bool
) -> Iterator[Instruction]:
    for line in computations[name][1]:
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        opcode = match[3]
        if opcode.endswith("-done"):
            continue
        result, cycles = match[2], _CYCLES.search(line)
        plain = opcode.removesuffix("-start")
        yield Instruction(
            match[1], plain, _nbytes(result), _first_shape(result), _ON_CHIP not in result, loops, is_conditional,
            runs=runs, received=_received(plain, line, _result_bytes(opcode, result)),
            cycles=int(cycles[1]) if cycles else 0,
        )  # fmt: skip
        callees = _CALLEE.findall(line)
        if opcode == "fusion":
            for fused in _fused_collectives(computations, callees):
                yield dataclasses.replace(fused, loops=loops, runs=runs, is_conditional=is_conditional)
            continue
        for branches in _BRANCHES.findall(line):
            callees += [branch.strip().removeprefix("%") for branch in branches.split(",")]
        for callee in callees:
            if opcode in ("while", "conditional", "call", "async-start") and callee in computations:
                is_loop = opcode == "while"
                trips = _trip_count(computations, callees) if is_loop else 1
                yield from _walk(
                    computations, callee, loops + is_loop, runs * trips, is_conditional or opcode == "conditional"
                )


def _fused_collectives(computations: dict[str, tuple[bool, list[str]]], callees: list[str]) -> Iterator[Instruction]:
    for callee in callees:
        _, lines = computations.get(callee, (False, []))
        for line in lines:
            match = _INSTRUCTION.match(line)
            if match is not None and match[3] in COLLECTIVES:
                # TPUs sum and scatter in a fusion of this name.
                opcode = "reduce-scatter" if "all-reduce-scatter" in callee else match[3]
                channel = _CHANNEL.search(line)
                nbytes = _nbytes(match[2])
                received = _received(match[3], line, nbytes) / (2 if opcode != match[3] else 1)
                yield Instruction(
                    match[1], opcode, nbytes, _first_shape(match[2]), _ON_CHIP not in match[2], 0, False,
                    channel[1] if channel else "", received=received,
                )  # fmt: skip


def _trip_count(computations: dict[str, tuple[bool, list[str]]], callees: list[str]) -> int:
    """Trip count of a loop that counts from 0 up to a constant of its condition; 1 of another.

    A loop that the compiler has unrolled counts in steps.
    """
    for callee in callees:
        lines = computations[callee][1]
        limits, elements = _matches(_NUMBER, lines), _matches(_ELEMENT, lines)
        for line in lines:
            if (less := _LESS.search(line)) and less[2] in limits:
                steps = (_step(computations[body][1], elements.get(less[1])) for body in callees if body != callee)
                return -(-int(limits[less[2]]) // max(1, *steps))
    return 1


def _step(body: list[str], index: str | None) -> int:
    """What the body of a loop adds to the number in its state of this index; 1 where it says something else."""
    numbers = _matches(_NUMBER, body)
    sums = {found[1]: found.groups()[1:] for line in body if (found := _SUM.match(line))}
    for line in body:
        if index is not None and (results := _RESULTS.match(line)):
            names = [name.split("%")[-1].strip() for name in results[1].split(",")]
            added = [numbers[name] for name in sums.get(names[int(index)], ()) if name in numbers]
            return int(added[0]) if added else 1
    return 1


def _matches(pattern: re.Pattern[str], lines: list[str]) -> dict[str, str]:
    return {found[1]: found[2] for line in lines if (found := pattern.match(line))}


def _result_bytes(opcode: str, result: str) -> int:
    """Bytes of the result; the first half of an asynchronous instruction names its operands too."""
    if opcode in ("collective-permute-start", "all-gather-start"):
        return max(_nbytes(match[0]) for match in _SHAPE.finditer(result))
    return _nbytes(result)


def _received(opcode: str, line: str, nbytes: int) -> float:
    if opcode == "collective-permute":
        return nbytes
    if opcode not in COLLECTIVES:
        return 0.0
    devices = _devices(line)
    share = (devices - 1) / devices
    return nbytes * {"all-reduce": 2 * share, "reduce-scatter": devices - 1}.get(opcode, share)


def _devices(line: str) -> int:
    """Number of devices in the group of a collective."""
    match = _GROUPS.search(line)
    if match is None:
        return 1
    number, listed, sizes, axes = match.groups()
    if number or listed:
        return int(number) if number else listed.count(",") + 1
    named = {name: int(size) for name, size in _AXIS.findall(sizes)}
    return math.prod(named[name] for name in re.findall(r"'([^']*)'", axes))


def _nbytes(result: str) -> int:
    total = 0.0
    for dtype, sizes in _SHAPE.findall(result):
        number = _BYTES.get(dtype, 0)
        for size in filter(None, sizes.split(",")):
            number *= int(size)
        total += number
    return int(total)


def _first_shape(result: str) -> str:
    match = _SHAPE.search(result)
    return match[0] if match else ""
