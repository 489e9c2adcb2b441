"""Bytes and kernels of a program as XLA has compiled it for a GPU, counted from its text.

Every kernel is taken to read its operands and write its results once. Of an operand that it only
slices, the slices count; of a result that it updates in place, the update counts. Loops count with
their trip count if XLA knows it, else once. Of several branches, the one that moves most counts.
Repeated reads that miss the card's cache are not counted. Unknown instructions raise ValueError.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

BYTES = {
    "token": 0, "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4,
    "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip
KERNELS = {"fusion", "fusion-start", "custom-call", "copy", "sort", "scatter", "gather", "reduce"}
FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "fusion-done",
    "partition-id", "replica-id",
}  # fmt: skip
SLICES = {"dynamic-slice", "slice", "gather"}
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # index of the operand with the new values
_NAME = re.compile(r"(?:ENTRY )?%(\S+) \(")
_LINE = re.compile(r"\s+(ROOT )?%(\S+) = (.*?) ([a-z][a-z-]*)\((.*)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str  # operands and attributes, as text
    root: bool

    def called(self, key: str) -> str:
        """The computation named by an attribute ("calls", "body")."""
        found = re.search(rf"{key}=%([^\s,}}]+)", self.rest)
        assert found is not None, f"{self.name} has no {key}"
        return found.group(1)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a program moves and launches."""

    bytes: float = 0.0
    kernels: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.bytes + other.bytes, self.kernels + other.kernels)

    def times(self, turns: int) -> "Traffic":
        """The traffic of a loop with this many iterations."""
        return Traffic(self.bytes * turns, self.kernels * turns)


def size(shape: str) -> int:
    """Bytes of an array or of a tuple of arrays, without the workspace of cuBLAS (s8)."""
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    if len(arrays) > 1:
        arrays = [(kind, dims) for kind, dims in arrays if kind != "s8"]
    return sum(
        BYTES[kind] * math.prod(int(n) for n in dims.split(",") if n) for kind, dims in arrays
    )


def computations(text: str) -> dict[str, dict[str, Instruction]]:
    """Instructions by name, by computation; the entry's under "" as well."""
    found: dict[str, dict[str, Instruction]] = {}
    here: dict[str, Instruction] = {}
    for line in text.splitlines():
        if line.endswith("{") and (start := _NAME.match(line)):
            here = found.setdefault(start.group(1), {})
            if line.startswith("ENTRY"):
                found[""] = here
        elif match := _LINE.match(line):
            root, name, shape, opcode, rest = match.groups()
            operands = tuple(re.findall(r"%([^\s,()]+)", rest.split(")", 1)[0]))
            here[name] = Instruction(name, shape, opcode, operands, rest, root is not None)
    return found


def read_by(body: dict[str, Instruction], parameter: Instruction) -> int:
    """Bytes that a fused computation reads of one parameter."""
    alike, total = [parameter.name], 0
    for name in alike:  # bitcasts are the same bytes under another name
        for user in body.values():
            if name not in user.operands:
                continue
            if user.opcode == "bitcast":
                alike.append(user.name)
            elif user.opcode in SLICES and user.operands[0] == name:
                total += size(user.shape)
            elif not (user.opcode in UPDATES and user.operands[0] == name):
                return size(parameter.shape)
    return min(total, size(parameter.shape))


def written_by(body: dict[str, Instruction]) -> int:
    """Bytes that a fused computation writes."""
    root = next(i for i in body.values() if i.root)
    results = [body[o] for o in root.operands] if root.opcode == "tuple" else [root]
    total = 0
    for result in results:
        while result.opcode == "bitcast":
            result = body[result.operands[0]]
        at = UPDATES.get(result.opcode)
        total += size(result.shape if at is None else body[result.operands[at]].shape)
    return total


def _kernel(i: Instruction, here: dict[str, Instruction], all_: dict) -> Traffic:
    if i.opcode in ("fusion", "fusion-start"):
        body = all_[i.called("calls")]
        parameters = [p for p in body.values() if p.opcode == "parameter"]
        return Traffic(sum(read_by(body, p) for p in parameters) + written_by(body), 1)
    return Traffic(sum(size(here[o].shape) for o in i.operands) + size(i.shape), 1)


def _executed(name: str, all_: dict[str, dict[str, Instruction]]) -> Iterator[Traffic]:
    for i in all_[name].values():
        if i.opcode == "while":
            known = re.search(r'known_trip_count":\{"n":"(\d+)"', i.rest)
            turn = sum(_executed(i.called("body"), all_), Traffic())
            yield turn.times(int(known.group(1)) if known else 1)
        elif i.opcode == "conditional":
            listed = re.search(r"branch_computations=\{([^}]*)\}", i.rest)
            names = re.findall(r"%([^\s,]+)", listed.group(1)) if listed else [
                i.called("true_computation"), i.called("false_computation"),
            ]  # fmt: skip
            found = [sum(_executed(branch, all_), Traffic()) for branch in names]
            yield max(found, key=lambda t: t.bytes)
        elif i.opcode == "call":
            yield from _executed(i.called("to_apply"), all_)
        elif i.opcode in KERNELS:
            yield _kernel(i, all_[name], all_)
        elif i.opcode not in FREE:
            raise ValueError(f"{i.name}: unknown traffic of {i.opcode}: add it to KERNELS or FREE")


def traffic(text: str) -> Traffic:
    """The traffic of a compiled program, given as `compiled.as_text()`."""
    return sum(_executed("", computations(text)), Traffic())
