"""Rows of a data set with their places (file and line, or number), so that errors can name them.

JSON, JSONL and CSV files are read here, line by line. The optional package `datasets` reads everything else: hub names,
Parquet, folders of `save_to_disk`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..core.optional import need
from ..core.places import locate
from ..core.text import first_line, parse_json, read_text

Row = Mapping[str, Any]
Source = str | Path | Iterable[Row]  # a file, a folder, a name on the hub, a `datasets.Dataset`, dicts in memory
Placed = tuple[str, Row]  # ("pairs.jsonl, line 7", the row)


def read_rows(source: Source, *, split: str | None = None) -> Iterator[Placed]:
    """Yield every row with its place.

    Args:
        source: a file, a folder of `save_to_disk`, a name on the hub, a `datasets.Dataset`, or dicts.
        split: part of a hub data set (None: train) or of a saved `DatasetDict`.
    """
    if isinstance(source, (str, Path)):
        return _read_path(str(source), split)
    if split is not None:
        raise ValueError(f"data: split: expected none for rows in memory, which have no parts; got {split!r}")
    if isinstance(source, Mapping):
        parts = ", ".join(map(str, source))
        raise TypeError(f"data: expected rows; got a mapping of {parts}: a row alone, or parts of which to pass one")
    if not isinstance(source, Iterable):
        raise TypeError(f"data: expected a path, a data set or dicts; got {type(source).__name__}")
    return _numbered("row", enumerate(source))


def _read_path(name: str, split: str | None) -> Iterator[Placed]:
    path = Path(name).expanduser()
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        return _numbered(f"{name}, row", enumerate(_through_datasets(path, name, split)))
    if split is not None:
        raise ValueError(f"data: split: expected none for {name}, a file without parts; got {split!r}")
    if not path.is_file():
        raise ValueError(f"data: {name}: there is no such file")
    return reader(path)


def _numbered(what: str, rows: Iterable[tuple[int, Any]]) -> Iterator[Placed]:
    for number, row in rows:
        if not isinstance(row, Mapping):
            raise TypeError(f"data: {what} {number}: expected a dict of columns; got {type(row).__name__}")
        yield f"{what} {number}", row


def _text(path: Path) -> str:
    try:
        return read_text(path)
    except ValueError as error:
        raise ValueError(f"data: {path}: {error}") from error


def _read_jsonl(path: Path) -> Iterator[Placed]:
    lines = enumerate(_text(path).split("\n"), start=1)  # splitlines() would cut at marks that JSON strings may hold
    rows = ((number, _parse(path, number, line)) for number, line in lines if line.strip())
    return _numbered(f"{path}, line", rows)


def _parse(path: Path, number: int, line: str) -> Any:
    try:
        return parse_json(line)
    except ValueError as error:
        raise ValueError(f"data: {path}, line {number}: expected JSON; got {line.strip()[:60]!r}: {error}") from error


def _read_json(path: Path) -> Iterator[Placed]:
    text = _text(path)
    try:
        content = parse_json(text)
    except ValueError as error:
        raise ValueError(f"data: {path}: expected JSON: {error}") from error
    if not isinstance(content, list):
        raise TypeError(f"data: {path}: expected a list of rows; got {type(content).__name__}")
    return _numbered(f"{path}, row", enumerate(content))


def _read_csv(path: Path) -> Iterator[Placed]:
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        names = next(reader, [])
        if len(set(names)) < len(names):
            raise ValueError(f"expected columns of different names; got {', '.join(names)}")
        for cells in reader:
            if cells and len(cells) != len(names):
                raise ValueError(f"expected {len(names)} cells, as the first line has; got {len(cells)}")
            if cells:
                yield f"{path}, line {reader.line_num}", dict(zip(names, cells, strict=True))
    except (csv.Error, ValueError) as error:
        raise ValueError(f"data: {path}, line {reader.line_num}: {error}") from error


def _through_datasets(path: Path, name: str, split: str | None) -> Iterable[Row]:
    if path.is_file() and path.suffix.lower() != ".parquet":
        raise ValueError(f"data: {name}: expected a file that ends in .jsonl, .json, .csv or .parquet")
    if path.suffix.lower() == ".parquet" and not path.exists():
        raise ValueError(f"data: {name}: there is no such file")
    datasets = need("datasets", f"data: {name}: this")
    if not path.is_file():
        locate("data", name, "dataset")
    try:
        if not path.exists():
            return _part(datasets.load_dataset(name, split=split or "train"), name, None)
        if path.is_dir():
            rows = datasets.load_from_disk(str(path))
        else:
            rows = datasets.load_dataset("parquet", data_files=str(path))
    except Exception as error:  # `datasets` raises many types; the first line has the cause
        raise ValueError(f"data: {name}: datasets cannot load it: {first_line(error)}") from error
    return _part(rows, name, split)


def _part(rows: Any, name: str, split: str | None) -> Iterable[Row]:
    if not isinstance(rows, Mapping):
        if split is not None:
            raise ValueError(f"data: split: expected none for {name}, a data set without parts; got {split!r}")
        whole: Iterable[Row] = rows
        return whole
    if (split or "train") not in rows:
        raise ValueError(f"data: split: expected one of {', '.join(rows)} of {name}; got {split or 'train'!r}")
    part: Iterable[Row] = rows[split or "train"]
    return part
