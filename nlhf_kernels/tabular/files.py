"""A preference matrix from a file: CSV (with or without names), JSON (a list of rows) or NumPy's npy."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import torch

from .game import check_preference


def read_preference(path: Path) -> tuple[torch.Tensor, list[str]]:
    """The matrix (A, A), checked, and the actions' names; errors name the file and the offending pair."""
    readers = {".csv": _read_csv, ".json": _read_json, ".npy": _read_npy}
    if path.suffix not in readers:
        raise ValueError(f"{path}: expected a file that ends in {', '.join(readers)}")
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    try:
        matrix, names = readers[path.suffix](path)
        check_preference(matrix, names)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return matrix, names


def _read_csv(path: Path) -> tuple[torch.Tensor, list[str]]:
    with path.open(newline="") as file:
        rows = [[cell.strip() for cell in row] for row in csv.reader(file) if any(cell.strip() for cell in row)]
    names = None
    if rows and not _is_number(rows[0][-1]):  # a header; rows may then begin with their name as well
        names = [cell for cell in rows.pop(0) if cell]
        rows = [row[1:] if len(row) == len(names) + 1 else row for row in rows]
    return _matrix(rows), names or _numbers(len(rows))


def _read_json(path: Path) -> tuple[torch.Tensor, list[str]]:
    content = json.loads(path.read_text())
    rows = content.get("preference") if isinstance(content, dict) else content
    names = content.get("actions") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise ValueError('expected a list of rows, or {"actions": [names], "preference": [rows]}')
    return _matrix(rows), [str(name) for name in names] if names else _numbers(len(rows))


def _read_npy(path: Path) -> tuple[torch.Tensor, list[str]]:
    import numpy as np

    matrix = torch.from_numpy(np.load(path, allow_pickle=False).astype("float64"))
    return matrix, _numbers(len(matrix))


def _matrix(rows: list[list[str]]) -> torch.Tensor:
    for index, row in enumerate(rows):
        if len(row) != len(rows):
            raise ValueError(f"row {index}: expected {len(rows)} numbers, as there are rows; got {len(row)}")
    return torch.tensor([[float(cell) for cell in row] for row in rows], dtype=torch.float64, device="cpu")


def _numbers(count: int) -> list[str]:
    return [str(index) for index in range(count)]


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
