"""Counts of machine instructions in the CUDA module, for tests: `python -m tests.support.sass [arch]` prints them.

A loop's count is that of its cheapest path with a given number of 16-byte loads: the path of whole, aligned steps.
Branches around the loads (rows that are not aligned, a row's end) are other paths of the same loop.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from nlhf_kernels.core import capabilities

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?P<text>.*?)\s*;")
LABEL = re.compile(r"^(\.L_x?_?\d+):")
BRANCH = re.compile(r"^(?P<guard>@!?U?P\S+ )?BRA (?P<second>!?U?P\d+, )?`\((?P<target>\S+)\)")
ENDS = re.compile(r"^(EXIT|RET|BRX|JMP|BRA |KILL)")


class Block(NamedTuple):
    instructions: list[str]
    successors: list[int]


class Loop(NamedTuple):
    """The cheapest path through a loop with the loads that were asked for."""

    instructions: list[str]

    def count(self, *opcodes: str) -> int:
        """Return how many of its instructions begin with one of `opcodes`, predicates aside."""
        bare = (re.sub(r"^@\S+ ", "", instruction) for instruction in self.instructions)
        return sum(text.startswith(opcodes) for text in bare)


def tool(name: str) -> Path | None:
    """Return one of the disassembling tools, which Triton brings; None where there is none."""
    try:
        import triton
    except ImportError:
        return None
    return next(Path(triton.__file__).parent.rglob(f"bin/{name}"), None)


def disassemble(architecture: int) -> dict[str, list[str]]:
    """Return the lines of every kernel and function of the built `_cuda` for an architecture, by mangled name; {} where
    there are none, or no tools."""
    cuobjdump, nvdisasm = tool("cuobjdump"), tool("nvdisasm")
    if cuobjdump is None or nvdisasm is None or capabilities.native_missing("_cuda"):
        return {}
    module = str(Path(str(capabilities.native("_cuda").__file__)).resolve())
    kernels: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        extract = [str(cuobjdump), "-xelf", f"sm_{architecture}", module]
        subprocess.run(extract, cwd=folder, capture_output=True, check=False)
        for cubin in sorted(Path(folder).glob("*.cubin")):
            text = subprocess.run([str(nvdisasm), "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
            lines: list[str] = []
            for line in text.splitlines():
                if line.startswith((".text.", "$")) and line.endswith(":"):  # functions follow their kernel
                    lines = kernels.setdefault(line.removeprefix(".text.").rstrip(":"), [])
                lines.append(line)
    return kernels


def blocks_of(lines: list[str]) -> list[Block]:
    """Divide a kernel into basic blocks, in the order of their addresses."""
    names: dict[str, int] = {}
    bodies: list[list[str]] = [[]]
    for line in lines:
        if label := LABEL.match(line):
            if bodies[-1]:
                bodies.append([])
            names[label[1]] = len(bodies) - 1
        elif instruction := INSTRUCTION.search(line):
            bodies[-1].append(instruction["text"])
            if BRANCH.match(instruction["text"]):
                bodies.append([])
    blocks = []
    for index, body in enumerate(bodies):
        branch = BRANCH.match(body[-1]) if body else None
        jumps = [names[branch["target"]]] if branch and branch["target"] in names else []
        unconditional = bool(body) and bool(ENDS.match(body[-1])) and not (branch and branch["second"])
        falls = [] if unconditional or index + 1 == len(bodies) else [index + 1]
        blocks.append(Block(body, jumps + falls))
    return blocks


def loops_of(lines: list[str], loads: int) -> Iterator[Loop]:
    """Yield a kernel's loops that have a path of exactly `loads` 16-byte loads from global memory."""
    blocks = blocks_of(lines)
    for end, block in enumerate(blocks):
        for start in block.successors:
            if start <= end and (path := _cheapest_path(blocks, start, end, loads)):
                yield Loop([text for index in path for text in blocks[index].instructions])


def _cheapest_path(blocks: list[Block], start: int, end: int, loads: int) -> list[int]:
    """Return the path from `start` to `end`, forwards, of fewest instructions among those of `loads` loads."""
    best: dict[tuple[int, int], tuple[int, list[int]]] = {(start, 0): (0, [])}
    for index in range(start, end + 1):
        own = Loop(blocks[index].instructions)
        wide = own.count("LDG.E.128")
        for before in range(loads - wide + 1):
            if (index, before) not in best:
                continue
            cost, path = best[index, before]
            cost, path = cost + len(own.instructions), [*path, index]
            if index == end:
                if before + wide == loads:
                    return path
                continue
            for successor in blocks[index].successors:
                key = (successor, before + wide)
                if successor > index and (key not in best or cost < best[key][0]):
                    best[key] = (cost, path)
    return []


def main() -> None:
    architecture = int(sys.argv[1]) if len(sys.argv) > 1 else 90
    for name, lines in disassemble(architecture).items():
        if not (kernel := re.search(r"stream_rowsILNS0_7StorageE(\d)ELi(\d)EEEvNS0_6ParamsE$", name)):
            continue
        storage, models = ("float32", "bfloat16", "float16", "mixed")[int(kernel[1])], int(kernel[2])
        for loop in loops_of(lines, loads=models * (4 if storage == "float32" else 2)):
            if ex2 := loop.count("MUFU.EX2"):
                total, local = len(loop.instructions), loop.count("LDL", "STL")
                print(
                    f"stream_rows {storage} x {models}: {total} instructions a step of 16 elements a lane, "
                    f"{total / 16:.1f} an element, {ex2} ex2, {local} to local memory"
                )


if __name__ == "__main__":
    main()
