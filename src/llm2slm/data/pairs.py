"""Pairs of `prompt` and `completion` from a folder, a file or the Hub, and a hash of their texts."""

import contextlib
import csv
import hashlib
import json
import os
import re
from pathlib import Path
from string import Formatter
from typing import Any

from datasets import Dataset, DatasetDict, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from ..utils import decode_text
from .hash_split import PARTS, prompt_position, split_by_position

LABEL_RECORD = "label.json"  # what `llm2slm label` leaves in its folder: how the labels came about
FILE_TYPES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
# What the columns of prompts and completions are called elsewhere, the surest first.
NAMES = {
    "prompt": "prompt instruction question query source src input article document dialogue text sentence".split(),
    "completion": "completion response answer target tgt output summary highlights translation label".split(),
}


class MissingSplitError(ValueError):
    """A data set has no such split, or nothing in it."""


def load_pairs(
    source: str | os.PathLike,
    split: str,
    prompt_format: str | None = None,
    completion_format: str | None = None,
    max_examples: int | None = None,
    missing_is_empty: bool = False,
) -> Dataset:
    r"""
    Loads one split of a data set as prompts and completions.

    Args:
        source (`str` or `os.PathLike`):
            A folder written by `save_to_disk`, a `.json`, `.jsonl`, `.csv` or `.parquet` file, or a name on the Hub,
            with a configuration as `name:configuration`. A folder of one data set is the split `train`.
        split (`str`):
            The split's name. A file has `train`, `validation` and `test`, chosen by a hash of each prompt (see
            [`part_sizes`]), and `all`. Slices, such as `train[:90%]`, are for files, where they are of all rows, and
            the Hub.
        prompt_format, completion_format (`str`, *optional*):
            The text made of a row's columns with `str.format`, such as `"{instruction}\n{input}\n"` or
            `"{translation[de]}"`. The column `prompt` or `completion` as it is if omitted. Labels that `llm2slm label`
            wrote are in the column `completion`, and are read from there whatever the format.
        max_examples (`int`, *optional*):
            This many rows, evenly spaced over the split. All if omitted, or if there are no more.
        missing_is_empty (`bool`, *optional*, defaults to `False`):
            Whether a text of which a value is missing is empty, rather than refused.

    Returns:
        `datasets.Dataset` with the columns `prompt` and `completion`: strings, or lists of messages.

    Raises:
        OSError: if there is no such data set.
        ValueError: if it lacks the split or a column, if one is not text, or if a file of text is not UTF-8.
    """
    if read_label_record(source) is not None:
        completion_format = None
    formats = {"prompt": prompt_format, "completion": completion_format}
    if not has_parts(source, split):
        rows = load_rows(source, split, max_examples)
        return make_texts(rows, formats, f"{str(source)!r}, split {split!r}", missing_is_empty)
    rows = load_rows(source, "all")
    # Before they are split: errors say the file's own rows.
    pairs = make_texts(rows, formats, f"{str(source)!r}", missing_is_empty)
    return spaced(pairs.select(_part(source, rows, split, prompt_format)), max_examples)


def load_rows(
    source: str | os.PathLike, split: str, max_examples: int | None = None, prompt_format: str | None = None
) -> Dataset:
    """Loads one split of a data set with all its columns; arguments and errors are those of [`load_pairs`]."""
    if has_parts(source, split):
        rows = load_rows(source, "all")
        _check_columns(rows, {"prompt": prompt_format}, f"{str(source)!r}")
        return spaced(rows.select(_part(source, rows, split, prompt_format)), max_examples)
    dataset = _load_split(os.fspath(source), split)
    if len(dataset) == 0:
        raise MissingSplitError(f"The split {split!r} of {str(source)!r} has no rows.")
    return spaced(dataset, max_examples)


def load_groups(
    source: str | os.PathLike,
    split: str,
    column: str,
    prompt_format: str | None = None,
    completion_format: str | None = None,
    max_examples: int | None = None,
    missing_is_empty: bool = False,
) -> dict[str, Dataset]:
    r"""
    Loads one split as [`load_pairs`] does, the pairs of each value of a column by themselves.

    Args:
        column (`str`): The column.
        max_examples (`int`, *optional*): This many pairs of each value, evenly spaced over those there are.

    Returns:
        `dict[str, datasets.Dataset]`: by the values as text, in the order in which they first appear.

    Raises:
        ValueError: if there is no such column, besides what [`load_pairs`] raises.
    """
    rows = load_rows(source, split, prompt_format=prompt_format)
    if column not in rows.column_names:
        raise ValueError(f"{str(source)!r} has no column {column!r}, only {rows.column_names}.")
    numbers: dict[str, list[int]] = {}
    for number, value in enumerate(rows[column]):
        numbers.setdefault(str(value), []).append(number)
    dataset = load_pairs(source, split, prompt_format, completion_format, missing_is_empty=missing_is_empty)
    return {value: spaced(dataset.select(own), max_examples) for value, own in numbers.items()}


def spaced(rows: Dataset, number: int | None) -> Dataset:
    """This many rows, evenly spaced; all if `number` is `None`, or there are no more."""
    if number is None or number >= len(rows):
        return rows
    return rows.select([i * len(rows) // number for i in range(number)])


def has_parts(source: str | os.PathLike, split: str) -> bool:
    """Whether `split` is a part of a file that a hash of each prompt chooses."""
    return split in PARTS and os.path.isfile(source)


def read_label_record(source: str | os.PathLike) -> dict[str, Any] | None:
    """What `llm2slm label` says of the responses that it wrote; `None` of another data set."""
    path = Path(source) / LABEL_RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def describe_labels(source: str | os.PathLike, completion_format: str | None) -> str | None:
    """One sentence on labels that are read in place of what a format says; nothing if there are none."""
    if completion_format is None or read_label_record(source) is None:
        return None
    return (
        f"{os.fspath(source)}: `llm2slm label` wrote its responses. They are read from the column 'completion', "
        "not by `completion_format`."
    )


def part_sizes(source: str | os.PathLike, prompt_format: str | None = None) -> dict[str, int]:
    r"""
    The rows of each part of a file: about 90% train, 5% validate and 5% test; of less than 400 rows 20 or, if less,
    10% validate and test. The parts depend on the columns that `prompt_format` names, and on nothing else of it.

    Args:
        source (`str` or `os.PathLike`): The file.
        prompt_format (`str`, *optional*): As [`load_pairs`] takes it.

    Returns:
        `dict[str, int]`: the number of rows in `train`, `validation` and `test`.
    """
    rows = load_rows(source, "all")
    _check_columns(rows, {"prompt": prompt_format}, f"{str(source)!r}")
    return {name: len(part) for name, part in _parts(rows, prompt_format).items()}


def describe_parts(source: str | os.PathLike, sizes: dict[str, int]) -> str:
    """One sentence on how a file was split."""
    return (
        f"{os.fspath(source)} is one file: a hash of each prompt chooses {sizes['train']:,} rows to train, "
        f"{sizes['validation']:,} to validate and {sizes['test']:,} to test, always the same (`all` is all of them)."
    )


def _part(source: str | os.PathLike, rows: Dataset, split: str, prompt_format: str | None) -> list[int]:
    part = _parts(rows, prompt_format)[split]
    if not part:
        raise MissingSplitError(
            f"{str(source)!r} has too few different prompts ({len(rows)} rows) for a part {split!r}: the split 'all' "
            "is all of them, and --validation-split none trains without evaluation."
        )
    return part


def fields_of(text_format: str | None) -> list[str]:
    """The fields that a format of prompts names. A file is split by a hash of their texts, and of nothing else."""
    return sorted({field for _, field, _, _ in Formatter().parse(text_format or "{prompt}") if field})


def _parts(rows: Dataset, prompt_format: str | None) -> dict[str, list[int]]:
    columns = ["prompt"] if prompt_format is None else sorted(set(_columns_of("prompt", prompt_format)))
    fields = fields_of(prompt_format)

    def place(row: dict[str, Any]) -> dict[str, float]:
        try:
            texts = [plain_text(Formatter().get_field(field, (), row)[0]) for field in fields]
        except (LookupError, AttributeError):  # which is an error where texts are made
            texts = [plain_text(row[column]) for column in columns]
        return {"position": prompt_position("\n".join(texts))}

    found = rows.select_columns(columns).map(place, remove_columns=columns, desc="Hashing prompts")
    return split_by_position(found["position"][:])


def plain_text(value: Any) -> str:
    """The text of a column's value, which may be messages."""
    if isinstance(value, list):
        return "\n".join(str(part.get("content")) if isinstance(part, dict) else str(part) for part in value)
    return str(value)


def make_texts(rows: Dataset, formats: dict[str, str | None], where: str, missing_is_empty: bool = False) -> Dataset:
    r"""
    Makes the texts of a data set's columns, as [`load_pairs`] does.

    Args:
        rows (`datasets.Dataset`): What is read.
        formats (`dict[str, str | None]`): `prompt` or `completion`, or both, and how each is made.
        where (`str`): What errors call the data set.
        missing_is_empty (`bool`, *optional*, defaults to `False`): As [`load_pairs`] takes it.

    Raises:
        ValueError: if a column is missing, or one is not text.
    """
    _check_columns(rows, formats, where)

    def text(name: str, text_format: str | None, row: dict, index: int) -> str | list[dict]:
        if missing_is_empty and _missing_field(name, text_format, row) is not None:
            return "" if text_format or isinstance(rows.features[name], Value) else []
        return _text(name, text_format, row, f"{where}, row {index}")

    def texts(row: dict, index: int) -> dict:
        return {name: text(name, text_format, row, index) for name, text_format in formats.items()}

    made = rows.map(texts, with_indices=True, remove_columns=rows.column_names, desc="Reading texts")
    for name, feature in made.features.items():
        if getattr(feature, "dtype", None) == "large_string":  # as pandas and polars write text
            made = made.cast_column(name, Value("string"))
    return made


def _check_columns(rows: Dataset, formats: dict[str, str | None], where: str) -> None:
    for name, text_format in formats.items():
        columns = [name] if text_format is None else _columns_of(name, text_format)
        if missing := [column for column in columns if column not in rows.column_names]:
            raise ValueError(
                f"{where} has no column {missing[0]!r} for the {name}, only {rows.column_names}. "
                f"{_advise_formats(rows, formats)}"
            )


def _advise_formats(rows: Dataset, formats: dict[str, str | None]) -> str:
    """The options that would make texts of the columns there are, with a guess which these are."""
    (only, *more) = rows.column_names
    if not more and (separator := re.search("[;\t|]", only)):
        return f"Its columns seem to stand between {separator[0]!r}: in a CSV file it must be commas."
    wanted = [
        name
        for name, text_format in formats.items()
        if any(column not in rows.column_names for column in _columns_of(name, text_format or f"{{{name}}}"))
    ]
    guessed = _guess_fields(rows, wanted)
    options = " ".join(f"--{name}-format '{{{guessed.get(name, 'COLUMN')}}}'" for name in wanted)
    python = " and ".join(f"`{name}_format`" for name in wanted)
    return f"Say how texts are made of the columns: {options} ({python} in Python and in recipes)."


def _guess_fields(rows: Dataset, wanted: list[str]) -> dict[str, str]:
    """The field of a format for each wanted text: by the columns' names or, if there are as many, by their order."""
    fields: dict[str, str] = {}  # and the name of each
    for column, feature in rows.features.items():
        parts = {f"{column}[{key}]": (key, part) for key, part in feature.items()} if isinstance(feature, dict) else {}
        for field, (name, part) in (parts or {column: (column, feature)}).items():
            is_text = getattr(part, "dtype", None) in ("string", "large_string")
            if is_text and re.fullmatch(r"[\w -]+(\[[\w -]+\])?", field) and len(field) <= 40:
                fields[field] = name.lower()
    for name in {"prompt", "completion"} - set(wanted):
        fields.pop(name, None)
    guessed = {}
    for name in wanted:
        known = sorted((NAMES[name].index(called), field) for field, called in fields.items() if called in NAMES[name])
        if known:
            guessed[name] = known[0][1]
    if len(guessed) == len(wanted):
        return guessed
    languages = [field for field, called in fields.items() if re.fullmatch("(?!id)[a-z]{2}", called)]
    for candidates in (list(fields), languages):
        if len(candidates) == len(wanted):
            return dict(zip(wanted, candidates, strict=True))
    return guessed


def without_empty(pairs: Dataset, where: str, skip: bool) -> Dataset:
    r"""
    The pairs of which neither side is empty.

    Args:
        pairs (`datasets.Dataset`): With the columns `prompt` and `completion`.
        where (`str`): What messages call them.
        skip (`bool`): Whether pairs with an empty side are left out, which one line says.

    Raises:
        ValueError: if there are such pairs, and they are not left out.
    """

    def has_both(row: dict[str, Any]) -> bool:
        return all(_contents_of(text).strip() for text in (row["prompt"], row["completion"]))

    kept = pairs.filter(has_both, desc="Looking for empty pairs")
    if len(kept) == len(pairs):
        return pairs
    if len(kept) == 0:
        raise ValueError(f"{where}: each of the {len(pairs):,} pairs has an empty side.")
    left_out = f"{where}: {len(pairs) - len(kept):,} of {len(pairs):,} pairs have an empty side"
    if not skip:
        first = next(row for row in pairs if not has_both(row))
        raise ValueError(f"{left_out}, the first is {first}. Mend them, or leave them out with `skip_empty`.")
    print(f"{left_out} and are left out.")
    return kept


def _contents_of(text: str | list[dict[str, Any]]) -> str:
    if isinstance(text, str):
        return text
    # What is no message is refused where they are tokenized.
    return "".join(
        str(message.get("content") or "") if isinstance(message, dict) else str(message) for message in text
    )


def format_of_text(prompt_format: str | None) -> str | None:
    """
    A format of prompts as one of a text by itself, `{prompt}` in the place of its column: what a configuration keeps.
    `None` if it changes nothing, or is made of several columns.
    """
    parts = list(Formatter().parse(prompt_format or ""))
    fields = [(field, spec, conversion) for _, field, spec, conversion in parts if field is not None]
    if len(fields) != 1 or not fields[0][0].partition("[")[0].isidentifier() or any(fields[0][1:]):
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
            raise MissingSplitError(f"{source!r} has no split {split!r}, only {list(splits)}.")
        return splits[split]
    suffix = Path(source).suffix.lower()
    options: dict[str, Any] = {}
    if suffix in FILE_TYPES or os.path.isfile(source):
        if not os.path.isfile(source):
            raise FileNotFoundError(f"There is no file {source!r}.")
        if suffix not in FILE_TYPES:
            raise ValueError(f"{source!r} must end in one of {', '.join(FILE_TYPES)}.")
        if suffix != ".parquet":
            with open(source, "rb") as file:
                for line in file:
                    decode_text(line, source)
        if split != "all" and "[" not in split:
            raise MissingSplitError(f"{source!r} has no split {split!r}: a file has {', '.join(PARTS)} and all.")
        name, configuration, files = FILE_TYPES[suffix], None, {"train": source}
        if suffix == ".csv":  # cells are texts, also "007", "NA" and an empty one
            with open(source, encoding="utf-8-sig", newline="") as file:
                options["converters"] = dict.fromkeys(next(csv.reader(file), []), str)
            options["keep_default_na"] = False
    else:
        (name, _, configuration), files = source.partition(":"), None
    try:
        rows = load_dataset(name, configuration or None, data_files=files, split=split, **options)
    except DatasetGenerationError as error:
        raise ValueError(f"{source!r} cannot be read: {error.__cause__ or error}") from error
    except (DatasetNotFoundError, ConnectionError) as error:
        raise OSError(f"There is no folder and no data set on the Hub of the name {source!r}: {error}") from error
    except ValueError as error:  # of the split or the configuration; it does not say of which data set
        kind = MissingSplitError if "Unknown split" in str(error) else ValueError
        raise kind(f"{source!r}, split {split!r}: {error}") from error
    except RuntimeError as error:  # it is loaded by a script of its own, which datasets no longer runs
        raise ValueError(f"{source!r}: {error}") from error
    if suffix == ".csv" and set(rows.column_names) - options["converters"].keys():
        raise ValueError(
            f"{source!r}: the first row has more cells than the first line has names. Put a text with a comma between "
            'double quotes: "Hello, world".'
        )
    return rows


def _columns_of(name: str, text_format: str) -> list[str]:
    try:
        fields = [field for _, field, _, _ in Formatter().parse(text_format) if field is not None]
    except ValueError as error:
        raise ValueError(f"`{name}_format` is {text_format!r}: {error}.") from error
    columns = [field.partition("[")[0].partition(".")[0] for field in fields]
    if not columns or any(not column or column.isdecimal() for column in columns):
        raise ValueError(f"`{name}_format` must name columns in braces, such as '{{prompt}}', got {text_format!r}.")
    return columns


def _missing_field(name: str, text_format: str | None, row: dict) -> str | None:
    """The first field of a text, or column of one, that has no value; `None` if all have one."""
    columns = [name] if text_format is None else _columns_of(name, text_format)
    if missing := [column for column in columns if row[column] is None]:
        return missing[0]
    for field in fields_of(text_format) if text_format else ():
        with contextlib.suppress(LookupError, AttributeError):  # which is an error where texts are made
            if Formatter().get_field(field, (), row)[0] is None:
                return field
    return None


def _text(name: str, text_format: str | None, row: dict, where: str) -> str | list[dict]:
    if text_format is None:
        value = row[name]
        if not isinstance(value, (str, list)):
            more = "" if value is None else f" `{name}_format` '{{{name}}}' makes texts of numbers."
            raise ValueError(
                f"{where}: the column {name!r} must be a string or a list of messages, got {value!r}.{more}"
            )
        return value
    if missing := _missing_field(name, text_format, row):
        raise ValueError(f"{where}: `{name}_format` takes text from {missing!r}, got None.")
    for column in _columns_of(name, text_format):
        if isinstance(row[column], list):
            raise ValueError(f"{where}: `{name}_format` takes text from {column!r}, got {row[column]!r}.")
    try:
        return text_format.format(**row)
    except (LookupError, AttributeError) as error:
        raise ValueError(f"{where}: `{name}_format` is {text_format!r}, but there is no {error}.") from error
