"""A compiled kernel's loops, read from its assembly: nvdisasm's SASS for NVIDIA, LLVM's amdgcn listing for AMD."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from operator import and_

_LABEL = re.compile(r"^\s*([.$\w]+):")
_SASS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
_SASS_GUARD = re.compile(r"^@!?U?PT?\d*\s+")
_SASS_BRANCH = re.compile(r"^BRA\S*\s+(.*?)`\(([.$\w]+)\)")
_AMDGCN = re.compile(r"^\s+([a-z]\w+)(?:\s+([^;]*?))?\s*(?:;(.*))?$")


@dataclass(frozen=True)
class Instruction:
    """opcode: without guard and operands. target: the label it may jump to. falls_through: whether the next
    instruction may follow it. local: it moves data between a register and the thread's own memory (a spill).
    """

    opcode: str
    target: str | None = None
    falls_through: bool = True
    local: bool = False

    @property
    def matrix(self) -> str | None:
        """HGMMA (wgmma), UTCMMA (tcgen05), HMMA (mma) or their like, MFMA; None for what multiplies no matrices."""
        name = self.opcode.split(".")[0]
        if name.startswith(("v_mfma", "v_smfmac", "v_wmma")):
            return "MFMA"
        if not name.endswith("MMA"):
            return None
        return "UTCMMA" if name.startswith("UTC") else name

    @property
    def exp2(self) -> bool:
        return self.opcode.startswith(("MUFU.EX2", "v_exp_f32"))


@dataclass(frozen=True)
class Loop:
    """What one iteration of a loop holds, with the loops inside it; both sides of each branch are counted."""

    instructions: int
    matrix: int
    exp2: int
    local: int
    innermost: bool  # no loop inside has matrix instructions or, if it has none itself, no loop inside at all


Listing = list[tuple[list[str], Instruction]]  # each instruction with the labels in front of it


def read_sass(text: str) -> Listing:
    """The instructions in the output of `nvdisasm -c`."""
    listing: Listing = []
    labels: list[str] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels.append(label[1])
        elif found := _SASS.match(line):
            listing.append((labels, _sass(found[1])))
            labels = []
    return listing


def _sass(text: str) -> Instruction:
    bare = _SASS_GUARD.sub("", text)
    guarded = bare != text
    opcode = bare.split()[0]
    if branch := _SASS_BRANCH.match(bare):
        # `BRA.U UP0, target` and `BRA P0, target` are conditional too, by their first operand
        return Instruction(opcode, branch[2], guarded or bool(branch[1]))
    if opcode.split(".")[0] in ("EXIT", "RET", "BRX", "JMP", "JMX", "KILL"):
        return Instruction(opcode, None, guarded)
    return Instruction(opcode, local=opcode.split(".")[0] in ("LDL", "STL"))


def read_amdgcn(text: str) -> Listing:
    """The instructions in the amdgcn assembly that Triton keeps."""
    listing: Listing = []
    labels: list[str] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels.append(label[1])
        elif found := _AMDGCN.match(line):
            listing.append((labels, _amdgcn(found[1], found[2] or "", found[3] or "")))
            labels = []
    return listing


def _amdgcn(opcode: str, operands: str, comment: str) -> Instruction:
    if opcode.startswith(("s_cbranch", "s_branch")):
        return Instruction(opcode, operands.strip(), opcode.startswith("s_cbranch"))
    if opcode in ("s_endpgm", "s_setpc_b64"):
        return Instruction(opcode, None, False)
    return Instruction(opcode, local=opcode.startswith("scratch_") or "Folded" in comment)


def matrix_kinds(listing: Listing) -> dict[str, int]:
    """How many matrix instructions of each kind there are."""
    kinds: dict[str, int] = {}
    for _, instruction in listing:
        if kind := instruction.matrix:
            kinds[kind] = kinds.get(kind, 0) + 1
    return kinds


def loops(listing: Listing) -> list[Loop]:
    """The natural loops: a jump back to a block that every path to the jump has passed, and what leads to that jump.

    That is more than the lines between a label and a jump back to it, which would take the waits that a compiler puts
    behind the last instruction, with a jump into the middle of a loop, for loops of their own.
    """
    blocks, successors = _blocks(listing)
    predecessors = _predecessors(successors)
    dominators = _dominators(predecessors)
    bodies: dict[int, set[int]] = {}
    for block, after in enumerate(successors):
        for head in after:
            if dominators[block] >> head & 1:
                bodies.setdefault(head, {head}).update(_leading_to(block, head, predecessors))
    out = []
    for body in bodies.values():
        inside = [_instructions(other, blocks) for other in bodies.values() if other < body]
        out.append(_loop(_instructions(body, blocks), inside))
    return out


def _loop(whole: list[Instruction], inside: list[list[Instruction]]) -> Loop:
    matrix = sum(i.matrix is not None for i in whole)
    innermost = not any(any(i.matrix for i in part) for part in inside) if matrix else not inside
    return Loop(len(whole), matrix, sum(i.exp2 for i in whole), sum(i.local for i in whole), innermost)


def _instructions(body: Iterable[int], blocks: list[list[Instruction]]) -> list[Instruction]:
    return [instruction for block in body for instruction in blocks[block]]


def _blocks(listing: Listing) -> tuple[list[list[Instruction]], list[set[int]]]:
    """Runs of instructions that are entered at the first and left at the last only, and which may follow which."""
    blocks: list[list[Instruction]] = []
    at: dict[str, int] = {}
    ended = True
    for labels, instruction in listing:
        if ended or labels:
            blocks.append([])
        at.update((label, len(blocks) - 1) for label in labels)
        blocks[-1].append(instruction)
        ended = instruction.target is not None or not instruction.falls_through
    successors = []
    for i, block in enumerate(blocks):
        last = block[-1]
        after = {at[last.target]} if last.target in at else set()
        if last.falls_through and i + 1 < len(blocks):
            after.add(i + 1)
        successors.append(after)
    return blocks, successors


def _predecessors(successors: list[set[int]]) -> list[set[int]]:
    out: list[set[int]] = [set() for _ in successors]
    for block, after in enumerate(successors):
        for other in after:
            out[other].add(block)
    return out


def _dominators(predecessors: list[set[int]]) -> list[int]:
    """For each block the blocks, as bits, that every path to it passes, itself among them; 0 where no path leads.

    Paths begin at the first block and at those without a predecessor (functions that are called).
    """
    roots = {block for block, before in enumerate(predecessors) if block == 0 or not before}
    out = [1 << block if block in roots else 0 for block in range(len(predecessors))]
    changed = True
    while changed:
        changed = False
        for block, before in enumerate(predecessors):
            known = [out[other] for other in before if out[other]]
            if block in roots or not known:
                continue
            new = reduce(and_, known) | 1 << block
            if new != out[block]:
                out[block], changed = new, True
    return out


def _leading_to(block: int, head: int, predecessors: list[set[int]]) -> set[int]:
    """The blocks from which `block` is reached without passing `head`."""
    seen, todo = {block}, [block]
    while todo:
        if (current := todo.pop()) != head:
            new = predecessors[current] - seen
            todo += new
            seen |= new
    return seen
