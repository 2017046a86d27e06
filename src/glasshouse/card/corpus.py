"""The card of a corpus: what is in it, what was dropped and why, how it is cut into tokens. Reads no files."""

from glasshouse.card.facts import Facts, part, rows_of
from glasshouse.card.page import Block, Code, Heading, Listing, Paragraph, Table
from glasshouse.card.quantity import count, decimal, duration, number_of, scaled, share, short
from glasshouse.card.reports import state_of


def mixture(facts: Facts) -> list[Block]:
    """Sources, licences and languages of a corpus, with their shares."""
    blocks: list[Block] = []
    for title, key in (("source", "sources"), ("licence", "licences")):
        counts = {
            str(name): value
            for name, value in part(facts.corpus, key).items()
            if number_of(value) is not None
        }
        whole = sum(counts.values())
        rows = [
            (name, count(value), share(value, whole))
            for name, value in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        ]
        blocks.append(Table((title, ">documents", ">share"), rows))
    rows = []
    whole = sum(
        number_of(part(sides, "train").get("bytes")) or 0
        for sides in part(facts.corpus, "languages").values()
    )
    for language, sides in sorted(part(facts.corpus, "languages").items()):
        train, held_out = part(sides, "train"), part(sides, "validation")
        pieces = part(facts.tokenizer, "languages", language, "validation").get("bytes_per_token")
        rows.append((language, count(train.get("documents", 0)), scaled(train.get("bytes", 0), "B"), share(train.get("bytes", 0), whole),
                     count(train.get("tokens", 0)), count(held_out.get("documents", 0)), decimal(pieces, 2)))  # fmt: skip
    return [
        *blocks,
        Table(
            (
                "language",
                ">training documents",
                ">text",
                ">share",
                ">tokens",
                ">held-out documents",
                ">bytes per token",
            ),
            rows,
        ),
    ]


def corpus_sections(facts: Facts) -> list[Block]:
    """The card of a corpus: what is in it, what was dropped and why, how it is cut into tokens."""
    train, held_out = (part(facts.corpus, "splits", side) for side in ("train", "validation"))
    blocks: list[Block] = [*state_of(facts)]
    if not facts.corpus:
        return [*blocks, Paragraph("The corpus is not there yet."), *_again(facts)]
    languages = ", ".join(facts.languages) or "unknown"
    blocks += [
        Paragraph(f"Text for pretraining a language model: {scaled(train.get('bytes'), 'B')} in {count(train.get('documents'))} documents "
                  f"({languages}), cleaned and cut into {count(train.get('tokens'))} tokens; {scaled(held_out.get('bytes'), 'B')} in "
                  f"{count(held_out.get('documents'))} more documents are held out."),
        Paragraph(f"中文简介:这是用于预训练语言模型的语料(语言:{languages}),训练部分 {scaled(train.get('bytes'), 'B')}、{count(train.get('documents'))} 篇文档、"
                  f"{count(train.get('tokens'))} 个词元;另留出 {count(held_out.get('documents'))} 篇文档用于验证。", "", "zh"),
        Heading("How to use it"), Listing(f"glasshouse pretrain --corpus {facts.place} --size tiny --out base", "sh"),
        Heading("What is in it"), *mixture(facts), *_reading(facts), *_waterfall(facts), *_tokenizer(facts), *_again(facts),
    ]  # fmt: skip
    return blocks


def _reading(facts: Facts) -> list[Block]:
    read = part(facts.waterfall, "read")
    if not read:
        return []
    rows = [(name.replace("_", " "), short(value)) for name, value in read.items() if name != "examples"]
    return [Heading("Reading"), Table(("", "counted"), rows)]


def _waterfall(facts: Facts) -> list[Block]:
    rules = rows_of(facts.waterfall.get("rules"))
    if not rules:
        return [Heading("Cleaning"), Paragraph("How it was cleaned is not recorded.")]
    rows = [
        (str(row.get("rule")).replace("_", " "), *(count(row.get(f"documents_{key}")) for key in ("in", "dropped", "changed", "kept")),
         scaled(row.get("bytes_dropped"), "B"), scaled(row.get("bytes_kept"), "B"), share(row.get("bytes_kept"), facts.waterfall.get("bytes_in")))
        for row in rules
    ]  # fmt: skip
    blocks: list[Block] = [
        Heading("Cleaning"),
        Paragraph("The rules act one after the other: what one keeps is what the next is given."),
        Table(
            (
                "rule",
                ">documents in",
                ">dropped",
                ">changed",
                ">kept",
                ">text dropped",
                ">text kept",
                ">of all",
            ),
            rows,
        ),
    ]
    for row in rules:
        examples = rows_of(row.get("examples"))
        if examples:
            blocks += [Heading(f"Examples: {str(row.get('rule')).replace('_', ' ')}", 3),
                       Table(("document", "|text"), [(Code(str(one.get("id"))), str(one.get("text"))) for one in examples])]  # fmt: skip
    stages = [
        (str(one.get("stage")).replace("_", " "), count(one.get("documents")), Code(str(one.get("sha256"))))
        for one in rows_of(facts.waterfall.get("stages"))
    ]
    found = [
        (f"{name.replace('_', ' ')}", short(value)) for name, value in part(facts.waterfall, "facts").items()
    ]
    return [*blocks, *([Heading("What was found", 3), Table(("", "documents"), found)] if found else []),
            *([Heading("Digests of what left each stage", 3), Table(("stage", ">documents", "SHA-256"), stages)] if stages else [])]  # fmt: skip


def _tokenizer(facts: Facts) -> list[Block]:
    report = facts.tokenizer
    if not report:
        return []
    rows = [
        (
            language,
            *(decimal(part(sides, side).get("bytes_per_token"), 2) for side in ("train", "validation")),
        )
        for language, sides in [*sorted(part(report, "languages").items())]
    ]
    overall = part(report, "bytes_per_token")
    rows.append(("all", decimal(overall.get("train"), 2), decimal(overall.get("validation"), 2)))
    return [
        Heading("Tokenizer"),
        Paragraph(f"Byte-level BPE, vocabulary {count(report.get('vocab_size'))}. UTF-8 bytes of text per token (more is shorter); the "
                  "tokenizer was not trained on the held-out text."),
        Table(("language", ">training text", ">held-out text"), rows),
    ]  # fmt: skip


def _again(facts: Facts) -> list[Block]:
    run = facts.run
    made = f"Made {run.get('created', 'at an unknown time')} with glasshouse {run.get('code_version', 'unknown')}, seed {run.get('seed', 'not recorded')}, in {duration(run.get('seconds'))}."
    return [
        Heading("How it was made"), Paragraph((made, " Digest of the corpus: ", Code(str(run.get("digest") or "none yet")))),
        Listing(f"glasshouse prepare --config {facts.place}/recipe.yaml --out again", "sh"),
        Listing(facts.recipe, "yaml", "All settings (recipe.yaml)"),
    ]  # fmt: skip
