"""The card of a run: README.md for the hub and for readers of text, report.html for readers of plots.

Written from the files of the run folder, and of the corpus it was made from where that is still there; from nothing
else, so the same files give the same card.
"""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from glasshouse.card.corpus import corpus_sections
from glasshouse.card.encoder import encoder_sections
from glasshouse.card.facts import Facts, Row, part, rows_of
from glasshouse.card.kind import kind_of
from glasshouse.card.model import model_sections
from glasshouse.card.page import clean, render_html, render_markdown
from glasshouse.card.quantity import number_of
from glasshouse.card.reports import other_reports
from glasshouse.errors import InputError
from glasshouse.files import MANIFEST, read_json, sha256_file, write_atomic
from glasshouse.run import METRICS_FILE, RECIPE_FILE, RUN_FILE, Run

VERBS = ("prepare", "pretrain", "finetune", "federate")

CORPUS_FILES = ("corpus.json", "waterfall.json", "tokenizer_report.json")
HUB_LICENCES = {
    "apache-2.0": "apache-2.0", "mit": "mit", "cc0-1.0": "cc0-1.0", "cc-by-4.0": "cc-by-4.0", "cc-by-3.0": "cc-by-3.0",
    "cc-by-2.0": "cc-by-2.0", "cc-by-sa-4.0": "cc-by-sa-4.0", "cc-by-sa-3.0": "cc-by-sa-3.0", "cc-by": "cc",
    "cc-by-nc-4.0": "cc-by-nc-4.0", "odc-by": "odc-by", "bsd-3-clause": "bsd-3-clause", "gpl-3.0": "gpl-3.0",
    "unknown": "unknown",
}  # fmt: skip
"""Licence names, in lower case, that the Hugging Face hub knows, and how it writes them."""


def write_report(run: Run) -> None:
    """Write the run's README.md and report.html; works for finished, stopped and running runs of every stage.

    Raises:
        InputError: there is no run, its run.json is torn, or the folder cannot be written.
    """
    facts = read_facts(run)
    is_corpus = facts.run.get("stage") == "prepare"
    title = f"{facts.name}: a {'corpus' if is_corpus else 'language model'}, with its measurements"
    if is_corpus:
        blocks = corpus_sections(facts)
    else:
        blocks = encoder_sections(facts) if facts.is_encoder else model_sections(facts)
    blocks = [*blocks, *other_reports(facts)]
    head = corpus_head(facts) if is_corpus else model_head(facts)
    front = yaml.safe_dump(_plain(head), sort_keys=False, allow_unicode=True, width=110)
    write_atomic(run.path / "README.md", f"---\n{front}---\n\n{render_markdown(title, blocks)}")
    write_atomic(run.path / "report.html", render_html(title, blocks))


# ------------------------------------------------------------------------------------------------------------ reading


def read_facts(run: Run) -> Facts:
    """All that the files of a run say; what cannot be read is noted instead."""
    facts = run.read()
    if not isinstance(facts, dict):
        raise InputError(
            "it holds no table", str(run.path / RUN_FILE), "the file is torn or altered; make the run again"
        )
    notes: list[str] = []
    path = run.path.resolve()
    in_recipe = path.name in VERBS and bool(path.parent.name)  # a recipe's runs are called by their stage
    name = path.parent.name if in_recipe else path.name
    place = f"{path.parent.name}/{path.name}" if in_recipe else path.name
    recipe, settings = _read_recipe(run, str(facts.get("stage")), notes)
    rows = _read_metrics(run, notes)
    reports = {
        file.stem: _read_or_note(file, notes) for file in sorted((run.path / "reports").glob("*.json"))
    }
    corpus = _find_corpus(run, facts, notes)
    held, waterfall, tokenizer = (
        _read_or_note(corpus / file, notes) if corpus else {} for file in CORPUS_FILES
    )
    return Facts(
        clean(name), re.sub(r"[^\w./-]", "_", place, flags=re.ASCII), facts, recipe, settings,
        [row for row in rows if "loss" in row], [row for row in rows if "validation_loss" in row],
        {key: value for key, value in reports.items() if value}, held, waterfall, tokenizer, notes,
    )  # fmt: skip


def _read_or_note(file: Path, notes: list[str]) -> Row:
    try:
        value = read_json(file)
    except InputError as error:
        notes.append(f"{file.name} could not be read: {error.what}.")
        return {}
    return value if isinstance(value, dict) else {}


def _read_recipe(run: Run, stage: str, notes: list[str]) -> tuple[str, Row]:
    try:
        text = (run.path / RECIPE_FILE).read_text(encoding="utf-8", errors="replace")
        return text, part(yaml.safe_load(text), stage)
    except (OSError, yaml.YAMLError):
        notes.append(f"{RECIPE_FILE} is missing or could not be read, so settings are not shown.")
        return "", {}


def _read_metrics(run: Run, notes: list[str]) -> list[Row]:
    path, rows, torn = run.path / METRICS_FILE, [], 0
    for line in path.read_bytes().split(b"\n") if path.is_file() else []:
        try:
            row = json.loads(line) if line.strip() else {}
        except ValueError:
            row = None
        torn += not isinstance(row, dict)
        if isinstance(row, dict) and number_of(row.get("step")) is not None:
            rows.append(row)
    if torn:
        notes.append(
            f"{torn} line(s) of {METRICS_FILE} could not be read and are left out; a kill can cut the last one."
        )
    return rows


def _find_corpus(run: Run, facts: Row, notes: list[str]) -> Path | None:
    """The corpus of a run: its own, or its parent's, at the recorded place or beside the run."""
    if facts.get("stage") == "prepare":
        return run.corpus_path if run.corpus_path.is_dir() else None
    parent = next(iter(rows_of(facts.get("parents"))), {})
    if not parent or facts.get("stage") == "finetune":
        return None
    recorded = Path(str(parent.get("path", "")))
    for place in (recorded, run.path.resolve().parent / recorded.name) if recorded.name else ():
        folder = place / "corpus" if (place / "corpus").is_dir() else place
        if (folder / CORPUS_FILES[0]).is_file():
            expected = parent.get("digest") or facts.get("corpus_digest")
            manifest = folder / MANIFEST
            if expected is None or (manifest.is_file() and sha256_file(manifest) == expected):
                return folder
    notes.append(
        "The corpus this run was made from is not at the recorded place, or is no longer the same, so what it held is not shown."
    )
    return None


# --------------------------------------------------------------------------------------------------------- front matter


def _licences(facts: Facts) -> list[str]:
    found = {HUB_LICENCES.get(str(name).lower(), "other") for name in part(facts.corpus, "licences")}
    return sorted(found) or ["unknown"]


def _identifiers(facts: Facts) -> list[str]:
    names = [
        re.sub(r"[^a-z0-9]+", "-", str(name).lower()).strip("-")[:60]
        for name in part(facts.corpus, "sources")
    ]
    return sorted({name.strip("-") for name in names if name.strip("-")})[:20]


def model_head(facts: Facts) -> Row:
    """Front matter of a model card (Hugging Face's model card metadata)."""
    named = str(facts.run.get("licence") or "")
    known = HUB_LICENCES.get(named.lower())
    licence = {"license": known} if known else {"license": "other", "license_name": named or "not-declared"}
    kind = kind_of(facts)
    task, tags = ("fill-mask", ("masked-lm", "from-scratch")) if facts.is_encoder else (kind.task, kind.tags)
    head: Row = {
        **licence, "language": facts.languages or ["und"], "library_name": "transformers",
        "pipeline_tag": task, "tags": ["glasshouse", *tags], "datasets": _identifiers(facts),
    }  # fmt: skip
    found, held_out = part(facts.evaluation, "bits_per_byte"), part(facts.evaluation, "held_out")
    if number_of(found.get("value")) is not None and facts.evaluation.get("digest") == facts.run.get(
        "digest"
    ):
        metric = {"type": "bits_per_byte", "name": "bits per byte (lower is better)", "value": found["value"]}
        corpus = {
            "name": "held-out part of the training corpus",
            "type": str(held_out.get("corpus") or "corpus")[:16],
            "split": "validation",
        }
        measured = {"type": "text-generation", "name": "language modelling"}
        head["model-index"] = [
            {"name": facts.name, "results": [{"task": measured, "dataset": corpus, "metrics": [metric]}]}
        ]
    return {key: value for key, value in head.items() if value != []}


def corpus_head(facts: Facts) -> Row:
    """Front matter of a dataset card."""
    return {
        "license": _licences(facts), "language": facts.languages or ["und"], "pretty_name": facts.name,
        "task_categories": ["text-generation"], "tags": ["glasshouse", "pretraining"],
    }  # fmt: skip


def _plain(value: Any) -> Any:
    """The same value with text that any YAML reader takes."""
    if isinstance(value, dict):
        return {clean(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return clean(value) if isinstance(value, str) else value
