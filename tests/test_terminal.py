"""Terminal output: texts are shown literally and fit the terminal's width."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest

from nlhf_kernels.core.terminal import cut_lines, new_console, new_progress, printable

PACKAGE = Path(__file__).resolve().parent.parent / "nlhf_kernels"


def test_consoles_and_bars_are_made_in_one_place() -> None:
    """Only terminal.py makes consoles and bars, with markup and emoji off: elsewhere a name like [/] would fail."""
    makers = re.compile(r"import .*\b(Console|Progress|TextColumn)\b|from_markup|rich\.print|rich import print")
    found = {path.name for path in PACKAGE.rglob("*.py") if makers.search(path.read_text())}
    assert found - {"trainer.py"} == {"terminal.py"}, "the trainer's Progress is a callback of transformers"


def test_texts_are_no_markup() -> None:
    console = new_console(file=io.StringIO(), width=80, force_terminal=True, color_system="truecolor")
    console.print("[/] [red]a[/red] :smile: 12")
    assert console.file.getvalue() == "[/] [red]a[/red] :smile: 12\n"


def test_bars_fit_80_columns() -> None:
    console = new_console(file=io.StringIO(), width=80, force_terminal=True, color_system=None, legacy_windows=False)
    with new_progress(console, transient=False) as progress:
        task = progress.add_task("[/] answers of a policy of a very long name: runs/2026/nash", total=1_000_000)
        progress.update(task, completed=999_999)
    last = console.file.getvalue().split("\x1b[2K")[-1].split("\n")[0]
    assert "[/] answers" in last and "999999/1000000" in last and len(last.strip("\x1b[?25h")) <= 80
    quiet = new_console(file=io.StringIO(), width=80)
    with new_progress(quiet) as progress:
        progress.add_task("a", total=1)
    assert quiet.file.getvalue() == "", "a file gets nothing"


@pytest.mark.parametrize(
    ("text", "end", "expected"),
    [
        ("short", False, "short"),
        ("0123456789" * 2, False, "0123456789" * 2),
        ("0123456789" * 3, False, "0123456789\n0123456..."),
        ("0123456789" * 3, True, "...3456789\n0123456789"),
        ("a\nb\nc", False, "a\nb..."),
        ("a\nbcdef\nc", True, "...ef\nc"),
    ],
)
def test_long_texts_are_cut_to_lines(text, end, expected) -> None:
    assert cut_lines(text, 10, 2, end=end) == expected


def test_control_characters_are_written_out() -> None:
    assert printable("a\x1b[31m\r\nb\u200b\u20ac") == "a\\x1b[31m\\r\nb\\u200b\u20ac"
