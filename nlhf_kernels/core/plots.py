"""Figures: created without a display, with common colours, line styles and file formats."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

from .atomic import atomic_file
from .optional import need

FORMATS = (".png", ".svg", ".pdf")
#: Okabe and Ito's colours, without the yellow (too light for a line): distinguishable with every kind of colour vision.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def new_figure(width: float, height: float) -> Any:
    """Return a matplotlib figure without a display.

    Args:
        width, height (float): in inches.
    """
    return need("matplotlib.figure", "a figure").Figure(figsize=(width, height), layout="constrained")


def check_path(op: str, path: Path) -> None:
    """Raise if `save` could not write a figure there; to be called before hours of work.

    Args:
        op (str): the caller, which begins an error.
        path (Path): the figure's file.
    """
    need("matplotlib.figure", "a figure")
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{op}: plot: expected a file that ends in {', '.join(FORMATS)}; got {str(path)!r}")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"{op}: plot: expected a file that can be written; got {str(path)!r}")


def save(figure: Any, path: Path) -> None:
    """Write a figure, in the format that the file's name ends in.

    Args:
        figure (matplotlib Figure): of `new_figure`.
        path (Path): replaced where it is there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as work:
        figure.savefig(work, dpi=150, format=path.suffix[1:] or "png")


def as_svg(figure: Any) -> bytes:
    """Return the figure as SVG: the same bytes for the same figure, text as text.

    Args:
        figure (matplotlib Figure): of `new_figure`.
    """
    matplotlib = need("matplotlib", "a figure")
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "nlhf", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
