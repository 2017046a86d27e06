"""What the card of a model says: sections made of the facts of one run. Reads no files and knows no markup.

A figure is printed with its unit, its interval and how it was found. What no file holds is "not measured", and why.
"""

import re

from glasshouse.card.facts import Facts, Row, part, rows_of, spread, tokens_seen
from glasshouse.card.kind import kind_of
from glasshouse.card.page import Block, Bullets, Code, Heading, Listing, Paragraph, Table
from glasshouse.card.quantity import count, decimal, duration, energy, number_of, scaled
from glasshouse.card.reports import state_of
from glasshouse.card.training import cost, course, data, making

MOST_SAMPLES = 12
UNMEASURED = (
    ("opacity: why it writes what it writes", "no attribution or probing has been run on these weights"),
    (
        "bias: whom it treats how",
        "no bias test has been run; take the biases of the training text as present",
    ),
    ("leakage: training text given away", "no test of memorization or membership has been run"),
    (
        "manipulation: what a hostile prompt can do",
        "no attack has been run; it has had no training to refuse anything",
    ),
)
WARNINGS = (
    "Do not use it where a wrong or offensive sentence does harm. Nothing here holds for text unlike the held-out text.",
)


def model_sections(facts: Facts) -> list[Block]:
    """The card of a model."""
    return [
        *state_of(facts), *_summary(facts), *_use(facts), *_results(facts), *course(facts), *_samples(facts), *data(facts),
        *making(facts), *cost(facts), *limits(facts, (kind_of(facts).warning, *WARNINGS)),
    ]  # fmt: skip


def _summary(facts: Facts) -> list[Block]:
    run, shape, train = facts.run, facts.shape, part(facts.corpus, "splits", "train")
    weights = number_of(run.get("parameters", part(run, "predicted").get("parameters")))
    size = "an unknown number of" if weights is None else count(weights)
    languages = ", ".join(facts.languages)
    text = f"{scaled(train.get('bytes'), 'B')} of text" if train else "text"
    text += f" ({languages})" if languages else ""
    noun, origin, does = kind_of(facts).english
    shape = shape or part(run, "model_shape")
    layers = shape.get("num_layers", shape.get("num_decoder_layers"))
    known = f" ({count(layers)} layers, width {count(shape.get('embedding_dim'))})" if shape else ""
    on = f" on {text}" if train and run.get("stage") == "pretrain" else ""
    english = f"{noun} with {size} weights{known}, {origin}{on}. {does} {_headline(facts)}"
    return [Paragraph(english), Paragraph(_chinese(facts, size, languages), "", "zh")]


def _headline(facts: Facts) -> str:
    report = facts.evaluation
    if report:
        found, baseline = (decimal(part(report, key).get("value")) for key in ("bits_per_byte", "baseline"))
        verdict = part(report, "difference").get("verdict", "not compared")
        return f"It needs {found} bits per byte of text it has not seen; a 5-gram model needs {baseline} ({verdict})."
    if facts.best:
        best = decimal(facts.best.get("validation_bits_per_byte"))
        return f"Its best validation in training is {best} bits per byte; it has not been evaluated yet."
    return "How well it predicts text is not measured yet."


def _chinese(facts: Facts, size: str, languages: str) -> str:
    train = part(facts.corpus, "splits", "train")
    is_a, does = kind_of(facts).chinese
    text = f"中文简介：{is_a}，参数量 {size}"
    text += f"，训练文本 {scaled(train.get('bytes'), 'B')}" if train else ""
    text += f"（语言：{languages}）。" if languages else "。"
    if facts.evaluation:
        found, baseline = (
            decimal(part(facts.evaluation, key).get("value")) for key in ("bits_per_byte", "baseline")
        )
        text += f"对未见过的文本，每字节需要 {found} 比特；5-gram 基线需要 {baseline} 比特（越低越好）。"
    else:
        text += "尚未评测。"
    text += "" if facts.is_finished else "训练尚未完成。"
    return f"{text}{does}偏见、训练文本泄露与恶意提示均未测量。"


def _use(facts: Facts) -> list[Block]:
    prompt = str(facts.settings.get("sample_prompt") or "")
    if not re.fullmatch(r"[\w ,.:;?-]+", prompt, re.ASCII):  # what needs no quoting in a shell or in Python
        prompt = "Once upon a time"
    kind = kind_of(facts)
    return [
        Heading("How to use it"),
        Paragraph(("From the folder that holds ", Code(f"{facts.place}/"), ":")),
        Listing(kind.command.format(place=facts.place, prompt=prompt), "sh"),
        Paragraph("Or with transformers, without Glasshouse:"),
        Listing(kind.program.format(folder=f"{facts.place}/model", prompt=prompt), "python"),
    ]


def interval(found: Row, digits: int = 3) -> str:
    """The two ends of an interval."""
    low, high = number_of(found.get("low")), number_of(found.get("high"))
    return "too little text" if low is None or high is None else f"{low:.{digits}f} to {high:.{digits}f}"


def _results(facts: Facts) -> list[Block]:
    report, head = facts.evaluation, Heading("How well it predicts text")
    if not report:
        command = Code(kind_of(facts).measure.format(place=facts.place))
        return [
            head,
            Paragraph(("Bits per byte on held-out text: not measured yet. Measure them with ", command, ".")),
        ]
    stale = "These figures were measured on other weights than the run holds now. Evaluate it again."
    return [
        head,
        *([Paragraph(stale, "warning")] if report.get("digest") != facts.run.get("digest") else []),
        Paragraph(
            "Bits per byte: how many bits the model needs, on average, to know the next byte of text. Lower is better; "
            "8 is knowing nothing."
        ),
        _scores(report),
        *_circumstances(report),
        *_groups("Per language", rows_of(report.get("languages"))),
        *_groups("Per source", rows_of(report.get("sources"))),
    ]


def _scores(report: Row) -> Table:
    baseline, difference = part(report, "baseline"), part(report, "difference")
    named = {
        "this model, held-out text": part(report, "bits_per_byte"),
        f"{baseline.get('name', 'baseline')}, the same text": baseline,
        f"difference, paired: {difference.get('verdict', 'no verdict')}": difference,
        "this model, a sample of its training text": part(report, "train"),
    }
    rows = [(name, decimal(found.get("value")), interval(found)) for name, found in named.items()]
    return Table(("", ">bits per byte", ">95 % interval"), rows)


def _circumstances(report: Row) -> list[Block]:
    """How much text, how measured, on what, of which weights."""
    held_out, paired = part(report, "held_out"), part(report, "difference").get("method", "not recorded")
    method = (
        f"n = {count(held_out.get('documents'))} held-out documents, {scaled(held_out.get('bytes'), 'B')}, "
        f"{count(held_out.get('tokens'))} tokens. {report.get('method', 'Method not recorded')}. Difference: {paired}. "
        f"Measured on {report.get('device', 'an unknown device')}, seed {report.get('seed', 'unknown')}."
    )
    weights, text = (Code(str(value)[:16]) for value in (report.get("digest"), held_out.get("digest")))
    command = Code(str(report.get("command", "not recorded")))
    named = ("Weights ", weights, ", held-out text ", text, ", command ", command)
    return [Paragraph(method, "soft"), Paragraph(named, "soft")]


def _groups(title: str, groups: list[Row]) -> list[Block]:
    if len(groups) < 2:
        return []  # it would say again what the table above says
    headers = ("", ">documents", ">text", ">bits per byte", ">95 % interval", ">5-gram")
    return [Heading(title, 3), Table(headers, [_group_row(row) for row in groups])]


def _group_row(row: Row) -> list[str]:
    size = [str(row.get("name")), count(row.get("documents")), scaled(row.get("bytes"), "B")]
    return [*size, decimal(row.get("value")), interval(row), decimal(row.get("baseline"))]


def _samples(facts: Facts) -> list[Block]:
    head = Heading("Samples")
    rows = [row for row in facts.validations if isinstance(row.get("sample"), str)]
    if not rows:
        return [
            head,
            Paragraph(("None were drawn in training; ", Code("--sample_prompt"), " asks for them.")),
        ]
    prompt, shown = Code(str(facts.settings.get("sample_prompt", ""))), spread(rows, MOST_SAMPLES)
    note = f"; {len(shown)} of {len(rows)}, evenly spaced" if len(shown) < len(rows) else ""
    remark = f" as it learned: the first answer each time, as it came{note}."
    table = [
        (
            count(row["step"]),
            decimal(row.get("validation_bits_per_byte")),
            row["sample"].strip() or "(nothing)",
        )
        for row in shown
    ]
    return [
        head,
        Paragraph(("What it wrote after ", prompt, remark)),
        Table((">step", ">validation bits/byte", "|text"), table),
    ]


def limits(facts: Facts, warnings: tuple[str, ...]) -> list[Block]:
    """What was measured of each known limit, and what was not."""
    run, train = facts.run, number_of(part(facts.corpus, "splits", "train").get("tokens"))
    spent = [scaled(run.get("flops"), "FLOP"), duration(run.get("seconds")), scaled(run.get("memory"), "B")]
    spent += [f"{energy(run.get('energy'))}; predictions and methods are above"]
    seen = tokens_seen(facts)
    passes = f"{seen / train:.1f} passes over {train:,.0f} training tokens" if seen and train else ""
    passes = passes or "passes over the corpus not measured: the corpus is not at the recorded place"
    unfinished = "not measured yet: the run is not finished"
    rows: list[tuple[str, str]] = [
        ("cost", ", ".join(spent) if facts.is_finished else unfinished),
        ("overfitting", _overfitting(facts)),
        ("dependence on data", f"{passes}; what more or other text would change is not measured yet"),
        *((name, f"not measured yet: {why}") for name, why in UNMEASURED),
    ]
    return [Heading("Limits"), Table(("limit", "measured"), rows), Bullets(warnings)]


def _overfitting(facts: Facts) -> str:
    found, parts = part(facts.evaluation, "train"), []
    if found:
        ends = f"{decimal(found.get('gap_low'))} to {decimal(found.get('gap_high'))}"
        parts.append(f"held-out minus training text {decimal(found.get('gap'))} bits per byte ({ends})")
    if facts.best:
        last, best = (decimal(row.get("gap")) for row in (facts.validations[-1], facts.best))
        parts.append(
            f"while training, validation minus smoothed training loss {last} nats per token at the last validation, "
            f"{best} at the best, which was at step {count(facts.best['step'])} of {facts.done:,}"
        )
    return "; ".join(parts) or "not measured yet: no validation was made"
