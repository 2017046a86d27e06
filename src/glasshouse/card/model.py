"""What the card of a model says: sections made of the facts of one run. Reads no files and knows no markup.

A figure is printed with its unit, its interval and how it was found. What no file holds is "not measured", and why.
"""

from glasshouse.card.facts import Facts, Row, part, rows_of, spread, tokens_seen
from glasshouse.card.page import Block, Bullets, Code, Heading, Listing, Paragraph, Pieces, Table
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


def model_sections(facts: Facts) -> list[Block]:
    """The card of a model."""
    return [
        *state_of(facts), *_summary(facts), *_use(facts), *_results(facts), *course(facts), *_samples(facts), *data(facts),
        *making(facts), *cost(facts), *_limits(facts),
    ]  # fmt: skip


def _summary(facts: Facts) -> list[Block]:
    run, shape = facts.run, facts.shape
    weights = run.get("parameters", part(run, "predicted").get("parameters"))
    size = f"{number_of(weights) or 0:,.0f}" if number_of(weights) else "an unknown number of"
    languages = ", ".join(facts.languages)
    train = part(facts.corpus, "splits", "train")
    text = (
        f"{scaled(train.get('bytes'), 'B')} of text" + (f" ({languages})" if languages else "")
        if train
        else "text"
    )
    first = (
        f"A decoder-only language model with {size} weights ({count(shape.get('num_layers'))} layers, width "
    )
    first += f"{count(shape.get('embedding_dim'))}), pretrained from scratch on {text}."
    second = f" It continues text; it has not been trained to follow instructions. {_headline(facts)}"
    return [Paragraph(first + second), Paragraph(_chinese(facts, size, languages), "", "zh")]


def _headline(facts: Facts) -> str:
    found, report = part(facts.evaluation, "bits_per_byte"), facts.evaluation
    if found:
        versus = decimal(part(report, "baseline").get("value"))
        return f"It needs {decimal(found.get('value'))} bits per byte of text it has not seen; a 5-gram model needs {versus}."
    if facts.best:
        return f"Its best validation during training is {decimal(facts.best.get('validation_bits_per_byte'))} bits per byte; it has not been evaluated yet."
    return "How well it predicts text is not measured yet."


def _chinese(facts: Facts, size: str, languages: str) -> str:
    found = part(facts.evaluation, "bits_per_byte")
    train = part(facts.corpus, "splits", "train")
    text = f"中文简介:这是一个从零预训练的解码器语言模型,参数量 {size}" + (
        f",训练文本 {scaled(train.get('bytes'), 'B')}" if train else ""
    )
    text += f"(语言:{languages})。" if languages else "。"
    if found:
        text += f"对未见过的文本,每字节需要 {decimal(found.get('value'))} 比特;5-gram 基线需要 {decimal(part(facts.evaluation, 'baseline').get('value'))} 比特。"
    else:
        text += "尚未评测。"
    return (
        text
        + ("" if facts.is_finished else "训练尚未完成。")
        + "它只会续写文本,没有经过指令训练。偏见、训练文本泄露与恶意提示均未测量。"
    )


def _use(facts: Facts) -> list[Block]:
    prompt = str(facts.settings.get("sample_prompt") or "Once upon a time")
    prompt = (
        prompt
        if prompt.isascii() and prompt.isprintable() and not set(prompt) & set("\"'\\`$!")
        else "Once upon a time"
    )
    return [
        Heading("How to use it"),
        Paragraph(("From the folder that holds ", Code(f"{facts.place}/"), ":")),
        Listing(
            f'glasshouse generate {facts.place} "{prompt}" --max_new_tokens 60 --temperature 0.8 --seed 1',
            "sh",
        ),
        Paragraph("Or with transformers, without Glasshouse:"),
        Listing(
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'folder = "{facts.place}/model"\n'
            "tokenizer = AutoTokenizer.from_pretrained(folder)\nmodel = AutoModelForCausalLM.from_pretrained(folder)\n"
            f'prompt = tokenizer("{prompt}", return_tensors="pt")\n'
            "written = model.generate(**prompt, max_new_tokens=60, do_sample=True, temperature=0.8)\n"
            "print(tokenizer.decode(written[0], skip_special_tokens=True))",
            "python",
        ),
    ]


def interval(found: Row, digits: int = 3) -> str:
    """The two ends of an interval."""
    low, high = number_of(found.get("low")), number_of(found.get("high"))
    return (
        "too little text for one" if low is None or high is None else f"{low:.{digits}f} to {high:.{digits}f}"
    )


def _results(facts: Facts) -> list[Block]:
    report, head = facts.evaluation, Heading("How well it predicts text")
    if not report:
        command = Code(f"glasshouse evaluate {facts.place}")
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
    if not groups:
        return []
    rows = [(str(row.get("name")), count(row.get("documents")), scaled(row.get("bytes"), "B"), decimal(row.get("value")), interval(row),
             decimal(row.get("baseline"))) for row in groups]  # fmt: skip
    return [
        Heading(title, 3),
        Table(("", ">documents", ">text", ">bits per byte", ">95 % interval", ">5-gram"), rows),
    ]


def _samples(facts: Facts) -> list[Block]:
    rows = [row for row in facts.validations if isinstance(row.get("sample"), str)]
    if not rows:
        return [Heading("Samples"), Paragraph(("None were drawn: ", Code("--sample_prompt"), " was empty."))]
    prompt = str(facts.settings.get("sample_prompt", ""))
    shown = spread(rows, MOST_SAMPLES)
    note = f", {len(shown)} of {len(rows)}, evenly spaced" if len(shown) < len(rows) else ""
    return [
        Heading("Samples"),
        Paragraph(("What it wrote after ", Code(prompt), f" as it learned: the first answer each time, as it came{note}.")),
        Table((">step", ">validation bits/byte", "|text"), [(count(row.get("step")), decimal(row.get("validation_bits_per_byte")), row["sample"].strip() or "(nothing)") for row in shown]),
    ]  # fmt: skip


def _limits(facts: Facts) -> list[Block]:
    last = facts.validations[-1] if facts.validations else {}
    train = number_of(part(facts.corpus, "splits", "train").get("tokens"))
    seen = tokens_seen(facts)
    found = part(facts.evaluation, "train")
    gap = (
        f"gap between held-out and training text {decimal(found.get('gap'))} bits per byte ({decimal(found.get('gap_low'))} to {decimal(found.get('gap_high'))}); "
        if found
        else ""
    )
    gap += (
        f"in training, validation minus training loss {decimal(last.get('gap'))} nats per token at the last validation, {decimal(facts.best.get('gap'))} at the best; best at step {count(facts.best.get('step'))} of {facts.done:,}"
        if facts.best
        else "not measured yet: no validation was made"
    )
    passes = (
        f"{seen / train:.1f} passes over {train:,.0f} training tokens"
        if seen and train
        else "not measured: the corpus is not at the recorded place"
    )
    cost = f"{scaled(facts.run.get('flops'), 'FLOP')}, {duration(facts.run.get('seconds'))}, {scaled(facts.run.get('memory'), 'B')}, {energy(facts.run.get('energy'))}"
    rows: list[tuple[str, str]] = [
        ("cost", cost + "; see above" if facts.is_finished else "not measured yet: the run is not finished"),
        ("overfitting", gap),
        ("dependence on data", passes + "; how results change with more or other text is not measured yet"),
        *((name, f"not measured yet: {why}") for name, why in UNMEASURED),
    ]
    wise: list[Pieces] = [
        "It continues text in the manner of what it was trained on. It knows nothing else, and it states false things as easily as true ones.",
        "Do not use it where a wrong or offensive sentence does harm. Nothing here is a promise about text unlike the held-out text.",
    ]
    return [Heading("Limits"), Table(("limit", "measured"), rows), Bullets(wise)]
