"""One file on disk -> guarded chunks of text: decompression, character encoding, lines.

Memory stays flat whatever the file holds: compressed bytes go in by small pieces, text comes out by chunks of about
1 MiB, and the ratio, the total and the decoder's window are capped. Nothing is guessed after the first non-ASCII
chunk has settled the encoding. Knows nothing of documents, formats or licences.
"""

import codecs
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from glasshouse.errors import InputError

CHUNK_BYTES = 2**20
PIECE_BYTES = 2**14  # compressed bytes taken at a time: keeps the measured ratio exact to this much
ZSTD_PIECE_BYTES = 512  # one zstd block of 4 bytes may hold 128 KiB and its reader has no output limit
WINDOW_BYTES = 2**27  # what a decompressor may allocate: xz -9 and zstd --ultra need half of it
BOMB_FLOOR_BYTES = 4 * 2**20  # less than this is harmless at any ratio
COMPRESSIONS = {".gz": "gzip", ".xz": "xz", ".zst": "zstandard"}
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
BINARY_MAGIC = (
    *(
        b"\x89PNG",
        b"\xff\xd8\xff",
        b"GIF8",
        b"%PDF-",
        b"PK\x03\x04",
        b"\x7fELF",
        b"\x1f\x8b",
        b"\xfd7zXZ",
        b"PAR1",
    ),
    *(
        b"\x28\xb5\x2f\xfd",
        b"BZh",
        b"7z\xbc\xaf",
        b"SQLite format",
        b"OggS",
        b"ID3",
        b"RIFF",
        b"\xd0\xcf\x11\xe0",
    ),
)
CONTROL_BYTES = bytes(value for value in range(1, 32) if value not in b"\t\n\v\f\r\x1a\x1b")
_META_CHARSET = re.compile(
    rb"""<(?:meta|\?xml)[^>]{0,200}?(?:charset|encoding)\s*=\s*["']?([\w:-]{2,40})""", re.I
)


class SourceError(Exception):
    """A file that cannot be read on: `reason` is one of torn, bomb, binary, unreadable."""

    def __init__(self, reason: str, detail: str):
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}")


@dataclass
class ByteCounts:
    """Bytes that came out of files (after decompression) and what became of them before any document was cut.

    `bytes_recoded` is what the text gained (or, negative, lost) by becoming UTF-8; U+FFFD put in place of bytes that
    mean nothing counts there too, and in `replaced_characters`.
    """

    bytes_read: int = 0
    bytes_recoded: int = 0
    replaced_characters: int = 0
    dropped_bytes: Counter[str] = field(default_factory=Counter)
    encodings: Counter[str] = field(default_factory=Counter)


class Line(NamedTuple):
    """One line with its newline; `problem` says why it is only a part ("too_long", or a SourceError's reason)."""

    number: int
    text: str
    size: int
    problem: str = ""


def utf8_size(text: str) -> int:
    """Bytes of the text in UTF-8 (lone surrogates as three bytes each)."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def replace_surrogates(text: str) -> tuple[str, int]:
    """The text with pairs of surrogates joined and lone ones replaced by U+FFFD, and how many were replaced."""
    if text.isascii():
        return text, 0
    repaired = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return repaired, repaired.count("\ufffd") - text.count("\ufffd")


def require_library(name: str, use: str) -> Any:
    """Import an optional third-party library, or say in one line how to install it."""
    try:
        return __import__(name, fromlist=["_"])
    except ImportError as error:
        raise InputError(
            f"{name} is needed to read {use}: {error}", "", 'in the project folder, pip install ".[corpus]"'
        ) from None


def read_chunks(path: Path, compression: str, *, ratio: int, limit: int) -> Iterator[bytes]:
    """Yield the bytes of a file, decompressed, by chunks of about 1 MiB.

    Args:
        path: the file.
        compression: "", "gzip", "xz" or "zstandard".
        ratio: a compressed file may grow to at most this many times its size.
        limit: and to at most this many bytes.

    Raises:
        SourceError: torn, bomb or unreadable; everything before the damage has been yielded.
    """
    try:
        with open(path, "rb") as file:
            if not compression:
                while chunk := file.read(CHUNK_BYTES):
                    yield chunk
            else:
                pieces = iter(lambda: file.read(PIECE_BYTES), b"")
                yield from _guarded(pieces, compression, ratio, limit)
    except OSError as error:
        raise SourceError("unreadable", error.strerror or str(error)) from error


def _guarded(pieces: Iterator[bytes], compression: str, ratio: int, limit: int) -> Iterator[bytes]:
    waiting: list[bytes] = []
    held = produced = consumed = 0

    def counted() -> Iterator[bytes]:
        nonlocal consumed
        for piece in pieces:
            consumed += len(piece)
            yield piece

    problem: SourceError | None = None
    try:
        for block in _decompress(counted(), compression):
            produced += len(block)
            if produced > max(ratio * consumed, BOMB_FLOOR_BYTES):
                raise SourceError("bomb", f"grows more than {ratio} times, the limit (compression_ratio)")
            if produced > limit:
                raise SourceError("bomb", f"grows beyond {limit:,} bytes, the limit (file_bytes)")
            waiting.append(block)
            held += len(block)
            if held >= CHUNK_BYTES:
                yield b"".join(waiting)
                waiting, held = [], 0
    except (zlib.error, lzma.LZMAError, EOFError, ValueError) as error:
        bomb = "limit" in str(error) or "too much memory" in str(error)
        problem = SourceError("bomb" if bomb else "torn", str(error))
    except SourceError as error:
        problem = error
    if waiting:
        yield b"".join(waiting)
    if problem:
        raise problem


def _decompress(pieces: Iterator[bytes], compression: str) -> Iterator[bytes]:
    """Yield blocks of about 1 MiB at most (16 MiB for zstd); several members one after the other are one file."""
    make, inflate = _decompression(compression)
    current: Any = None
    for piece in pieces:
        rest = piece
        while rest:
            if current is None:
                rest = rest.lstrip(b"\0")  # padding between members
                if not rest:
                    break
                current = make()
            member = current
            yield from inflate(member, rest)
            rest = b""
            if member.eof:
                rest, current = member.unused_data, None
    if current is not None:
        raise EOFError("the file ends too early")


def _decompression(compression: str) -> tuple[Callable[[], Any], Callable[[Any, bytes], Iterator[bytes]]]:
    if compression == "gzip":
        return lambda: zlib.decompressobj(31), _inflate_gzip
    if compression == "xz":
        return lambda: lzma.LZMADecompressor(memlimit=WINDOW_BYTES), _inflate_xz
    zstandard = require_library("zstandard", ".zst files")

    def make() -> Any:
        return _Zstandard(
            zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES).decompressobj(), zstandard.ZstdError
        )

    return make, _inflate_zstandard


def _inflate_gzip(stream: Any, data: bytes) -> Iterator[bytes]:
    while not stream.eof:
        block = stream.decompress(data, CHUNK_BYTES)
        yield block
        data = stream.unconsumed_tail
        if not data and len(block) < CHUNK_BYTES:
            return


def _inflate_xz(stream: Any, data: bytes) -> Iterator[bytes]:
    yield stream.decompress(data, CHUNK_BYTES)
    while not stream.eof and not stream.needs_input:
        yield stream.decompress(b"", CHUNK_BYTES)


class _Zstandard:
    """zstandard's reader with the two things it lacks: errors of a built-in type, and unused bytes beyond one call."""

    def __init__(self, stream: Any, error: type[Exception]):
        self.stream, self.error = stream, error
        self.eof, self.unused_data = False, b""

    def decompress(self, data: bytes, /) -> bytes:
        try:
            block = self.stream.decompress(data)
        except self.error as error:
            raise ValueError(str(error)) from error
        self.eof, self.unused_data = self.stream.eof, self.stream.unused_data
        return block


def _inflate_zstandard(stream: _Zstandard, data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), ZSTD_PIECE_BYTES):
        yield stream.decompress(data[start : start + ZSTD_PIECE_BYTES])
        if stream.eof:
            stream.unused_data += data[start + ZSTD_PIECE_BYTES :]
            return


def is_binary(head: bytes) -> bool:
    """Whether the first bytes of a file without a byte order mark are no text in any encoding read here."""
    if head.startswith(BINARY_MAGIC):
        return True
    head = head[: 2**16]
    nul = head.count(0)
    control = len(head) - len(head.translate(None, CONTROL_BYTES))
    return nul * 10 > len(head) or control * 20 > len(head)


def guess_encoding(sample: bytes, declared: str = "") -> str:
    """The encoding of a sample that holds non-ASCII bytes: utf-8, gb18030 or cp1252 (or the one an HTML file declares).

    UTF-8 when at least nine in ten of its non-ASCII bytes are parts of valid sequences; then the declared encoding if
    Python knows it; then gb18030 when half of the pairs that its decoder would see lie in GB 2312's punctuation and
    first-level characters (99 % of running Chinese); windows-1252 otherwise. No other encoding is ever guessed.
    """
    high = len(sample) - len(sample.translate(None, bytes(range(128, 256))))
    text = codecs.getincrementaldecoder("utf-8")("replace").decode(
        sample
    )  # the sample may end inside a character
    invalid = text.count("\ufffd") - sample.count(b"\xef\xbf\xbd")
    if invalid * 10 <= high:
        return "utf-8"
    if declared:
        try:
            return codecs.lookup(declared).name
        except LookupError:
            pass
    pairs = re.findall(rb"[\x80-\xff][\x00-\xff]", sample)
    common = sum(
        1 for pair in pairs if (0xA1 <= pair[0] <= 0xA3 or 0xB0 <= pair[0] <= 0xD7) and pair[1] >= 0xA1
    )
    return "gb18030" if common * 2 >= len(pairs) else "cp1252"


class TextStream:
    """The text of one file, chunk by chunk: one encoding, no byte order mark, no NUL; all of it counted.

    Args:
        chunks: the bytes.
        counts: where bytes and replacements are added.
        encoding: the encoding to use; empty to find it out.
        html: whether the file may declare its encoding in its first bytes.
    """

    def __init__(self, chunks: Iterator[bytes], counts: ByteCounts, encoding: str = "", html: bool = False):
        self.source, self.counts, self.encoding, self.html = chunks, counts, encoding, html
        self.replaced = 0

    def chunks(self) -> Iterator[str]:
        """Yield the text.

        Raises:
            SourceError: from the bytes, or "binary" when they are no text.
        """
        decoder: Any = None
        declared, tail, first = "", b"", True
        problem: SourceError | None = None
        while chunk := self._next_chunk():
            if isinstance(chunk, SourceError):
                problem = chunk
                break
            if first:
                chunk, declared, first = *self._open(chunk), False
            if decoder is None and (self.encoding or not chunk.isascii()):
                self.encoding = self.encoding or guess_encoding(chunk, declared)
                decoder = codecs.getincrementaldecoder(self.encoding)("replace")
            text = decoder.decode(chunk) if decoder else chunk.decode("ascii")
            if "\ufffd" in text:
                self._count_replaced(text, tail + chunk)
            tail = chunk[-2:]
            yield from self._cleaned(text, len(chunk))
        if decoder and (text := decoder.decode(b"", True)):
            self._count_replaced(text, b"")
            yield from self._cleaned(text, 0)
        self.counts.encodings[self.encoding or "ascii"] += not first
        if problem:
            raise problem

    def _next_chunk(self) -> bytes | SourceError:
        """The next bytes, or what stops them: text that waits for its last byte must still come out first."""
        try:
            chunk = next(self.source, b"")
        except SourceError as error:
            return error
        self.counts.bytes_read += len(chunk)
        return chunk

    def _open(self, chunk: bytes) -> tuple[bytes, str]:
        """Take the mark off the first chunk; returns the rest and the encoding the file declares."""
        for mark, encoding in BYTE_ORDER_MARKS:
            if chunk.startswith(mark) and self.encoding in ("", encoding):
                self.encoding = encoding
                self.counts.dropped_bytes["byte_order_mark"] += len(mark)
                return chunk[len(mark) :], ""
        if not self.encoding.startswith(("utf-16", "utf-32")) and is_binary(chunk):
            self.counts.dropped_bytes["binary"] += len(chunk)
            raise SourceError("binary", "its first bytes are no text (UTF-16 needs a byte order mark)")
        found = _META_CHARSET.search(chunk[:4096]) if self.html else None
        return chunk, found[1].decode("ascii") if found else ""

    def _count_replaced(self, text: str, chunk: bytes) -> None:
        genuine = chunk.count(b"\xef\xbf\xbd") if self.encoding == "utf-8" else 0
        self.replaced += text.count("\ufffd") - genuine
        self.counts.replaced_characters += text.count("\ufffd") - genuine

    def _cleaned(self, text: str, consumed: int) -> Iterator[str]:
        nul = text.count("\0")
        if nul:
            text = text.replace("\0", "")
            self.counts.dropped_bytes["nul"] += nul
        self.counts.bytes_recoded += utf8_size(text) + nul - consumed
        if text:
            yield text


def read_lines(chunks: Iterator[str], limit: int) -> Iterator[Line]:
    """Cut text at "\\n" and nowhere else; a line over `limit` bytes comes in parts marked "too_long".

    Raises:
        SourceError: as the chunks raise it, after the unfinished line has been yielded with its reason.
    """
    number, pending, size, too_long = 1, "", 0, ""
    try:
        for chunk in chunks:
            *whole, last = chunk.split("\n")
            for part in whole:
                text = pending + part + "\n"
                size = utf8_size(text)
                yield Line(number, text, size, "too_long" if size > limit else too_long)
                number, pending, size, too_long = number + 1, "", 0, ""
            pending, size = pending + last, size + utf8_size(last)
            if size > limit:
                too_long = "too_long"
                cut = pending.rfind(" ", len(pending) - 1000) + 1 or len(pending)
                yield Line(number, pending[:cut], utf8_size(pending[:cut]), too_long)
                pending = pending[cut:]
                size = utf8_size(pending)
    except SourceError as error:
        if pending:
            yield Line(number, pending, utf8_size(pending), error.reason)
        raise
    if pending:
        yield Line(number, pending, utf8_size(pending), too_long)
