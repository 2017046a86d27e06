"""Raw files -> documents, one at a time, with every byte accounted for. (The full policy is stated here; see below.)"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Document:
    """One text and where it came from. `language` is "" when unknown, `licence` is "" when nothing states it."""

    id: str
    text: str
    source: str
    licence: str
    language: str
    metadata: dict[str, Any]


@dataclass(frozen=True)
class ReadPolicy:
    """How to read: which fields, which limits, what to do with what does not fit."""

    text_field: str = ""
    id_field: str = ""
    licence_field: str = ""
    language_field: str = ""
    source_field: str = ""
    encoding: str = ""
    text_unit: Literal["auto", "file", "line", "paragraph"] = "auto"
    long_text: Literal["split", "refuse"] = "split"
    document_bytes: int = 16 * 2**20
    file_bytes: int = 64 * 2**30
    compression_ratio: int = 200
    follow_links: bool = False
    exclude: tuple[str, ...] = ()


@dataclass
class ReadCounts:
    """What was read, kept and left out, and why. Filled by `read_documents`."""

    files: Counter[str] = field(default_factory=Counter)
    documents: int = 0
    bytes_read: int = 0
    bytes_kept: int = 0
    bytes_recoded: int = 0
    dropped_bytes: Counter[str] = field(default_factory=Counter)
    dropped_rows: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)


def read_documents(paths: Sequence[str | Path], policy: ReadPolicy, counts: ReadCounts) -> Iterator[Document]:
    """Read every document of some files, folders and globs, in a fixed order."""
    raise NotImplementedError
    yield Document("", "", "", "", "", {})
