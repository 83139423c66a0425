"""Prompts from a file, as many as there are: checked once, then read again row by row; and responses as Parquet.

Rows are what JSON has: texts, numbers, lists and objects. They pass through JSON Lines, from which an interrupted run
goes on.
"""

import csv
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from ..utils import check_installed, decode_text, json_lines, text_lines

Row = dict[str, Any]

OTHER_FORMATS = (".json", ".tsv", ".xlsx", ".arrow")  # their lines would be taken for prompts
ROWS_AT_A_TIME = 1024  # of a Parquet file


@dataclass
class Prompts:
    r"""
    Prompts that were checked.

    Args:
        rows (`Callable`): Reads them, from the first one on: rows with the column `prompt`, and what others there are.
        number (`int`): How many there are.
        sha256 (`str`): Of all columns.
        columns (`set[str]`): The columns that some row has.
    """

    rows: Callable[[], Iterator[Row]]
    number: int
    sha256: str
    columns: set[str] = field(default_factory=set)


def read_prompts(prompts: list[str] | None, path: str | None) -> Prompts:
    """
    The prompts, or those in a file or standard input. Empty ones in a file stay where they are, with a note.

    Raises:
        ImportError: if what reads Parquet is missing.
        OSError: if there is no such file.
        ValueError: if it has another format, no column `prompt`, or no prompts, or `prompts` has an empty one.
    """
    if path is not None and not prompts:
        source, rows = path, _reader_of(path)
    else:
        source, texts = ("--prompt", prompts) if prompts else ("standard input", _standard_input())
        rows = partial(_rows_of, texts)
    number, empty, digest = 0, [], hashlib.sha256()
    columns: set[str] = set()
    for number, row in enumerate(rows(), start=1):
        if "prompt" not in row:
            raise ValueError(f"{source}, row {number} has no column `prompt`, only {sorted(row)}.")
        if not isinstance(row["prompt"], str):
            raise ValueError(f"{source}, row {number}: the prompt must be a string, got {row['prompt']!r}.")
        if not row["prompt"].strip():
            empty.append(number)
        columns.update(row)
        try:
            digest.update(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        except TypeError as error:
            raise ValueError(f"{source}, row {number}: a column is not what JSON has. {error}.") from error
    if not number:
        raise ValueError(f"{source} has no prompts.")
    if empty and (prompts or len(empty) == number):
        raise ValueError(f"{source}, row {empty[0]}: the prompt is empty.")
    if empty:
        first = f"{len(empty)} of {number} prompts, the first in row {empty[0]}"
        print(f"{source}: {first}, are empty, and so are their responses.", file=sys.stderr)
    return Prompts(rows, number, digest.hexdigest(), columns)


def _standard_input() -> list[str]:
    lines = decode_text(sys.stdin.buffer.read(), "standard input").split("\n")
    return lines[:-1] if lines[-1] == "" else lines  # the last line's end


def _rows_of(texts: list[str]) -> Iterator[Row]:
    return ({"prompt": text} for text in texts)


def _reader_of(path: str) -> Callable[[], Iterator[Row]]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path!r}.")
    suffix = Path(path).suffix.lower()
    if suffix in OTHER_FORMATS:
        raise ValueError(
            f"{path} must be text, one prompt a line, or .jsonl, .csv or .parquet with the column `prompt`."
        )
    if suffix == ".parquet":
        check_parquet()
    readers = {".jsonl": json_lines, ".csv": _csv_rows, ".parquet": _parquet_rows}
    return partial(readers.get(suffix, _text_rows), path)


def _text_rows(path: str) -> Iterator[Row]:
    return ({"prompt": line.removesuffix("\n")} for line in text_lines(path))


def _csv_rows(path: str) -> Iterator[Row]:
    """The rows of a CSV file, by the columns that its first line names; what a short row lacks is empty."""
    reader = csv.DictReader(text_lines(path), restval="")
    try:
        if "prompt" not in (names := reader.fieldnames or []):
            raise ValueError(f"{path} has no column `prompt`, only {list(names)}.")
        for number, row in enumerate(reader, start=1):
            if None in row:
                raise ValueError(f"{path}, row {number} has more cells than the {len(names)} columns {list(names)}.")
            yield row
    except csv.Error as error:
        raise ValueError(f"{path} is not CSV: {error}.") from error


# ------------------------------------------------------------------------------------------------------------- Parquet
def check_parquet() -> None:
    """Raises an `ImportError` if what reads and writes Parquet is missing."""
    check_installed("Parquet", "pyarrow", install="pip install pyarrow")


def _parquet_rows(path: str) -> Iterator[Row]:
    from pyarrow import ArrowInvalid, parquet

    try:
        file = parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise ValueError(f"{path} is not Parquet: {error}") from error
    with file:
        for batch in file.iter_batches(ROWS_AT_A_TIME):
            yield from batch.to_pylist()


def parquet_schema(rows: Iterable[Row], source: str):
    """
    The `pyarrow.Schema` of rows, whichever columns each of them has.

    Raises:
        ValueError: if a column has values of different kinds.
    """
    import pyarrow
    from pyarrow import parquet

    schema = pyarrow.schema([])
    rows = iter(rows)
    while some := list(islice(rows, ROWS_AT_A_TIME)):
        try:
            schema = pyarrow.unify_schemas([schema, _table_of(some).schema], promote_options="permissive")
            parquet.ParquetWriter(pyarrow.BufferOutputStream(), schema).close()  # not every type can be written
        except (pyarrow.ArrowException, OverflowError) as error:
            raise ValueError(f"{source} does not go into Parquet, which has one type a column: {error}") from error
    return schema


def write_parquet(json_lines_path: str | os.PathLike, output: str | os.PathLike, schema) -> None:
    """Writes the rows of a JSON Lines file, whose columns are those of `schema`, as Parquet."""
    import pyarrow
    from pyarrow import parquet

    rows = json_lines(json_lines_path)
    with parquet.ParquetWriter(output, schema) as writer:
        while some := list(islice(rows, ROWS_AT_A_TIME)):
            writer.write_table(pyarrow.Table.from_pylist(some, schema=schema))


def _table_of(rows: list[Row]):
    import pyarrow

    names = dict.fromkeys(name for row in rows for name in row)  # `Table.from_pylist` takes the first row's alone
    return pyarrow.table({name: [row.get(name) for row in rows] for name in names})
