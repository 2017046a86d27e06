"""Raw files -> documents, one at a time, with every byte accounted for.

What is read: files, folders (every file below, in name order) and globs of txt, md, html, jsonl, json, csv, tsv and
parquet, each also .gz, .xz or .zst. Other files of a folder are left out and counted; a file given by its own name is
read as plain text when its ending says nothing. Hidden files, LICENSE-like files and `sources.json` are no documents.

The policy, every case of it counted in `ReadCounts` with the file and the line of the first few:
- encoding: UTF-8, UTF-16 and UTF-32 by byte order mark (dropped), else UTF-8, else what an HTML page declares, else
  gb18030 or windows-1252 by the rule of `source.guess_encoding`; any other one must be named (`encoding`). Bytes that
  mean nothing become U+FFFD; NUL is removed; a file that is no text is left out. Newlines are kept as they are.
- lines end at "\\n" and nowhere else: U+2028 and U+0085 stay inside their JSON line.
- length: a plain text over `document_bytes` is split at a line or a space (or refused: `long_text`); a JSON line,
  record or page of that length is refused. Memory stays at a few times `document_bytes`.
- compression: growth of more than `compression_ratio` times, or beyond `file_bytes`, ends the file there; so does a
  torn file. Rows before that place stay, the text that was being read is dropped.
- links inside a folder are not followed (or, with `follow_links`, each target once); no file is read twice.
- ids are the root's name, the path below it and the row or line number; they change only when the files do.
- licence, language and source come from the row's own fields, else from the nearest `sources.json` (file or pattern ->
  {"licence", "source", "language"}), else, for the licence, from the nearest LICENSE or ATTRIBUTION file. Text files
  without any have their folder as source, tables their path.

The sum that closes: bytes_read + bytes_recoded = bytes_kept + the sum of dropped_bytes, in bytes after decompression;
"markup" is what surrounds the texts (JSON syntax, other fields, tags), and bytes_kept is UTF-8.
Knows nothing of the quality, language or sensitivity of what it reads.
"""

import codecs
import fnmatch
import glob
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from glasshouse.corpus import formats
from glasshouse.corpus.formats import FORMATS, Row, TextUnit
from glasshouse.corpus.source import (
    COMPRESSIONS,
    ByteCounts,
    SourceError,
    TextStream,
    read_chunks,
    replace_surrogates,
    utf8_size,
)
from glasshouse.errors import InputError
from glasshouse.files import read_json

SHIPPED = Path(__file__).resolve().parents[1] / "data"
EXAMPLES = 5
FILE_PROBLEMS = ("torn", "bomb", "binary", "unreadable")
UNCOUNTED_ROWS = ("blank", "header", "markup")  # bytes that no one would call a record
METADATA_LENGTH = 1000
FIELD_NAMES = {
    "text": ("text", "content", "body", "story", "document", "article", "passage", "review", "code"),
    "licence": ("licence", "license"),
    "language": ("language", "lang"),
    "source": ("source", "dataset", "corpus"),
}
CREATIVE_COMMONS = re.compile(r"creativecommons\.org/licenses/([a-z-]+)/([\d.]+\d)")
LICENCE_WORDS = {
    "creativecommons.org/publicdomain/zero/1.0": "CC0-1.0",
    "apache license": "Apache-2.0",
    "permission is hereby granted, free of charge": "MIT",
}
NOTICE_NAME = re.compile(r"(licen[cs]e|copying|attribution|notice)s?(-[\w.-]+)?(\.(txt|md|rst|html))?", re.I)


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
    """How to read: which fields, which limits, what to do with what does not fit.

    Args:
        text_field: the field or column of the text; empty to look for text, content, body, story, ...; "#2" is the
            second column of a table without a header.
        id_field: the field that replaces the row number in ids; its values must be unique within their file.
        licence_field: the field of the licence; empty to look for licence or license.
        language_field: the field of the language code; empty to look for language or lang.
        source_field: the field of the source; empty to look for source, dataset or corpus.
        encoding: the encoding of every file; empty to find it out per file.
        text_unit: what one document of a plain text file is: the file (auto: parted by <|endoftext|> lines where
            there are any), a line, or a paragraph (parted by blank lines).
        long_text: what to do with a plain text over `document_bytes`.
        document_bytes: the longest document, in bytes.
        file_bytes: the most that one compressed file may grow to, in bytes.
        compression_ratio: how many times its size a compressed file may grow to.
        follow_links: whether to follow links inside folders, wherever they lead.
        exclude: patterns of paths, below the given folder, to leave out.
    """

    text_field: str = ""
    id_field: str = ""
    licence_field: str = ""
    language_field: str = ""
    source_field: str = ""
    encoding: str = ""
    text_unit: TextUnit = "auto"
    long_text: Literal["split", "refuse"] = "split"
    document_bytes: int = 16 * 2**20
    file_bytes: int = 64 * 2**30
    compression_ratio: int = 200
    follow_links: bool = False
    exclude: tuple[str, ...] = ()


@dataclass
class ReadCounts(ByteCounts):
    """What was read, kept and left out, and why. Filled by `read_documents`, final when it has ended.

    `files` counts files by what happened ("read", or why not); `dropped_rows` counts records and `examples` holds the
    first few places ("file:line detail") by the same names as `dropped_bytes`.
    """

    files: Counter[str] = field(default_factory=Counter)
    documents: int = 0
    bytes_kept: int = 0
    dropped_rows: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    @property
    def unaccounted_bytes(self) -> int:
        """Zero, unless bytes were lost without a name."""
        return self.bytes_read + self.bytes_recoded - self.bytes_kept - sum(self.dropped_bytes.values())

    def note(self, reason: str, where: str) -> None:
        """Keep the place as an example of the reason, if there are not enough of them."""
        places = self.examples.setdefault(reason, [])
        if len(places) < EXAMPLES:
            places.append(where)

    def leave_out(self, reason: str, where: str) -> None:
        """Count a file that is not read, or not to its end."""
        self.files[reason] += 1
        self.note(reason, where)

    def as_report(self) -> dict[str, Any]:
        """All counts as one JSON object."""
        names = (
            "documents",
            "bytes_read",
            "bytes_recoded",
            "bytes_kept",
            "unaccounted_bytes",
            "replaced_characters",
        )
        tables = ("files", "dropped_bytes", "dropped_rows", "encodings")
        report: dict[str, Any] = {name: getattr(self, name) for name in names}
        report |= {name: dict(sorted((+getattr(self, name)).items())) for name in tables}
        return report | {
            "examples": {reason: list(places) for reason, places in sorted(self.examples.items())}
        }


@dataclass(frozen=True)
class _File:
    path: Path
    root: Path
    name: str  # the root's name and the path below it: what ids begin with
    format: str
    compression: str


def read_documents(paths: Sequence[str | Path], policy: ReadPolicy, counts: ReadCounts) -> Iterator[Document]:
    """Yield every document of some files, folders and globs, always in the same order.

    Args:
        paths: what to read; "shipped" is the corpus that comes with the package.
        policy: how.
        counts: filled while documents come out.

    Raises:
        InputError: a path does not exist or holds no file that can be read, a file's rows have no field for the text,
            a library is missing, or `sources.json` is torn.
    """
    try:
        codecs.lookup(policy.encoding or "utf-8")
    except LookupError:
        raise InputError("unknown encoding", policy.encoding, "name one of Python's, as gb18030") from None
    provenance = _Provenance()
    seen: set[str] = set()
    names: Counter[str] = Counter()
    for given in paths:
        found = 0
        for file in _find_files(given, policy, counts):
            real = os.path.realpath(file.path)
            found += 1
            if real in seen:
                counts.leave_out("repeated", file.name)
                continue
            seen.add(real)
            names[file.name] += 1
            if names[file.name] > 1:  # two roots, or two files given by name, that are called alike
                file = replace(file, name=f"{file.name}~{names[file.name]}")
            yield from _read_file(file, policy, counts, provenance)
        if not found:
            kinds = " ".join(FORMATS)
            raise InputError("nothing to read there", str(given), f"give files of {kinds}, also .gz .xz .zst")


def estimate_bytes(paths: Sequence[str | Path], policy: ReadPolicy) -> int:
    """About how much text there is, from the sizes of the files; compressed ones are taken to grow four times."""
    files = (file for given in paths for file in _find_files(given, policy, ReadCounts()))
    return sum(
        file.path.stat().st_size * (4 if file.compression or file.format == "parquet" else 1)
        for file in files
    )


def _find_files(given: str | Path, policy: ReadPolicy, counts: ReadCounts) -> Iterator[_File]:
    path = SHIPPED if str(given) == "shipped" and not Path(given).exists() else Path(given)
    exists = False
    with suppress(OSError):  # a name too long to be one
        exists = path.exists()
    if exists:
        matches, root = [path], path if path.is_dir() else path.parent
    elif glob.has_magic(str(given)):
        place = next(place for place, part in enumerate(path.parts) if glob.has_magic(part))
        root = Path(*path.parts[:place])
        matches = sorted(root.glob("/".join(path.parts[place:])))
    else:
        raise InputError("no such file or folder", str(given), "check the path")
    root_name = path.resolve().name if path.is_dir() else ""
    for match in matches:
        files = _walk(match, policy, counts) if match.is_dir() else [match]
        for file in files:
            name = Path(root_name, os.path.relpath(file, root)).as_posix()
            kind, compression = _format_of(file, file == path)
            if file != path and (file.name == "sources.json" or NOTICE_NAME.fullmatch(file.name)):
                counts.leave_out("notice", name)
            elif not kind:
                counts.leave_out("unknown_format", name)
            else:
                yield _File(file, root, name, kind, compression)


def _format_of(path: Path, asked_for: bool) -> tuple[str, str]:
    compression = COMPRESSIONS.get(path.suffix.lower(), "")
    suffix = (path.with_suffix("") if compression else path).suffix.lower()
    return FORMATS.get(suffix, "text" if asked_for else ""), compression


def _walk(folder: Path, policy: ReadPolicy, counts: ReadCounts) -> Iterator[Path]:
    """Files below a folder in name order, without recursion; with links followed, no folder is entered twice."""
    waiting, entered = [folder], {os.path.realpath(folder)}
    while waiting:
        path = waiting.pop()
        below = path.relative_to(folder)
        if path.name.startswith(".") and path != folder:
            counts.files["hidden"] += 1
        elif any(fnmatch.fnmatch(below.as_posix(), pattern) for pattern in policy.exclude):
            counts.files["excluded"] += 1
        elif path.is_symlink() and path != folder and not policy.follow_links:
            counts.leave_out("link", str(below))
        elif path.is_dir():
            real = os.path.realpath(path)
            if path != folder and real in entered:
                counts.leave_out("link", f"{below} was entered before")
                continue
            entered.add(real)
            try:
                waiting += sorted(path.iterdir(), reverse=True)
            except OSError as error:
                counts.leave_out("unreadable", f"{below} {error.strerror}")
        elif path.is_file():
            yield path
        else:
            counts.leave_out("not_a_file", str(below))


class _Provenance:
    """Licence, source and language that folders state for their files; reads each folder's statements once."""

    def __init__(self) -> None:
        self.folders: dict[Path, tuple[dict[str, dict[str, str]], str, str]] = {}

    def facts(self, file: _File) -> dict[str, str]:
        """The facts for one file: the nearest statement of each wins."""
        facts: dict[str, str] = {}
        folder = file.path.parent
        while True:
            listed, licence, notice = self._folder(folder)
            below = file.path.relative_to(folder).as_posix()
            for pattern, stated in listed.items():
                if fnmatch.fnmatch(below, pattern):
                    facts = stated | facts
            if notice and "licence" not in facts:
                facts |= {"licence": licence, "licence_file": notice}
            if folder == file.root or folder == folder.parent or not folder.is_relative_to(file.root):
                return facts
            folder = folder.parent

    def _folder(self, folder: Path) -> tuple[dict[str, dict[str, str]], str, str]:
        if folder not in self.folders:
            listed = _read_sources(folder / "sources.json") if (folder / "sources.json").is_file() else {}
            notices, licence = [], ""
            with suppress(OSError):  # a folder or notice that may not be read states nothing
                names = sorted(path for path in folder.iterdir() if NOTICE_NAME.fullmatch(path.name))
                notices = [path for path in names if path.is_file()]
                licence = next((found for path in notices if (found := _licence_of(path))), "")
            self.folders[folder] = listed, licence, notices[0].name if notices else ""
        return self.folders[folder]


def _licence_of(path: Path) -> str:
    with open(path, "rb") as file:
        words = " ".join(file.read(2**16).decode("utf-8", "replace").lower().split())
    if found := CREATIVE_COMMONS.search(words):
        return f"CC-{found[1].upper()}-{found[2]}"
    return next((name for phrase, name in LICENCE_WORDS.items() if phrase in words), f"see {path.name}")


def _read_sources(path: Path) -> dict[str, dict[str, str]]:
    content = read_json(path)
    content = content.get("files", content) if isinstance(content, dict) else content
    if isinstance(content, list):
        content = {item.get("file", ""): item for item in content if isinstance(item, dict)}
    if not isinstance(content, dict):
        raise InputError("no licences per file", str(path), 'write {"file": {"licence": ..., "source": ...}}')
    listed: dict[str, dict[str, str]] = {}
    for name, stated in content.items():
        stated = {"licence": stated} if isinstance(stated, str) else stated
        if not isinstance(stated, dict):
            raise InputError("no facts of a file", f"{path}: {name}", 'write {"licence": ..., "source": ...}')
        fields = [(kind, known) for kind in ("licence", "language", "source") for known in FIELD_NAMES[kind]]
        listed[name] = {kind: str(stated[known]) for kind, known in fields if stated.get(known)}
    return listed


def _read_file(
    file: _File, policy: ReadPolicy, counts: ReadCounts, provenance: _Provenance
) -> Iterator[Document]:
    facts = provenance.facts(file)
    columns = _Columns(policy, file)
    before, documents = counts.bytes_read, counts.documents
    replaced = counts.replaced_characters
    try:
        for row in _rows(file, policy, counts, columns):
            document = _make_document(row, file, counts, facts, columns)
            if document:
                yield document
        counts.files["read" if counts.bytes_read > before else "empty"] += 1
        if counts.bytes_read == before:
            counts.note("empty", file.name)
    except SourceError as error:
        kept = (
            f" (the {counts.documents - documents} documents before stay)"
            if counts.documents > documents
            else ""
        )
        counts.leave_out(error.reason, f"{file.name} {error.detail}{kept}")
    if counts.replaced_characters > replaced:
        counts.note("replaced_characters", f"{file.name} {counts.replaced_characters - replaced} characters")


def _rows(file: _File, policy: ReadPolicy, counts: ReadCounts, columns: "_Columns") -> Iterator[Row]:
    ratio, limit = policy.compression_ratio, policy.document_bytes
    chunks = read_chunks(file.path, file.compression, ratio=ratio, limit=policy.file_bytes)
    if file.format == "parquet":
        return _parquet_rows(file, chunks, policy, counts, columns)
    text = TextStream(chunks, counts, policy.encoding, file.format == "html").chunks()
    if file.format == "html":
        return formats.html_rows(text, limit)
    if file.format == "json_lines":
        return formats.json_line_rows(text, limit)
    if file.format == "json":
        return formats.json_rows(text, limit)
    if file.format in ("csv", "tsv"):
        return formats.table_rows(text, file.format == "tsv", limit, not policy.text_field.startswith("#"))
    return formats.text_rows(text, policy.text_unit, limit, policy.long_text == "split")


def _parquet_rows(
    file: _File, chunks: Iterator[bytes], policy: ReadPolicy, counts: ReadCounts, columns: "_Columns"
) -> Iterator[Row]:
    """Parquet is read from its end, so a compressed one is unpacked to a temporary file first."""
    with tempfile.NamedTemporaryFile(suffix=".parquet") as unpacked:
        path = file.path
        if file.compression:
            for chunk in chunks:
                unpacked.write(chunk)
            unpacked.flush()
            path = Path(unpacked.name)
        most = min(policy.file_bytes, max(policy.compression_ratio * path.stat().st_size, 2**22))
        for row in formats.parquet_rows(path, columns.choose, most):
            counts.bytes_read += row.size
            yield row if row.size <= policy.document_bytes else replace(row, problem="too_long")


class _Columns:
    """Which fields of one file's records are what: settled by the first record, or by the header."""

    def __init__(self, policy: ReadPolicy, file: _File):
        self.file = file
        self.asked = {kind: getattr(policy, f"{kind}_field") for kind in (*FIELD_NAMES, "id")}
        self.names: dict[str, str] = {}

    def settle(self, names: Sequence[str]) -> dict[str, str]:
        """Name the field of each kind; raises InputError, naming the fields there are, when one is missing."""
        if self.names:
            return self.names
        there = "the fields there are " + (", ".join(str(name)[:40] for name in names[:30]) or "none")
        lowered = {str(name).lower(): name for name in reversed(names)}
        for kind, asked in self.asked.items():
            found = [asked] if asked in names else []
            if asked and not found:
                raise InputError(
                    f"no field {asked}; {there}", str(self.file.path), f"set {kind}_field to one of them"
                )
            found += [lowered[name] for name in FIELD_NAMES.get(kind, ()) if not asked and name in lowered]
            if found:
                self.names[kind] = found[0]
        if "text" not in self.names:
            fix = "set text_field to the one with the text, or exclude the file"
            raise InputError(f"no field that is known to hold text; {there}", str(self.file.path), fix)
        return self.names

    def choose(self, names: list[str]) -> list[str]:
        """The columns of a parquet file worth reading."""
        chosen = self.settle(names).values()
        return [name for name in names if name in chosen or name.lower() in ("title", "url", "id")]


def _make_document(
    row: Row, file: _File, counts: ReadCounts, facts: dict[str, str], columns: _Columns
) -> Document | None:
    record: dict[str, Any] = row.value if isinstance(row.value, dict) else {}
    text, problem = "", row.problem
    if problem == "header":
        columns.settle(list(row.value))
    elif not problem:
        value = record.get(columns.settle(list(record))["text"]) if record else row.value
        value = None if isinstance(row.value, list) else value
        text, problem, replaced = _clean_text(value)
        counts.replaced_characters += replaced
    if problem:
        counts.dropped_bytes[problem] += row.size
        if problem not in UNCOUNTED_ROWS:
            counts.dropped_rows[problem] += 1
        if problem not in (*UNCOUNTED_ROWS, *FILE_PROBLEMS):
            counts.note(problem, f"{file.name}:{row.line} {row.detail}".rstrip())
        return None
    kept = utf8_size(text)
    counts.documents += 1
    counts.bytes_kept += kept
    counts.dropped_bytes["separator" if file.format == "text" else "markup"] += row.size - kept
    return _with_facts(row, record, text, file, facts, columns.names)


def _with_facts(
    row: Row, record: dict[str, Any], text: str, file: _File, facts: dict[str, str], names: dict[str, str]
) -> Document:
    number = str(record[names["id"]]) if names.get("id") in record else str(row.number or "")
    facts = facts | {
        kind: str(record[name]) for kind, name in names.items() if record.get(name) not in (None, "")
    }
    metadata = {
        str(name): value
        for name, value in record.items()
        if name not in names.values()
        and isinstance(value, str | int | float)
        and len(str(value)) <= METADATA_LENGTH
    }
    folder = file.name.rpartition("/")[0] if file.format in ("text", "html") else ""
    return Document(
        id=file.name + (f":{number}" if number else "") + (f"/{row.part}" if row.part else ""),
        text=text,
        source=facts.get("source") or folder or file.name,
        licence=facts.get("licence", ""),
        language=facts.get("language", ""),
        metadata=metadata | ({"licence_file": facts["licence_file"]} if "licence_file" in facts else {}),
    )


def _clean_text(value: Any) -> tuple[str, str, int]:
    """The text without NUL and without lone surrogates (JSON can escape both), what is wrong with it, and how many
    characters were replaced."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        value = "\n".join(value)
    if not isinstance(value, str):
        return "", "no_text", 0
    text, replaced = replace_surrogates(value.replace("\0", ""))
    return text, "" if text.strip() else "empty", replaced
