"""
Packs the texts of a folder's evaluation reports into one compressed Parquet file, texts.parquet.

    python experiments/pack_texts.py results/simplify
    python experiments/pack_texts.py results/simplify --delete  # the .jsonl files, when they are in it byte for byte

Each row is one response: `report` (the report's file name without .json), `prompt`, `completion`, `response`. The
responses to one example stand together, which halves the file; each report's own rows stay in order. Texts that the
file has already stay in it, and those of a report that has a .jsonl file again are replaced.
"""

import argparse
import json
import os
from collections import defaultdict
from pathlib import Path

import pyarrow
import pyarrow.parquet

from llm2slm.evaluation.reports import PACKED_TEXTS
from llm2slm.utils import read_json_lines

TEXTS = ("prompt", "completion", "response")


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with reports and the .jsonl files beside them")
    parser.add_argument("--delete", action="store_true", help="delete the .jsonl files afterwards")
    options = parser.parse_args(arguments)
    sources = sorted(path for path in options.folder.glob("*.jsonl") if path.with_suffix(".json").exists())
    if not sources:
        raise SystemExit(f"{options.folder} has no .jsonl file beside a report.")
    packed = options.folder / PACKED_TEXTS
    texts = read_packed(packed) if packed.exists() else {}
    texts |= {path.stem: read_json_lines(path) for path in sources}

    part = packed.with_suffix(".part")
    write_packed(part, texts)
    written = read_packed(part)
    for path in sources:
        if to_json_lines(written[path.stem]) != path.read_bytes():
            part.unlink()
            raise SystemExit(f"{path} would not come back byte for byte: nothing is changed.")
    os.replace(part, packed)
    if options.delete:
        for path in sources:
            path.unlink()
    print(f"{packed}: {len(texts)} reports, {packed.stat().st_size:,} bytes")


def write_packed(path: Path, texts: dict[str, list[dict[str, str]]]):
    """Writes the texts of reports, the responses to the n-th example of each together."""
    order = [(i, name) for name, rows in texts.items() for i in range(len(rows))]
    columns = {"report": [name for _, name in sorted(order)]}
    columns |= {column: [texts[name][i][column] for i, name in sorted(order)] for column in TEXTS}
    table = pyarrow.table(columns, schema=pyarrow.schema([(column, pyarrow.string()) for column in columns]))
    pyarrow.parquet.write_table(table, path, compression="zstd", compression_level=19)


def read_packed(path: Path) -> dict[str, list[dict[str, str]]]:
    """The texts of each report."""
    texts = defaultdict(list)
    for row in pyarrow.parquet.read_table(path).to_pylist():
        texts[row.pop("report")].append(row)
    return dict(texts)


def to_json_lines(rows: list[dict[str, str]]) -> bytes:
    """The file that `llm2slm evaluate` writes."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


if __name__ == "__main__":
    main()
