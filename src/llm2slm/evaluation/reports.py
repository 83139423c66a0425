"""Reports of `llm2slm evaluate` side by side: a table of their scores, and paired tests against the first."""

import json
import os
from pathlib import Path
from typing import Any

from ..utils import read_json_lines

METRICS = {
    "bleu": "BLEU",
    "chrf": "chrF",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "exact_match": "Exact match",
}
# Nats a token. Of a smaller loss, and beyond ten times a loss, a percentage tells nothing: both losses are printed.
LEAST_LOSS = 0.01


def compare_reports(paths: list[str], name: str | None = None) -> str:
    """
    Markdown tables of several reports.

    Args:
        paths (`list[str]`): The reports; differences are to the first.
        name (`str`, *optional*): What the first one's system is called; as the report says if omitted.

    Raises:
        OSError: if a report, or the texts beside it, are missing.
        ValueError: if a file is something else, or the reports are about different data.
    """
    if len(paths) == 1:
        reports, texts = [read_report(paths[0])], None
    else:
        reports, texts = read_reports(paths)
    if name is not None:
        reports[0]["system"] = name
    scores = score_table(reports)
    return scores if texts is None else f"{scores}\n\n{difference_table(reports, texts)}"


def texts_path(report_path: str) -> str:
    """Where a report's texts are."""
    return str(Path(report_path).with_suffix(".jsonl"))


def read_reports(paths: list[str]) -> tuple[list[dict[str, Any]], list[list[dict[str, str]]]]:
    """
    Several reports about the same data, and the texts of each.

    Raises:
        OSError: if a report, or the texts beside it, are missing.
        ValueError: if a file is something else, or the reports are about different data.
    """
    reports = [read_report(path) for path in paths]
    texts = [read_texts(path, report["data"]["examples"]) for path, report in zip(paths, reports, strict=True)]
    references = [[row["completion"] for row in rows] for rows in texts]
    for path, own in zip(paths, references, strict=True):
        if own != references[0]:  # prompts may differ: each system has them in its own form
            raise ValueError(f"{path} and {paths[0]} are about different data: their references differ.")
    return reports, texts


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
    The texts beside a report.

    Raises:
        OSError: if they are not there.
        ValueError: if they are not as many as the report says.
    """
    beside = texts_path(path)
    if not os.path.isfile(beside):
        raise FileNotFoundError(f"The texts of {path} are needed beside it, but there is no {beside}.")
    texts = read_json_lines(beside)
    if len(texts) != num_examples:
        raise ValueError(f"{beside} has {len(texts)} texts, but {path} says {num_examples} examples.")
    for number, row in enumerate(texts, start=1):
        if missing := {"completion", "response"} - set(row):
            raise ValueError(f"{beside}, row {number} has no {' and no '.join(sorted(missing))}.")
    return texts


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
    examples = reports[0]["data"]["examples"]
    note = f"{examples:,} examples; in brackets the middle 95% of 1,000 bootstrap resamples. "
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
    from .metrics import compare, compute_statistics

    names = [name for name in METRICS if all(name in report["scores"] for report in reports)]
    header = [f"Minus {reports[0]['system']}", *(METRICS[name] for name in names)]
    lines = [header, ["---"] * len(header)]
    statistics = [
        {
            name: compute_statistics(name, [t["response"] for t in rows], [t["completion"] for t in rows])
            for name in names
        }
        for rows in texts
    ]
    for report, own in zip(reports[1:], statistics[1:], strict=True):
        cells = [report["system"]]
        for name in names:
            test = compare(own[name], statistics[0][name])
            cells.append(f"{test['difference']:+.1f} [{test['low']:+.1f}, {test['high']:+.1f}], p = {test['p']:.3f}")
        lines.append(cells)
    note = "Paired bootstrap test with 1,000 resamples: differences with their 95% intervals."
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{note}"
