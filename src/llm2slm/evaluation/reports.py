"""Reports of `llm2slm evaluate` side by side: tables of scores, paired tests against the first, and the texts."""

import json
import os
from pathlib import Path
from typing import Any

from ..utils import check_installed, read_json_lines

METRICS = {
    "bleu": "BLEU",
    "chrf": "chrF",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "exact_match": "Exact match",
    "copied_words": "Copied words",
    "repeating": "Repeating",  # the less, the better
}
PACKED_TEXTS = "texts.parquet"  # the texts of all reports in a folder, as `experiments/pack_texts.py` writes them
# Nats a token. Of a smaller loss, and beyond ten times a loss, a percentage tells nothing: both losses are printed.
LEAST_LOSS = 0.01


def compare_reports(paths: list[str], name: str | None = None) -> str:
    """
    Markdown tables of several reports: scores and differences or, of the reports of `--by`, the scores of each value.

    Args:
        paths (`list[str]`): The reports; differences are to the first.
        name (`str`, *optional*): What the first one's system is called; as the report says if omitted.

    Raises:
        OSError: if a report or its texts are missing.
        ValueError: if a file is something else, or the reports are about different data.
        ImportError: if the packages that compute the metrics are missing.
    """
    reports = [read_report(path) for path in paths]
    if are_by_value(reports):
        for report in reports:
            report["system"] = f"{name}, {value_of(report)}" if name else report["system"]
        return score_table(reports)
    if name is not None:
        reports[0]["system"] = name
    if len(paths) == 1:
        return score_table(reports)
    return f"{score_table(reports)}\n\n{difference_table(reports, read_same_texts(paths, reports))}"


def are_by_value(reports: list[dict[str, Any]]) -> bool:
    """Whether they are several reports that `--by` wrote of one model: each of another value of one column."""
    same = {(report.get("model"), report["data"].get("source"), *report["data"].get("by", ())) for report in reports}
    values = {value_of(report) for report in reports}
    return len(reports) > 1 and len(same) == 1 and None not in values and len(values) == len(reports)


def value_of(report: dict[str, Any]) -> str | None:
    """The value of the column of `--by` that a report is of, if that was asked for."""
    return next(iter(report["data"].get("by", {}).values()), None)


def show_reports(paths: list[str], max_examples: int | None = None) -> str:
    """
    The texts of several reports, example by example: prompt, reference, and the response of each system.

    Args:
        paths (`list[str]`): The reports; prompts are those of the first.
        max_examples (`int`, *optional*): This many examples, evenly spaced. All if omitted, or if there are no more.

    Raises:
        OSError: if a report or its texts are missing.
        ValueError: if a file is something else, or the reports are about different data.
    """
    reports, texts = read_reports(paths)
    labels = ["prompt", "reference", *(report["system"] for report in reports)]
    width = 2 + max(len(label) for label in labels)
    total = len(texts[0])
    shown = min(total, max_examples or total)
    blocks = []
    for i in (k * total // shown for k in range(shown)):
        values = [texts[0][i]["prompt"], texts[0][i]["completion"], *(rows[i]["response"] for rows in texts)]
        lines = [f"Example {i + 1:,} of {total:,}"]
        for label, value in zip(labels, values, strict=True):
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)  # a chat
            lines.append(label.ljust(width) + text.rstrip("\n").replace("\n", "\n" + " " * width))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def texts_path(report_path: str) -> str:
    """Where `llm2slm evaluate` writes a report's texts."""
    return str(Path(report_path).with_suffix(".jsonl"))


def read_reports(paths: list[str]) -> tuple[list[dict[str, Any]], list[list[dict[str, str]]]]:
    """
    Several reports about the same data, and the texts of each.

    Raises:
        OSError: if a report or its texts are missing.
        ValueError: if a file is something else, or the reports are about different data.
    """
    reports = [read_report(path) for path in paths]
    return reports, read_same_texts(paths, reports)


def read_same_texts(paths: list[str], reports: list[dict[str, Any]]) -> list[list[dict[str, str]]]:
    """
    The texts of each of several reports.

    Raises:
        OSError: if the texts of one are missing.
        ValueError: if the reports are about different data.
    """
    texts = [read_texts(path, report["data"]["examples"]) for path, report in zip(paths, reports, strict=True)]
    references = [[row["completion"] for row in rows] for rows in texts]
    for path, own in zip(paths, references, strict=True):
        if own != references[0]:  # prompts may differ: each system has them in its own form
            raise ValueError(f"{path} and {paths[0]} are about different data: their references differ.")
    return texts


def read_report(path: str) -> dict[str, Any]:
    """
    A report of this command.

    Raises:
        OSError: if there is none.
        ValueError: if the file is something else.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no file {path!r}.")
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        missing = [name for name in ("system", "data", "scores", "loss", "speed") if name not in report]
        missing += [f"data.{name}" for name in ("fingerprint", "examples") if name not in report.get("data", {})]
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is not a report of `llm2slm evaluate`: {error}") from error
    if missing:
        raise ValueError(f"{path} is not a report of `llm2slm evaluate`: it lacks {', '.join(missing)}.")
    return report


def read_texts(path: str, num_examples: int) -> list[dict[str, str]]:
    """
    A report's texts, of the `.jsonl` file beside it or, if there is none, of its folder's `texts.parquet`.

    Raises:
        OSError: if there is neither.
        ValueError: if they are not as many as the report says, or the file is something else.
        ImportError: if reading Parquet needs a package that is missing.
    """
    source, packed = texts_path(path), str(Path(path).with_name(PACKED_TEXTS))
    if os.path.isfile(source):
        texts = read_json_lines(source)
    elif os.path.isfile(packed):
        source, texts = packed, read_packed_texts(packed, Path(path).stem)
    else:
        raise FileNotFoundError(f"The texts of {path} are needed beside it, but there is no {source} and no {packed}.")
    if len(texts) != num_examples:
        raise ValueError(f"{source} has {len(texts)} texts, but {path} says {num_examples} examples.")
    for number, row in enumerate(texts, start=1):
        if missing := {"prompt", "completion", "response"} - set(row):
            raise ValueError(f"{source}, row {number} has no {' and no '.join(sorted(missing))}.")
    return texts


def read_packed_texts(path: str, name: str) -> list[dict[str, str]]:
    """
    The texts of one report out of a folder's Parquet file.

    Args:
        path (`str`): The file, with the columns `report`, `prompt`, `completion` and `response`.
        name (`str`): The report's file name without `.json`.

    Raises:
        ValueError: if the file is something else, or has no texts of this report.
        ImportError: if pyarrow is missing.
    """
    check_installed(f"Reading {path}", "pyarrow")
    from pyarrow import ArrowInvalid, parquet

    try:
        table = parquet.read_table(path, filters=[("report", "=", name)])
    except ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet file with the texts of reports: {error}") from error
    if table.num_rows == 0:
        raise ValueError(f"{path} has no texts of the report {name!r}.")
    return table.drop_columns("report").to_pylist()


def score_table(reports: list[dict[str, Any]]) -> str:
    """One row a system: scores with their 95% intervals, loss, loss with shuffled states, speed and costs."""
    names = [name for name in METRICS if any(name in report["scores"] for report in reports)]
    with_shuffled = any("shuffled_states" in report for report in reports)
    header = ["System", *(METRICS[name] for name in names), "Loss per token"]
    with_costs = any("costs" in report for report in reports)
    header += ["Loss with shuffled LLM states"] * with_shuffled + ["Examples/s", "Tokens/s"]
    header += ["Parameters", "GFLOP an example"] * with_costs
    lines = [header, ["---"] * len(header)]
    for report in reports:
        cells = [report["system"]]
        for name in names:
            score = report["scores"].get(name)
            cells.append(f"{score['score']:.1f} [{score['low']:.1f}, {score['high']:.1f}]" if score else "")
        cells.append(f"{report['loss']:.3f}")
        if with_shuffled:
            shuffled = report.get("shuffled_states")
            cells.append(_shuffled_cell(shuffled) if shuffled else "")
        cells += [f"{report['speed'][name]:.3g}" for name in ("examples_per_second", "tokens_per_second")]
        if with_costs:
            costs = report.get("costs")
            cells += [f"{costs['parameters'] / 1e6:.1f}M", f"{costs['gflop_per_example']:.3g}"] if costs else ["", ""]
        lines.append(cells)
    examples = dict.fromkeys(f"{report['data']['examples']:,}" for report in reports)
    note = f"{', '.join(examples)} examples; in brackets the middle 95% of 1,000 bootstrap resamples. "
    note += "Losses of different tokenizers are of different tokens."
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{note}"


def _shuffled_cell(shuffled: dict[str, float]) -> str:
    return f"{shuffled['shuffled_loss']:.3f}{describe_increase(shuffled['loss'], shuffled['shuffled_loss'])}"


def describe_increase(loss: float, changed: float) -> str:
    """By how many percent a loss changed, in brackets behind a space; nothing where it was next to nothing before."""
    if loss < LEAST_LOSS or changed > 10 * loss:
        return ""
    return f" ({changed / loss - 1:+.1%})"


def difference_table(reports: list[dict[str, Any]], texts: list[list[dict[str, str]]]) -> str:
    """One row a system but the first: what it scores more than the first, the interval, and p of a paired test."""
    check_installed("Comparing texts", "rouge_score", "sacrebleu")
    from .metrics import compare, compute_statistics

    names = [name for name in METRICS if all(name in report["scores"] for report in reports)]
    header = [f"Minus {reports[0]['system']}", *(METRICS[name] for name in names)]
    lines = [header, ["---"] * len(header)]
    statistics = []
    for rows in texts:
        responses, references, prompts = ([row[part] for row in rows] for part in ("response", "completion", "prompt"))
        statistics.append({name: compute_statistics(name, responses, references, prompts) for name in names})
    for report, own in zip(reports[1:], statistics[1:], strict=True):
        cells = [report["system"]]
        for name in names:
            test = compare(own[name], statistics[0][name])
            cells.append(f"{test['difference']:+.1f} [{test['low']:+.1f}, {test['high']:+.1f}], p = {test['p']:.3f}")
        lines.append(cells)
    note = "Paired bootstrap test with 1,000 resamples: differences with their 95% intervals."
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{note}"
