"""The rows of one file of text, JSON lines, JSON, a table, HTML or parquet, each with the bytes it took.

Every byte of text that a reader takes in leaves it in exactly one `Row`, whole or with a problem, so that the sums of
`corpus.py` close. Holds one row and one chunk at a time. Knows nothing of which field is the text, nor of licences.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from glasshouse.corpus.source import Line, SourceError, read_lines, require_library, utf8_size

END_OF_TEXT = "<|endoftext|>"
FORMATS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".markdown": "text",
    ".html": "html",
    ".htm": "html",
    ".jsonl": "json_lines",
    ".ndjson": "json_lines",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
TextUnit = Literal["auto", "file", "line", "paragraph"]
_SPACE = re.compile(r"\s*")
_SPACE_OR_COMMA = re.compile(r"[\s,]*")
_HIDDEN_NAMES = "script style noscript template svg iframe object form button select nav header footer aside"
_HIDDEN_HTML = _HIDDEN_NAMES.split()
_BLOCK_NAMES = (
    "address article blockquote body br dd div dl dt figcaption figure h1 h2 h3 h4 h5 h6 hr html li main ol p pre "
    "section table tbody td th thead title tr ul"
)
_BLOCK_HTML = frozenset(_BLOCK_NAMES.split())


@dataclass(frozen=True)
class Row:
    """One record: the line it begins on, its value (text, or a dict of fields), and the UTF-8 bytes it took.

    `problem` names why it has no value; `number` counts the records of the file from 1 and is 0 when the whole file
    is one; `part` counts from 1 when one text was split because of its length.
    """

    line: int
    value: Any
    size: int
    number: int = 0
    problem: str = ""
    detail: str = ""
    part: int = 0


def text_rows(chunks: Iterator[str], unit: TextUnit, limit: int, split: bool) -> Iterator[Row]:
    """Plain text: the file is one text, unless `unit` is line or paragraph, or, with auto, lines that hold nothing but
    <|endoftext|> part it (as in dumps of TinyStories). A text over `limit` bytes is split at a line or a space, or
    refused."""
    held: list[Line] = []
    size = number = part = 0
    separated = unit in ("line", "paragraph")
    lines = read_lines(chunks, limit)
    try:
        for line in _cut_lines(lines, limit) if split else lines:
            bare = line.text.strip() if len(line.text) < 20 else line.text
            is_border = (
                bare == END_OF_TEXT
                if unit == "auto"
                else unit == "line" or (unit == "paragraph" and not bare)
            )
            if split and held and size + line.size > limit:
                part += 1
                yield _text_row(held, number + 1, part, separated)
                held, size = [], 0
            held.append(line)
            size += line.size
            if not split and size > limit:
                held = [Line(held[0].number, "", size, "too_long")]
            if is_border and (line.problem != "unfinished" or bare == END_OF_TEXT):
                separated, number = True, number + 1
                yield _text_row(held, number, part and part + 1, separated)
                held, size, part = [], 0, 0
    except SourceError as error:
        if held:
            yield Row(held[0].number, None, size, number + 1, error.reason, error.detail)
        raise
    if held:
        yield _text_row(held, number + 1, part and part + 1, separated)


def _cut_lines(lines: Iterator[Line], limit: int) -> Iterator[Line]:
    """The lines; one over the limit in pieces of that size, each cut at a space if there is one near its end."""
    rest, number = "", 0
    try:
        for line in lines:
            if not (rest or line.problem):  # nearly all of them
                yield line
                continue
            text, number = rest + line.text, line.number
            data, start = text.encode() if rest or line.size > limit else b"", 0
            while len(data) - start > limit:
                end = data.rfind(b" ", start + limit - limit // 16, start + limit) + 1 or start + limit
                while data[end] & 0xC0 == 0x80 and end > start + 4:  # inside a character
                    end -= 1
                yield Line(number, data[start:end].decode(), end - start, "unfinished")
                start = end
            rest = data[start:].decode() if data else text
            if line.problem != "too_long" or rest.endswith("\n"):
                yield Line(number, rest, utf8_size(rest), "" if rest.endswith("\n") else "unfinished")
                rest = ""
    except SourceError:
        if rest:
            yield Line(number, rest, utf8_size(rest), "unfinished")
        raise
    if rest:
        yield Line(number, rest, utf8_size(rest), "unfinished")


def _text_row(held: list[Line], number: int, part: int, separated: bool) -> Row:
    last, text = held[-1], "".join(line.text for line in held)
    if separated:
        if last.text.strip() in (END_OF_TEXT, ""):
            text = text[: len(text) - len(last.text)]
        text = text.strip("\r\n")
    refused = "" if held[0].text else "too_long"
    return Row(
        held[0].number, text, sum(line.size for line in held), number if separated else 0, refused, "", part
    )


def json_line_rows(chunks: Iterator[str], limit: int) -> Iterator[Row]:
    """JSON lines. A line over `limit`, or one that is no JSON, is a problem of that line only."""
    for line in read_lines(chunks, limit):
        if line.problem:
            yield Row(line.number, None, line.size, line.number, line.problem)
        elif not line.text.strip():
            yield Row(line.number, None, line.size, line.number, "blank")
        else:
            value, detail = _parse_json(line.text)
            yield Row(line.number, value, line.size, line.number, "invalid_json" if detail else "", detail)


def _parse_json(text: str) -> tuple[Any, str]:
    try:
        return json.loads(text), ""
    except (ValueError, RecursionError) as error:
        return None, str(error) or "invalid"


def json_rows(chunks: Iterator[str], limit: int) -> Iterator[Row]:
    """A JSON file: an array of records, one record, records one after the other, or one object around such an array.

    Nothing can be found again after a place that is no JSON, so the rest of the file goes with it.
    """
    reader = _JsonReader(chunks)
    inside = False
    number = 0
    try:
        while True:
            start = reader.line
            mark = reader.peek(_SPACE_OR_COMMA if inside else _SPACE)
            if not mark or (mark in "[]" and inside == (mark == "]")):
                inside = mark == "["
                reader.step(len(mark))
                if not mark:
                    break
                continue
            value, problem = reader.value(limit)
            if problem:
                detail, problem = problem, "too_long" if problem == "too_long" else "invalid_json"
                yield Row(start, None, reader.drain(), number + 1, problem, detail)
                return
            for item in [value] if inside else _unwrapped(value):
                number += 1
                yield Row(start, item, reader.taken(), number)
    except SourceError as error:
        yield Row(reader.line, None, reader.drain(), number + 1, error.reason, error.detail)
        raise
    if size := reader.drain():
        yield Row(reader.line, None, size, number + 1, "markup")


def _unwrapped(value: Any) -> list[Any]:
    """The records of an object whose one list of objects or strings is its content; otherwise the object itself.

    All bytes of the file are counted with the first record: nothing says which belong to which.
    """
    if isinstance(value, dict):
        lists = [item for item in value.values() if isinstance(item, list) and item]
        texts = [item for item in value.values() if isinstance(item, str)]
        if len(lists) == 1 and not texts and all(isinstance(item, dict | str) for item in lists[0]):
            return lists[0]
    return [value]


class _JsonReader:
    """Text that is parsed as it comes: holds one JSON value and one chunk, and knows line and bytes taken."""

    def __init__(self, chunks: Iterator[str]):
        self.chunks, self.buffer, self.position, self.line = chunks, "", 0, 1
        self.start, self.ended, self.decoder = 0, False, json.JSONDecoder()

    def more(self) -> bool:
        text = next(self.chunks, "")
        self.ended = not text
        self.buffer, self.position, self.start = (
            self.buffer[self.start :] + text,
            self.position - self.start,
            0,
        )
        return not self.ended

    def step(self, count: int) -> None:
        self.line += self.buffer.count("\n", self.position, self.position + count)
        self.position += count

    def peek(self, skipped: re.Pattern[str]) -> str:
        while True:
            match = skipped.match(self.buffer, self.position)
            self.step(match.end() - self.position if match else 0)
            if self.position < len(self.buffer):
                return self.buffer[self.position]
            if not self.more():
                return ""

    def value(self, limit: int) -> tuple[Any, str]:
        while True:
            try:
                value, end = self.decoder.raw_decode(self.buffer, self.position)
                if end < len(self.buffer) or self.buffer[end - 1] in '}]"' or self.ended:
                    self.step(end - self.position)
                    return value, ""
                problem = ""
            except json.JSONDecodeError as error:
                problem = str(error)
                if error.pos < len(self.buffer) - 32 and "Unterminated" not in error.msg:
                    return None, problem
            except RecursionError:
                return None, "nested too deeply"
            held = len(self.buffer) - self.position
            if held > limit:
                return None, "too_long"
            while len(self.buffer) - self.position < 2 * held and self.more():
                pass
            if self.ended and problem and len(self.buffer) - self.position == held:
                return None, problem

    def taken(self) -> int:
        size = utf8_size(self.buffer[self.start : self.position])
        self.start = self.position
        return size

    def drain(self) -> int:
        """Bytes of what was not handed out, to the end of the file."""
        size = utf8_size(self.buffer[self.start :])
        self.buffer, self.position, self.start = "", 0, 0
        return size + sum(utf8_size(text) for text in self.chunks)


def table_rows(chunks: Iterator[str], tab: bool, limit: int, header: bool) -> Iterator[Row]:
    """CSV as in RFC 4180 (quoted cells may hold newlines), or TSV as registered with IANA (no quoting at all).

    Values are dicts of the header's names; without a header the names are #1, #2, ... The header's bytes are a Row
    with the problem "header".
    """
    csv.field_size_limit(max(limit, csv.field_size_limit()))  # the module has one limit for the whole process
    taken: list[Line] = []
    feed = _plain_lines(read_lines(chunks, limit), taken)
    table = (line.rstrip("\r\n").split("\t") for line in feed) if tab else csv.reader(feed, strict=True)
    names: list[str] = []
    while True:
        try:
            cells, detail = next(table, None), ""
        except csv.Error as error:
            cells, detail = [], str(error)
        except SourceError as error:
            if taken:
                yield Row(taken[0].number, None, _emptied(taken), taken[0].number, error.reason, error.detail)
            raise
        for line in [line for line in taken if line.problem]:
            taken.remove(line)
            yield Row(line.number, None, line.size, line.number, line.problem)
        if cells is None:
            return
        number = taken[0].number if taken else 0
        size = _emptied(taken)
        if not detail and not any(cells):
            yield Row(number, None, size, number, "blank")
        elif header and not names and not detail:
            names = [name.strip() for name in cells]
            yield Row(number, names, size, number, "header")
        else:
            names = names or [f"#{place}" for place in range(1, len(cells) + 1)]
            if not detail and len(cells) > len(names):
                detail = f"{len(cells)} cells where the header names {len(names)}"
            value = None if detail else dict(zip(names, cells, strict=False))
            yield Row(number, value, size, number, "invalid_row" if detail else "", detail)


def _plain_lines(lines: Iterator[Line], taken: list[Line]) -> Iterator[str]:
    for line in lines:
        taken.append(line)
        if not line.problem:
            yield line.text


def _emptied(lines: list[Line]) -> int:
    size = sum(line.size for line in lines)
    lines.clear()
    return size


def html_rows(chunks: Iterator[str], limit: int) -> Iterator[Row]:
    """The text of one page: its body (or main element) without scripts, forms, navigation, headers and footers."""
    held: list[str] = []
    size, too_long = 0, False
    try:
        for chunk in chunks:
            size += utf8_size(chunk)
            held.append(chunk)
            if size > limit:
                held, too_long = [], True
    except SourceError as error:
        yield Row(1, None, size, 0, error.reason, error.detail)
        raise
    if size:
        yield Row(1, "" if too_long else _page_text("".join(held)), size, 0, "too_long" if too_long else "")


def _page_text(page: str) -> str:
    html = require_library("lxml.html", "HTML")
    parser = html.HTMLParser(encoding="utf-8", huge_tree=True, remove_comments=True, remove_pis=True)
    try:
        tree = html.document_fromstring(page.encode(), parser=parser)
    except html.etree.ParserError:  # nothing but space and comments
        return ""
    for element in list(tree.iter(*_HIDDEN_HTML)):
        if element.getparent() is not None:
            element.drop_tree()
    main = tree.find(".//main")
    body = main if main is not None and len(main.text_content().strip()) > 200 else tree.find("body")
    words: list[str] = []
    if body is not None:
        _collect_words(body, words)
    lines = (" ".join(line.split()) for line in "".join(words).split("\n"))
    return "\n".join(line for line in lines if line)


def _collect_words(body: Any, words: list[str]) -> None:
    """Text in reading order with a newline around every block; a loop, because pages nest deeper than Python calls."""
    from_lxml = require_library("lxml.etree", "HTML")
    for event, element in from_lxml.iterwalk(body, events=("start", "end")):
        if element.tag in _BLOCK_HTML:
            words.append("\n")
        text = element.text if event == "start" else element.tail if element is not body else None
        words.append((text or "").replace("\n", " "))


def parquet_rows(path: Path, choose: Callable[[list[str]], list[str]], most_bytes: int) -> Iterator[Row]:
    """Rows of a parquet file: the fields that `choose` picks from its columns. Bytes are those of the strings taken.

    Raises:
        SourceError: torn; or bomb, when its strings come to more than `most_bytes`.
    """
    parquet = require_library("pyarrow.parquet", "parquet files")
    arrow = require_library("pyarrow", "parquet files")
    number = total = 0
    try:
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            columns = choose(file.schema_arrow.names)
            rows = max(file.metadata.num_rows, 1)
            spread = sum(
                file.metadata.row_group(place).total_byte_size for place in range(file.num_row_groups)
            )
            batch = min(max(2**22 * rows // max(spread, 1), 1), 1024)
            for table in file.iter_batches(batch_size=batch, columns=columns, use_threads=False):
                for record in table.to_pylist():
                    number += 1
                    size = sum(utf8_size(item) for item in record.values() if isinstance(item, str))
                    total += size
                    if total > most_bytes:
                        raise SourceError("bomb", f"its text grows beyond {most_bytes:,} bytes")
                    yield Row(number, record, size, number)
    except (arrow.ArrowException, OSError) as error:
        raise SourceError("torn", str(error).split("\n")[0]) from error
