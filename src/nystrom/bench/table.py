"""Kept measurements as Markdown: the tables in docs/results.md.

nystrom bench table --lines docs/results/peers.jsonl
"""

import json
from dataclasses import dataclass
from pathlib import Path

from nystrom.bench import error, memory, models, plan, ranks, scale, sentences, speed, steps, synthetic
from nystrom.bench.lines import Line, tables

SUMMARY = {
    "speed": speed.summary,
    "memory": memory.summary,
    "synthetic": synthetic.summary,
    "error": error.summary,
    "models": models.summary,
    "lra": steps.summary,
    "scale": scale.summary,
    "ranks": ranks.summary,
    "plan": plan.summary,
    "sts": sentences.summary_of_sts,
    "retrieval": sentences.summary_of_retrieval,
}


@dataclass(frozen=True, kw_only=True)
class Table:
    """Print kept JSON lines as Markdown tables, one per run."""

    lines: Path
    """A file that another bench command appended to."""


def run(config: Table) -> None:
    """Print the tables."""
    print(markdown(read(config.lines)))


def read(path: Path) -> list[Line]:
    """The measurements of a file.

    Raises:
        ValueError: a line is not a measurement; the message names the file and the line.
    """
    lines = []
    for number, text in enumerate(path.read_text().splitlines(), start=1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as problem:
            raise ValueError(f"{path}, line {number}: not JSON: {problem}") from None
        needed = {"method", "n", "utc", "environment"}
        if not isinstance(line, dict) or line.get("bench") not in SUMMARY or not needed <= line.keys():
            raise ValueError(f"{path}, line {number}: not a line of nystrom bench ({', '.join(SUMMARY)})")
        lines.append(line)
    if not lines:
        raise ValueError(f"{path}: holds no measurement")
    return lines


def markdown(lines: list[Line]) -> str:
    """A table per run and kind of measurement, with what it ran on below."""
    parts = []
    for together in tables(lines):
        about = together[0]["environment"]
        where = f"{about['processor']}, {about['cores']} cores, torch {about['packages']['torch']}"
        parts.append(f"{SUMMARY[together[0]['bench']](together).markdown()}\n\n{where}; commit {about['commit']}")
    return "\n\n".join(parts)
