"""What the card of any run says: its state at the top, and at the end whatever else was attached to it. Reads no files."""

from typing import Any

from glasshouse.card.facts import Facts, Row, part, rows_of
from glasshouse.card.page import Block, Code, Heading, Paragraph, Table
from glasshouse.card.quantity import count, short


def state_of(facts: Facts) -> list[Block]:
    """What a reader must know first: that the run is not finished, or that files are missing."""
    return [*_unfinished(facts), *(Paragraph(note, "warning") for note in facts.notes)]


def _unfinished(facts: Facts) -> list[Block]:
    if facts.is_finished:
        return []
    stage, status, steps = (
        facts.run.get("stage"),
        facts.run.get("status"),
        part(facts.run, "shape").get("steps"),
    )
    why = "It is still running, or was killed." if status == "running" else "It was stopped before its end."
    text: tuple[str | Code, ...] = (f"This run is not finished (status: {status}). {why}",)
    if stage == "pretrain":
        resume = Code(f"glasshouse pretrain --resume --out {facts.place}")
        done = f" {facts.done:,} of {count(steps)} steps are logged." if steps else ""
        text = (f"{text[0]}{done} What follows is what there is. Go on with ", resume, ".")
    return [Paragraph(text, "warning")]


def other_reports(facts: Facts) -> list[Block]:
    """Every other attached report, as it is: a table of its values, and one of each list of tables in it."""
    blocks: list[Block] = []
    for name, report in facts.reports.items():
        if name != "evaluation" or facts.run.get("stage") == "prepare":
            blocks += [Heading(f"Report: {name.replace('_', ' ')}"), *_generic(report)]
            if "digest" in report and report["digest"] != facts.run.get("digest"):
                blocks.append(Paragraph("This report is of other weights than the run holds now.", "warning"))
    return blocks


def _generic(report: Row) -> list[Block]:
    values: list[tuple[str, str]] = []
    tables: list[Block] = []
    waiting: list[tuple[str, Any]] = list(report.items())
    while waiting:
        name, value = waiting.pop(0)
        if isinstance(value, dict):
            waiting[:0] = [(f"{name}.{key}", item) for key, item in value.items()]
        elif len(rows := rows_of(value)) > 0:
            keys = list(dict.fromkeys(key for row in rows for key in row))[:8]
            tables += [
                Heading(f"{name} ({len(rows)})", 3),
                Table(keys, [[short(row.get(key, "")) for key in keys] for row in rows[:50]]),
            ]
        else:
            values.append((str(name), short(value)))
    return [*([Table(("", ""), values)] if values else []), *tables]
