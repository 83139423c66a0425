"""Pairs of `prompt` and `completion` from a folder, a file or the Hub, and a hash of their texts."""

import hashlib
import json
import os
from pathlib import Path
from string import Formatter

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from ..utils import decode_text

FILE_TYPES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_pairs(
    source: str | os.PathLike,
    split: str,
    prompt_format: str | None = None,
    completion_format: str | None = None,
    max_examples: int | None = None,
) -> Dataset:
    r"""
    Loads one split of a data set as prompts and completions.

    Args:
        source (`str` or `os.PathLike`):
            A folder written by `save_to_disk`, a `.json`, `.jsonl`, `.csv` or `.parquet` file, or a name on the Hub,
            with a configuration as `name:configuration`. A file, and a folder of one data set, is the split `train`.
        split (`str`):
            The split's name. Parts of one, such as `train[:90%]`, are for files and the Hub.
        prompt_format, completion_format (`str`, *optional*):
            The text made of a row's columns with `str.format`, such as `"{instruction}\n{input}\n"` or
            `"{translation[de]}"`. The column `prompt` or `completion` as it is if omitted.
        max_examples (`int`, *optional*):
            This many rows, evenly spaced over the split. All if omitted, or if there are no more.

    Returns:
        `datasets.Dataset` with the columns `prompt` and `completion`: strings, or lists of messages.

    Raises:
        OSError: if there is no such data set.
        ValueError: if it lacks the split or a column, if one is not text, or if a file of text is not UTF-8.
    """
    formats = {"prompt": prompt_format, "completion": completion_format}
    return make_texts(load_rows(source, split, max_examples), formats, f"{str(source)!r}, split {split!r}")


def load_rows(source: str | os.PathLike, split: str, max_examples: int | None = None) -> Dataset:
    """Loads one split of a data set with all its columns; arguments and errors are those of [`load_pairs`]."""
    dataset = _load_split(os.fspath(source), split)
    if len(dataset) == 0:
        raise ValueError(f"The split {split!r} of {str(source)!r} has no rows.")
    if max_examples is not None and max_examples < len(dataset):
        dataset = dataset.select([i * len(dataset) // max_examples for i in range(max_examples)])
    return dataset


def make_texts(rows: Dataset, formats: dict[str, str | None], where: str) -> Dataset:
    r"""
    Makes the texts of a data set's columns, as [`load_pairs`] does.

    Args:
        rows (`datasets.Dataset`): What is read.
        formats (`dict[str, str | None]`): `prompt` or `completion`, or both, and how each is made.
        where (`str`): What errors call the data set.

    Raises:
        ValueError: if a column is missing, or one is not text.
    """
    for name, text_format in formats.items():
        columns = [name] if text_format is None else _columns_of(name, text_format)
        if missing := [column for column in columns if column not in rows.column_names]:
            raise ValueError(
                f"{where}, has no column {missing[0]!r} for the {name}, only {rows.column_names}. `{name}_format` "
                f"says how a {name} is made of the columns."
            )

    def texts(row: dict, index: int) -> dict:
        return {name: _text(name, text_format, row, f"{where}, row {index}") for name, text_format in formats.items()}

    return rows.map(texts, with_indices=True, remove_columns=rows.column_names, desc="Reading texts")


def format_of_text(prompt_format: str | None) -> str | None:
    """
    A format of prompts as one of a text by itself, `{prompt}` in the place of its column: what a configuration keeps.
    `None` if it changes nothing, or is made of several columns.
    """
    parts = list(Formatter().parse(prompt_format or ""))
    fields = [(field, spec, conversion) for _, field, spec, conversion in parts if field is not None]
    if len(fields) != 1 or not fields[0][0].isidentifier() or any(fields[0][1:]):
        return None
    found = "".join(
        text.replace("{", "{{").replace("}", "}}") + ("" if field is None else "{prompt}") for text, field, *_ in parts
    )
    return None if found == "{prompt}" else found


def hash_texts(dataset: Dataset) -> str:
    """The SHA-256 of the pairs' texts in their order, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for row in dataset.select_columns(["prompt", "completion"]):
        digest.update(json.dumps([row["prompt"], row["completion"]], ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def recorded_source(source: str) -> str:
    """A data set's name for reports: `./` before a relative place, which could be read as a name on the Hub."""
    return (
        os.path.join(os.curdir, source) if os.path.exists(source) and not source.startswith((".", os.sep)) else source
    )


def _load_split(source: str, split: str) -> Dataset:
    if os.path.isdir(source):
        try:
            loaded = load_from_disk(source)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"The folder {source!r} is not one that `save_to_disk` wrote.") from error
        splits = loaded if isinstance(loaded, DatasetDict) else {"train": loaded}
        if split not in splits:
            raise ValueError(f"{source!r} has no split {split!r}, only {list(splits)}.")
        return splits[split]
    suffix = Path(source).suffix.lower()
    if suffix in FILE_TYPES or os.path.isfile(source):
        if not os.path.isfile(source):
            raise FileNotFoundError(f"There is no file {source!r}.")
        if suffix not in FILE_TYPES:
            raise ValueError(f"{source!r} must end in one of {', '.join(FILE_TYPES)}.")
        if suffix != ".parquet":
            with open(source, "rb") as file:
                for line in file:
                    decode_text(line, source)
        name, configuration, files = FILE_TYPES[suffix], None, {"train": source}
    else:
        (name, _, configuration), files = source.partition(":"), None
    try:
        return load_dataset(name, configuration or None, data_files=files, split=split)
    except DatasetGenerationError as error:
        raise ValueError(f"{source!r} cannot be read: {error.__cause__ or error}") from error
    except (DatasetNotFoundError, ConnectionError) as error:
        raise OSError(f"There is no folder and no data set on the Hub of the name {source!r}: {error}") from error
    except ValueError as error:  # of the split or the configuration; it does not say of which data set
        raise ValueError(f"{source!r}, split {split!r}: {error}") from error


def _columns_of(name: str, text_format: str) -> list[str]:
    try:
        fields = [field for _, field, _, _ in Formatter().parse(text_format) if field is not None]
    except ValueError as error:
        raise ValueError(f"`{name}_format` is {text_format!r}: {error}.") from error
    columns = [field.partition("[")[0].partition(".")[0] for field in fields]
    if not columns or any(not column or column.isdecimal() for column in columns):
        raise ValueError(f"`{name}_format` must name columns in braces, such as '{{prompt}}', got {text_format!r}.")
    return columns


def _text(name: str, text_format: str | None, row: dict, where: str) -> str | list[dict]:
    if text_format is None:
        value = row[name]
        if not isinstance(value, (str, list)):
            raise ValueError(f"{where}: the column {name!r} must be a string or a list of messages, got {value!r}.")
        return value
    for column in _columns_of(name, text_format):
        if row[column] is None or isinstance(row[column], list):
            raise ValueError(f"{where}: `{name}_format` takes text from the column {column!r}, got {row[column]!r}.")
    try:
        return text_format.format(**row)
    except (LookupError, AttributeError) as error:
        raise ValueError(f"{where}: `{name}_format` is {text_format!r}, but there is no {error}.") from error
