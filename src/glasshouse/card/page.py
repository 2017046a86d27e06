"""What a card looks like: a list of blocks, once as Markdown and once as one static HTML page; and how numbers look.

Every string in a block is data and is escaped here, so that no document, name or sample can break the card or run
anything. The page loads nothing and needs no script. Knows nothing of runs and models.
"""

import html
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d5dae0; --paper: #fff; --tint: #f4f6f8;
  --accent: #0b63b5; --other: #a8560a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e6ea; --soft: #9ba4ae; --line: #373e47; --paper: #15181c;
  --tint: #1e2329; --accent: #74b4f5; --other: #e8a566; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.6 system-ui, -apple-system, "Segoe UI",
  Roboto, "Noto Sans", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", sans-serif; overflow-wrap: anywhere; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .6rem; padding-top: 1.1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
p, ul { margin: .6rem 0; max-width: 46rem; }
.soft { color: var(--soft); font-size: .92rem; }
.warning { border-left: 4px solid var(--other); background: var(--tint); padding: .6rem .9rem; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .92rem; min-width: 50%; }
th, td { padding: .35rem .9rem .35rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; overflow-wrap: normal; vertical-align: bottom; }
td { overflow-wrap: break-word; min-width: 5rem; } td:first-child:not(.number) { min-width: 7.5rem; }
th.number, td.number { text-align: right; font-variant-numeric: tabular-nums; } td.number { white-space: nowrap; }
td.text { white-space: pre-wrap; min-width: 14rem; }
code, pre { font: .88em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
code { background: var(--tint); padding: .1em .3em; border-radius: 3px; }
pre { background: var(--tint); padding: .8rem 1rem; overflow-x: auto; border-radius: 6px; overflow-wrap: normal; }
pre code { padding: 0; background: none; font-size: 1em; }
summary { cursor: pointer; color: var(--accent); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1.4rem 2rem;
  margin: 1.2rem 0; }
figure { margin: 0; break-inside: avoid; }
figcaption { font-size: .92rem; font-weight: 600; margin-bottom: .2rem; }
figcaption small { display: block; color: var(--soft); font-weight: 400; }
figure svg { display: block; width: 100%; height: auto; }
@media (max-width: 40rem) { main { padding: 1.2rem 1rem 3rem; } h1 { font-size: 1.5rem; } body { font-size: 15px; } }
@media print { :root { --ink: #000; --soft: #444; --line: #bbb; --paper: #fff; --tint: #f5f5f5; --accent: #0b63b5;
  --other: #a8560a; } main { max-width: none; padding: 0; } body { font-size: 10pt; } .scroll, pre { overflow: visible; }
  pre { white-space: pre-wrap; } h2, h3 { break-after: avoid; } tr { break-inside: avoid; }
  .figures { grid-template-columns: 1fr 1fr; } }
""".strip()
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Code:
    """A few words set as code inside a sentence or a cell."""

    text: str


Pieces = str | Code | tuple[str | Code, ...]
"""Text of a sentence or a cell: plain, code, or some of both."""


@dataclass(frozen=True)
class Heading:
    """A heading of level 2 or 3."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """A paragraph; `kind` is "", "soft" (an aside) or "warning"; `language` where it is not the card's."""

    text: Pieces
    kind: str = ""
    language: str = ""


@dataclass(frozen=True)
class Bullets:
    """A list."""

    items: Sequence[Pieces]


@dataclass(frozen=True)
class Table:
    """A table; a header that begins with ">" is of a column of numbers, with "|" of a column of running text."""

    headers: Sequence[str]
    rows: Sequence[Sequence[Pieces]]


@dataclass(frozen=True)
class Listing:
    """Lines of code or data, shown as they are; with a title they are folded away on the page."""

    text: str
    language: str = ""
    title: str = ""


@dataclass(frozen=True)
class Figures:
    """Plots, on the page only: (title, one line under it, SVG drawn by this package)."""

    items: Sequence[tuple[str, str, str]]


Block = Heading | Paragraph | Bullets | Table | Listing | Figures


# ---------------------------------------------------------------------------------------------------------- escaping


def clean(text: Any) -> str:
    """Text that can be written and read: what is no character (control characters, lone surrogates) and what turns the
    direction of what follows is shown as U+FFFD."""
    return "".join("\ufffd" if _is_hidden(character) else character for character in str(text))


def _is_hidden(character: str) -> bool:
    if character in "\n\t":
        return False
    return (
        unicodedata.category(character) in ("Cc", "Cs")
        or character in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    )


def escape_markdown(text: Any) -> str:
    """One line of Markdown that shows the text and does nothing else: no HTML, no link, no table border."""
    line = re.sub(r"\s*\n\s*", "\n", clean(text).strip())
    line = re.sub(r"([\\`*_\[\]|~$#@!])", r"\\\1", line)
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"(?i)(https?|ftp)://", r"\1\\://", line)
    line = re.sub(r"(?i)\bwww\.", r"www\\.", line)
    line = re.sub(
        r"^([-+])(?=\s)|^(\d+)(?=[.)]\s)|^(=)",
        lambda found: f"{found[2]}\\" if found[2] else f"\\{found[0]}",
        line,
    )
    return line.replace("\n", "<br>")


def escape_html(text: Any) -> str:
    """Text for an element or an attribute."""
    return html.escape(clean(text), quote=True)


def _fence(text: str, least: int) -> str:
    return "`" * max(least, 1 + max((len(run) for run in re.findall("`+", text)), default=0))


def _markdown_piece(piece: str | Code) -> str:
    if isinstance(piece, str):
        return escape_markdown(piece) if piece == piece.strip() else _keep_spaces(piece)
    text = " ".join(clean(piece.text).split()).replace("|", "\\|")
    fence = _fence(text, 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}" if text else ""


def _keep_spaces(piece: str) -> str:
    left, right = piece[: len(piece) - len(piece.lstrip())], piece[len(piece.rstrip()) :]
    return (" " if left else "") + escape_markdown(piece) + (" " if right else "")


def _html_piece(piece: str | Code) -> str:
    return f"<code>{escape_html(piece.text)}</code>" if isinstance(piece, Code) else escape_html(piece)


def _pieces(text: Pieces) -> tuple[str | Code, ...]:
    return text if isinstance(text, tuple) else (text,)


def _markdown(text: Pieces) -> str:
    return "".join(_markdown_piece(piece) for piece in _pieces(text))


def _html(text: Pieces) -> str:
    return "".join(_html_piece(piece) for piece in _pieces(text))


# ---------------------------------------------------------------------------------------------------------- Markdown


def render_markdown(title: str, blocks: Sequence[Block]) -> str:
    """The blocks as Markdown (GitHub's and Hugging Face's dialect), without figures."""
    parts = [f"# {escape_markdown(title)}", *(_markdown_block(block) for block in blocks)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_block(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {escape_markdown(text)}"
        case Paragraph(text, kind):
            return ("> **Note.** " if kind == "warning" else "") + _markdown(text)
        case Bullets(items):
            return "\n".join(f"- {_markdown(item)}" for item in items)
        case Table(headers, rows):
            line = "|" + "|".join("---:" if header.startswith(">") else "---" for header in headers) + "|"
            cells = [
                [escape_markdown(header.lstrip(">|")) for header in headers],
                *([_markdown(cell) for cell in row] for row in rows),
            ]
            written = ["| " + " | ".join(row) + " |" for row in cells]
            return "\n".join([written[0], line, *written[1:]])
        case Listing(text, language, title):
            fence = _fence(clean(text), 3)
            return (
                f"{escape_markdown(title)}:\n\n" if title else ""
            ) + f"{fence}{language}\n{clean(text).rstrip()}\n{fence}"
        case Figures(items):
            return "Plots: see `report.html` beside this file." if items else ""


# -------------------------------------------------------------------------------------------------------------- HTML


def render_html(title: str, blocks: Sequence[Block]) -> str:
    """The blocks as one page that loads nothing."""
    body = "\n".join([f"<h1>{escape_html(title)}</h1>", *(_html_block(block) for block in blocks)])
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape_html(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n<style>\n{STYLE}\n</style>\n</head>\n'
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _html_block(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{escape_html(text)}</h{level}>"
        case Paragraph(text, kind, language):
            attributes = (f' class="{kind}"' if kind else "") + (f' lang="{language}"' if language else "")
            return f"<p{attributes}>{_html(text)}</p>"
        case Bullets(items):
            return "<ul>\n" + "\n".join(f"<li>{_html(item)}</li>" for item in items) + "\n</ul>"
        case Table():
            return _html_table(block)
        case Listing(text, _, title):
            listing = f"<pre><code>{escape_html(text.rstrip())}</code></pre>"
            return (
                f"<details><summary>{escape_html(title)}</summary>\n{listing}\n</details>"
                if title
                else listing
            )
        case Figures(items):
            drawn = [f"<figure><figcaption>{escape_html(title)}<small>{escape_html(note)}</small></figcaption>{svg}</figure>"
                     for title, note, svg in items]  # fmt: skip
            return '<div class="figures">\n' + "\n".join(drawn) + "\n</div>" if drawn else ""


def _html_table(table: Table) -> str:
    classes = [{">": ' class="number"', "|": ' class="text"'}.get(header[:1], "") for header in table.headers]
    heads = "".join(f"<th{kind if 'number' in kind else ''}>{escape_html(header.lstrip('>|'))}</th>"
                    for header, kind in zip(table.headers, classes, strict=True))  # fmt: skip
    rows = [
        "<tr>"
        + "".join(f"<td{kind}>{_html(cell)}</td>" for cell, kind in zip(row, classes, strict=True))
        + "</tr>"
        for row in table.rows
    ]
    return (
        f'<div class="scroll"><table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n'
        + "\n".join(rows)
        + "\n</tbody></table></div>"
    )
