"""The card of a corpus: what is in it, what was dropped and why, how it is cut into tokens. Reads no files."""

from typing import Any

from glasshouse.card.facts import Facts, Row, part, rows_of
from glasshouse.card.page import Block, Code, Heading, Listing, Paragraph, Table
from glasshouse.card.quantity import count, decimal, duration, number_of, scaled, share, short
from glasshouse.card.reports import state_of

LANGUAGES = (
    "language",
    ">training documents",
    ">text",
    ">share",
    ">tokens",
    ">held-out documents",
    ">bytes per token",
)
RULES = ("rule", ">documents in", ">dropped", ">changed", ">kept", ">text dropped", ">text kept", ">of all")


def mixture(facts: Facts) -> list[Block]:
    """Sources, licences and languages of a corpus, with their shares."""
    blocks: list[Block] = []
    for title, key in (("source", "sources"), ("licence", "licences")):
        known = {str(name): number_of(value) or 0 for name, value in part(facts.corpus, key).items()}
        ordered = sorted(known.items(), key=lambda item: (-item[1], item[0]))
        rows = [(name, count(value), share(value, sum(known.values()))) for name, value in ordered]
        blocks.append(Table((title, ">documents", ">share"), rows))
    languages = sorted(part(facts.corpus, "languages").items())
    whole = sum(number_of(part(sides, "train").get("bytes")) or 0 for _, sides in languages)
    rows = [_language_row(facts, language, sides, whole) for language, sides in languages]
    return [*blocks, Table(LANGUAGES, rows)]


def _language_row(facts: Facts, language: str, sides: Row, whole: float) -> list[str]:
    train, held_out = part(sides, "train"), part(sides, "validation")
    pieces = part(facts.tokenizer, "languages", language, "validation").get("bytes_per_token")
    size = train.get("bytes", 0)
    return [
        language,
        count(train.get("documents", 0)),
        scaled(size, "B"),
        share(size, whole),
        count(train.get("tokens", 0)),
        count(held_out.get("documents", 0)),
        decimal(pieces, 2),
    ]


def corpus_sections(facts: Facts) -> list[Block]:
    """The card of a corpus: what is in it, what was dropped and why, how it is cut into tokens."""
    if not facts.corpus:
        return [*state_of(facts), Paragraph("The corpus is not there."), *_again(facts)]
    return [
        *state_of(facts),
        *_summary(facts),
        Heading("How to use it"),
        Listing(f"glasshouse pretrain --corpus {facts.place} --size tiny --out base", "sh"),
        Heading("What is in it"),
        *mixture(facts),
        *_reading(facts),
        *_waterfall(facts),
        *_tokenizer(facts),
        *_again(facts),
    ]


def _summary(facts: Facts) -> list[Block]:
    train, held_out = (part(facts.corpus, "splits", side) for side in ("train", "validation"))
    languages = ", ".join(facts.languages) or "unknown"
    size, documents, tokens = (
        scaled(train.get("bytes"), "B"),
        count(train.get("documents")),
        count(train.get("tokens")),
    )
    more = count(held_out.get("documents"))
    english = (
        f"Text for pretraining a language model: {size} in {documents} documents ({languages}), cleaned and cut into "
        f"{tokens} tokens; {scaled(held_out.get('bytes'), 'B')} in {more} more documents are held out."
    )
    chinese = (
        f"中文简介：这是用于预训练语言模型的语料（语言：{languages}），训练部分 {size}、{documents} 篇文档、{tokens} 个词元；"
        f"另留出 {more} 篇文档用于验证。"
    )
    return [Paragraph(english), Paragraph(chinese, "", "zh")]


def _reading(facts: Facts) -> list[Block]:
    read = part(facts.waterfall, "read")
    rows = [(name.replace("_", " "), short(value)) for name, value in read.items() if name != "examples"]
    return [Heading("Reading"), Table(("", "counted"), rows)] if rows else []


def _waterfall(facts: Facts) -> list[Block]:
    rules = rows_of(facts.waterfall.get("rules"))
    if not rules:
        return [Heading("Cleaning"), Paragraph("How it was cleaned is not recorded.")]
    whole = facts.waterfall.get("bytes_in")
    blocks: list[Block] = [
        Heading("Cleaning"),
        Paragraph("The rules act one after the other: what one keeps is what the next is given."),
        Table(RULES, [_rule_row(row, whole) for row in rules]),
    ]
    for row in rules:
        examples = [(Code(str(one.get("id"))), str(one.get("text"))) for one in rows_of(row.get("examples"))]
        if examples:
            blocks += [
                Heading(f"Examples: {_words(row.get('rule'))}", 3),
                Table(("document", "|text"), examples),
            ]
    found = [(_words(name), short(value)) for name, value in part(facts.waterfall, "facts").items()]
    if found:
        blocks += [Heading("What was found", 3), Table(("", "documents"), found)]
    stages = [
        (_words(one.get("stage")), count(one.get("documents")), Code(str(one.get("sha256"))))
        for one in rows_of(facts.waterfall.get("stages"))
    ]
    if stages:
        blocks += [
            Heading("Digests of what left each stage", 3),
            Table(("stage", ">documents", "SHA-256"), stages),
        ]
    return blocks


def _rule_row(row: Row, whole: Any) -> list[str]:
    documents = [count(row.get(f"documents_{key}")) for key in ("in", "dropped", "changed", "kept")]
    dropped, kept = row.get("bytes_dropped"), row.get("bytes_kept")
    return [_words(row.get("rule")), *documents, scaled(dropped, "B"), scaled(kept, "B"), share(kept, whole)]


def _words(name: Any) -> str:
    return str(name).replace("_", " ")


def _tokenizer(facts: Facts) -> list[Block]:
    report = facts.tokenizer
    if not report:
        return []
    measured = [*sorted(part(report, "languages").items()), ("all", _by_side(report))]
    rows = [
        (language, *(_bytes_per_token(sides, side) for side in ("train", "validation")))
        for language, sides in measured
    ]
    given = facts.settings.get("tokenizer")
    origin = "It was given, not trained on this text" if given else "It was not trained on the held-out text"
    text = (
        f"Byte-level BPE, vocabulary {count(report.get('vocab_size'))}. {origin}. The figures are UTF-8 bytes of text per "
        "token: more means shorter sequences."
    )
    return [
        Heading("Tokenizer"),
        Paragraph(text),
        Table(("language", ">training text", ">held-out text"), rows),
    ]


def _by_side(report: Row) -> Row:
    return {side: {"bytes_per_token": value} for side, value in part(report, "bytes_per_token").items()}


def _bytes_per_token(sides: Any, side: str) -> str:
    return decimal(part(sides, side).get("bytes_per_token"), 2)


def _again(facts: Facts) -> list[Block]:
    run, digest = facts.run, Code(str(facts.run.get("digest") or "none yet"))
    made = (
        f"Begun {run.get('created', 'at an unknown time')} with glasshouse {run.get('code_version', 'unknown')}, seed "
        f"{run.get('seed', 'not recorded')}; it took {duration(run.get('seconds'))}. Digest of the corpus: "
    )
    return [
        Heading("How it was made"),
        Paragraph((made, digest)),
        Listing(f"glasshouse prepare --config {facts.place}/recipe.yaml --out again", "sh"),
        Listing(facts.recipe, "yaml", "All settings (recipe.yaml)"),
    ]
