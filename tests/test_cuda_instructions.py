"""What the compiler made of the sampler's kernels for sm_90: instructions of the inner loop, barriers of the finish.

Counts, not speeds. They hold what ops/mixture_sample/README.md says of the loop; `python -m tests.support.sass` prints
them.
"""

from __future__ import annotations

import re

import pytest

from tests.support import sass

ARCHITECTURE = 90
PER_LANE = 16  # elements of a step
STORAGE = {"float32": 0, "bfloat16": 1, "float16": 2}  # enum class Storage of mixture_sample_slice.cuh


@pytest.fixture(scope="module")
def kernels() -> dict[str, list[str]]:
    found = sass.disassemble(ARCHITECTURE)
    if not any("stream_rows" in name for name in found):
        pytest.skip(f"no _cuda with sm_{ARCHITECTURE} here, or no Triton, which brings nvdisasm")
    return found


def loops(kernels: dict[str, list[str]], dtype: str, models: int) -> dict[int, sass.Loop]:
    """Return the loops over whole, aligned steps, by their number of ex2: of equals the one of fewest instructions."""
    kernel = rf"stream_rowsILNS0_7StorageE{STORAGE[dtype]}ELi{models}EEEvNS0_6ParamsE$"
    (name,) = (key for key in kernels if re.search(kernel, key))
    shortest: dict[int, sass.Loop] = {}
    for loop in sass.loops_of(kernels[name], loads=models * (4 if dtype == "float32" else 2)):
        ex2 = loop.count("MUFU.EX2")
        if ex2 not in shortest or len(loop.instructions) < len(shortest[ex2].instructions):
            shortest[ex2] = loop
    return shortest


@pytest.mark.parametrize(
    ("dtype", "most", "most_alone"), [("bfloat16", 20, 12), ("float16", 20, 12), ("float32", 25, 15)]
)
def test_instructions_an_element(kernels, dtype, most, most_alone) -> None:
    """Counts for three log-probabilities and for tokens alone; no local memory."""
    found = loops(kernels, dtype, models=2)
    three, alone = 3 * PER_LANE + 3, PER_LANE + 1  # exponentials, and one a series to rescale
    assert len(found[three].instructions) <= most * PER_LANE
    assert len(found[alone].instructions) <= most_alone * PER_LANE
    assert not any(found[ex2].count("LDL", "STL") for ex2 in (three, alone))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_exponentials_leave_the_special_function_units(kernels, dtype) -> None:
    """One and two of every eight are polynomials: nine instructions more an exponential."""
    found = loops(kernels, dtype, models=2)
    total = 3 * PER_LANE
    for eighths in (1, 2):
        moved = total * eighths // 8
        loop = found[total + 3 - moved]
        assert loop.count("LDL", "STL") == 0
        assert len(loop.instructions) <= len(found[total + 3].instructions) + 10 * moved


@pytest.mark.parametrize("dtype", STORAGE)
def test_barriers_of_the_finish(kernels, dtype) -> None:
    """The sums are loaded, barrier, the tile is chosen, barrier, the token is; a tile of several steps has one more."""
    names = [key for key in kernels if "finish_streaming" in key]
    (name,) = (key for key in names if re.search(rf"stream_rowsILNS0_7StorageE{STORAGE[dtype]}ELi2EEE", key))
    assert sum("BAR.SYNC" in line for line in kernels[name]) <= 3


def test_the_parser_reads_loops() -> None:
    """The cheapest path with both loads, by a predicated branch around a third."""
    code = ["MOV R1, R2", "ISETP P0", "@P0 BRA `(.L_2)", "LDG.E.128 R4", "LDG.E.128 R8", "LDG.E.128 R9", "BRA `(.L_3)"]
    lines = [*code[:1], ".L_1:", *code[1:6], code[6], ".L_2:", "LDG.E.128 R4", "LDG.E.128 R8", ".L_3:", "@!P1 LDL R3"]
    lines += ["@P2 BRA `(.L_1)", "EXIT"]
    text = [line if line.startswith(".L") else f"        /*{i:04x}*/   {line} ;" for i, line in enumerate(lines)]
    (loop,) = sass.loops_of(text, loads=2)
    assert [each.split()[0] for each in loop.instructions] == ["ISETP", "@P0", "LDG.E.128", "LDG.E.128", "@!P1", "@P2"]
    assert (loop.count("LDG.E.128"), loop.count("LDL", "STL"), loop.count("BRA")) == (2, 1, 2)
    (loop,) = sass.loops_of(text, loads=3)
    assert len(loop.instructions) == 8
    assert not list(sass.loops_of(text, loads=4))
