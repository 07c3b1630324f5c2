"""A preference matrix from a file: CSV (with or without names), JSON (a list of rows) or NumPy's npy."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..core.text import excerpt, parse_json, read_text
from .game import check_preference


def read_preference(path: Path) -> tuple[torch.Tensor, list[str]]:
    """Read and check a matrix (A, A) and the actions' names; errors name the file, the line and the offending pair."""
    readers = {".csv": _read_csv, ".json": _read_json, ".npy": _read_npy}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path}: expected a file that ends in {', '.join(readers)}")
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    try:
        matrix, names = readers[path.suffix.lower()](path)
        check_preference(matrix, names)
    except (ValueError, TypeError, OSError, EOFError) as error:
        raise ValueError(f"{path}: {error}") from error
    return matrix, names


def _read_csv(path: Path) -> tuple[torch.Tensor, list[str]]:
    reader = csv.reader(io.StringIO(read_text(path), newline=""))
    try:
        lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from error
    lines = [(number, row) for number, row in lines if any(row)]
    names = None
    if lines and not _is_number(lines[0][1][-1]):  # a header; rows may then begin with their name as well
        names = [cell for cell in lines.pop(0)[1] if cell]
        lines = [(number, row[1:] if len(row) == len(names) + 1 else row) for number, row in lines]
    return _matrix([f"line {number}" for number, _ in lines], [row for _, row in lines], names)


def _read_json(path: Path) -> tuple[torch.Tensor, list[str]]:
    content = parse_json(read_text(path))
    rows = content.get("preference") if isinstance(content, dict) else content
    names = content.get("actions") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise ValueError('expected a list of rows, or {"actions": [names], "preference": [rows]}')
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"actions: expected a list of names; got {excerpt(names)}")
    return _matrix([f"row {index}" for index in range(len(rows))], rows, names)


def _read_npy(path: Path) -> tuple[torch.Tensor, list[str]]:
    import numpy as np

    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"expected an array of numbers, as numpy.save writes it; got {error}") from error
    if array.ndim != 2 or array.dtype.kind not in "fiu":
        raise ValueError(f"expected a matrix of numbers; got shape {array.shape} of {array.dtype}")
    return _matrix([f"row {index}" for index in range(len(array))], array.tolist(), None)


def _matrix(places: Sequence[str], rows: Sequence[Any], names: list[str] | None) -> tuple[torch.Tensor, list[str]]:
    if names is not None and len(names) != len(rows):
        raise ValueError(f"actions: expected {len(rows)} names, as there are rows; got {len(names)}")
    for place, row in zip(places, rows, strict=True):
        if len(row) != len(rows):
            raise ValueError(f"{place}: expected {len(rows)} numbers, as there are rows; got {len(row)}")
        for cell in row:
            if not _is_number(cell) or not math.isfinite(float(cell)):
                raise ValueError(
                    f"{place}: expected numbers; got {'nothing (null)' if cell is None else excerpt(cell)}"
                )
    matrix = torch.tensor([[float(cell) for cell in row] for row in rows], dtype=torch.float64, device="cpu")
    return matrix, names or [str(index) for index in range(len(rows))]


def _is_number(cell: object) -> bool:
    if isinstance(cell, bool) or not isinstance(cell, int | float | str):
        return False
    try:
        float(cell)
    except (ValueError, OverflowError):
        return False
    return True
