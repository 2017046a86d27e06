"""What a card says of how a model was trained: its course, its data, its settings, its cost. Reads no files."""

from collections.abc import Callable
from typing import Any

from glasshouse.card.corpus import mixture
from glasshouse.card.facts import Facts, Row, numbers, part, rows_of, spread, tokens_seen
from glasshouse.card.page import Block, Code, Figures, Heading, Listing, Paragraph, Pieces, Table
from glasshouse.card.plots import Series, can_draw, draw_bars, draw_lines, smooth
from glasshouse.card.quantity import count, decimal, duration, energy, number_of, ratio, scaled, share

MOST_ROWS = 12
COURSE = (
    ">step",
    ">training bits/byte",
    ">validation bits/byte",
    ">learning rate",
    ">tokens/s",
    ">share of peak",
    ">memory",
)
CURVES = (
    ("learning_rate", "Learning rate", "warm-up, stable, decay", "learning rate", 1.0),
    ("tokens_per_second", "Throughput", "training steps only", "tokens per second", 1.0),
    ("utilization", "Share of peak", "of the measured matrix-multiplication rate", "per cent", 100.0),
    ("memory", "Memory", "of the whole process", "GB", 1e-9),
)
"""Key in metrics.jsonl, title, remark, unit, factor of each plot of one figure."""


def course(facts: Facts) -> list[Block]:
    """The course of the training: as plots where they can be drawn, and as a table always."""
    head = Heading("How the training went")
    if not facts.steps and not facts.validations:
        return [head, Paragraph("Not measured: the run holds no metrics.")]
    merged: dict[Any, Row] = {}
    for row in (*facts.steps, *facts.validations):
        merged.setdefault(row["step"], {}).update(row)
    shown = spread(facts.validations or facts.steps, MOST_ROWS)
    return [
        head,
        Figures(_plots(facts)) if can_draw() else _how_to_draw(facts),
        Table(_columns(facts), [_course_row(facts, merged[row["step"]]) for row in shown]),
        Paragraph("Share of peak: of this machine's measured matrix-multiplication rate.", "soft"),
        Paragraph(_odd_steps(facts)),
    ]


def _how_to_draw(facts: Facts) -> Paragraph:
    install, again = Code("pip install '.[report]'"), Code(f"glasshouse report {facts.place}")
    return Paragraph(("Plots need matplotlib: ", install, ", then ", again, "."), "soft")


def _columns(facts: Facts) -> tuple[str, ...]:
    return tuple(name.replace("bits/byte", "nats a guess") if facts.is_encoder else name for name in COURSE)


def _losses(facts: Facts) -> tuple[str, str, str]:
    """How the losses of training and of validation are called in the log, and their unit."""
    if facts.is_encoder:
        return "loss", "validation_loss", "nats a guess"
    return "bits_per_byte", "validation_bits_per_byte", "bits per byte"


def _course_row(facts: Facts, row: Row) -> list[str]:
    train, validation, _ = _losses(facts)
    held_out = decimal(row.get(validation)) if "validation_loss" in row else ""
    rate = number_of(row.get("learning_rate"))
    return [
        count(row["step"]),
        decimal(row.get(train)),
        held_out,
        "" if rate is None else f"{rate:.2g}",
        count(row.get("tokens_per_second")),
        share(row.get("utilization"), 1),
        scaled(row.get("memory"), "B"),
    ]


def _odd_steps(facts: Facts) -> str:
    odd = [f"step {count(row['step'])}: {row['skipped']}" for row in facts.steps if row.get("skipped")]
    for row in facts.steps:
        if row.get("spike"):
            odd.append(f"step {count(row['step'])}: loss {decimal(row.get('loss'))} stands out")
    listed = "; ".join(odd[:20]) + (f"; and {len(odd) - 20} more" if len(odd) > 20 else "")
    return f"Skipped steps and loss spikes: {listed or 'none'}."


def _plots(facts: Facts) -> list[tuple[str, str, str]]:
    found = _learning_curve(facts) + _beside_baseline(facts.evaluation)
    for key, title, remark, unit, factor in CURVES:
        at, values = numbers(facts.steps, key)
        if at:
            line = Series("", at, [factor * value for value in values])
            found.append((title, remark, draw_lines(key.replace("_", "-"), [line], unit)))
    return found


def _learning_curve(facts: Facts) -> list[tuple[str, str, str]]:
    train, validation, unit = _losses(facts)
    at, bits = numbers(facts.steps, train)
    lines = [Series("", at, bits, "faint"), Series("training, smoothed", at, smooth(bits))] if at else []
    seen, held_out = numbers(facts.validations, validation)
    if seen:
        best = held_out.index(min(held_out))
        lines.append(Series("validation", seen, held_out, "points", True))
        lines.append(Series("best", [seen[best]], [held_out[best]], "ring", True))
    spikes = numbers([row for row in facts.steps if row.get("spike")], train)
    if spikes[0]:
        lines.append(Series("spike", *spikes, "cross", True))
    if not lines:
        return []
    drawn = draw_lines("learning-curve", lines, unit, from_zero=False)
    return [("Learning curve", "lower is better", drawn)]


def _beside_baseline(report: Row) -> list[tuple[str, str, str]]:
    values, ends = [], []
    for row in (part(report, "bits_per_byte"), part(report, "baseline")):
        value, low, high = (number_of(row.get(key)) for key in ("value", "low", "high"))
        if value is None:
            return []
        values.append(value)
        ends.append(None if low is None or high is None else (low, high))
    drawn = draw_bars("baseline", ["this model", "5-gram"], values, ends, "bits per byte")
    return [("Beside the baseline", "held-out text, 95 % intervals; lower is better", drawn)]


# ------------------------------------------------------------------------------------------------------------- inputs


def data(facts: Facts) -> list[Block]:
    """The text the model was trained on, and how it was cleaned."""
    head, water = Heading("What it was trained on"), facts.waterfall
    parent = next(iter(rows_of(facts.run.get("parents"))), {})
    digest = Code(str(facts.run.get("corpus_digest") or parent.get("digest") or "not recorded"))
    named = Paragraph(("Digest of the corpus: ", digest), "soft")
    if not facts.corpus:
        return [head, Paragraph("Not known here: the corpus is not at the recorded place."), named]
    if not water:
        return [
            head,
            *mixture(facts),
            named,
            Paragraph("How it was cleaned is not recorded beside the corpus."),
        ]
    rules = rows_of(water.get("rules"))
    cleaned = (
        f"Cleaning took {count(water.get('documents_in'))} documents ({scaled(water.get('bytes_in'), 'B')}) and left "
        f"{count(water.get('documents_out'))} ({scaled(water.get('bytes_out'), 'B')}). {len(rules)} rules looked at every "
        "document; shown are those that dropped or changed any."
    )
    acted = [row for row in rules if row.get("documents_dropped") or row.get("documents_changed")]
    table = Table(("rule", ">dropped", ">changed", ">text dropped"), [_rule_row(row) for row in acted])
    return [
        head,
        *mixture(facts),
        Heading("Cleaning", 3),
        Paragraph(cleaned),
        *([table] if acted else []),
        named,
    ]


def _rule_row(row: Row) -> list[str]:
    dropped, changed = (count(row.get(f"documents_{key}")) for key in ("dropped", "changed"))
    return [str(row.get("rule")).replace("_", " "), dropped, changed, scaled(row.get("bytes_dropped"), "B")]


def making(facts: Facts) -> list[Block]:
    """Shape, steps, optimizer, device, and how to make it again."""
    run, shape, plan = facts.run, facts.shape, part(facts.run, "shape")
    heads = f"{count(shape.get('num_heads'))} heads ({count(shape.get('num_key_value_heads'))} for keys and values)"
    isolated = (
        "do not see each other" if facts.settings.get("isolate_documents") else "of one row see each other"
    )
    best = facts.best.get("step")
    kept = f"of step {count(best)}, the best validation" if best else "none yet: no validation was made"
    rows: list[tuple[str, Pieces]] = [
        (
            "shape",
            f"{count(shape.get('num_layers'))} layers, width {count(shape.get('embedding_dim'))}, {heads}, feed-forward "
            f"{count(shape.get('feed_forward_dim'))}, vocabulary {count(shape.get('vocab_size'))}, context "
            f"{count(shape.get('context_length'))} tokens",
        ),
        ("weights", count(run.get("parameters", part(run, "predicted").get("parameters")))),
        (
            "steps",
            f"{facts.done:,} of {count(plan.get('steps'))}, each of {count(plan.get('rows'))} rows of "
            f"{count(plan.get('context'))} tokens",
        ),
        ("tokens", count(tokens_seen(facts))),
        ("objective", f"next token; documents {isolated}"),
        ("optimizer", _optimizer(part(run, "optimization"))),
        ("device", _device(run)),
        ("begun", f"{run.get('created', 'unknown')}, seed {run.get('seed', 'unknown')}, glasshouse "
                  f"{run.get('code_version', 'unknown')}"),
        ("weights kept", kept),
        ("their digest", Code(str(run.get("digest") or "none yet"))),
    ]  # fmt: skip
    return [
        Heading("How it was trained"),
        Table(("", ""), rows),
        Paragraph(
            "To make it again, from the folder in which it was made (the recipe names its corpus by path):"
        ),
        Listing(f"glasshouse pretrain --config {facts.place}/recipe.yaml --out again", "sh"),
        Listing(facts.recipe, "yaml", "All settings (recipe.yaml)"),
    ]


def _optimizer(settings: Row) -> str:
    if not settings:
        return "not recorded"
    rates = f"peak learning rate {settings.get('learning_rate')}"
    if settings.get("optimizer") == "muon":
        rates = f"hidden matrices by Muon at {settings.get('matrix_learning_rate')}, the rest by AdamW at {settings.get('learning_rate')}"
    return (
        f"{settings.get('optimizer')}, {rates}; weight decay {settings.get('weight_decay')}, gradient norm at most "
        f"{settings.get('clip')}, warm-up {share(settings.get('warmup'), 1)} and decay {share(settings.get('decay'), 1)} "
        "of the steps"
    )


def _device(run: Row) -> str:
    device, rate = part(run, "device"), run.get("matmul_rate")
    processes = number_of(device.get("world_size")) or 1
    words = [
        str(device.get("kind", "unknown")),
        str(device.get("dtype", "unknown")),
        f"{count(device.get('threads'))} threads",
    ]
    words += [f"{count(processes)} processes"] if processes > 1 else []
    words += [f"measured matrix-multiplication rate {scaled(rate, 'FLOP/s')}"] if number_of(rate) else []
    return ", ".join(words)


# --------------------------------------------------------------------------------------------------------------- cost


def cost(facts: Facts) -> list[Block]:
    """What was predicted before the first step, beside what was measured."""
    run, predicted = facts.run, part(facts.run, "predicted")
    last = facts.steps[-1] if facts.steps else {}
    peak = max((number_of(row.get("memory")) or 0 for row in facts.steps), default=None)
    memory = [number_of(value) for value in (predicted.get("memory"), run.get("baseline_memory"))]
    expected = run.get("predicted_memory", sum(value or 0 for value in memory) if memory[0] else None)
    method = str(predicted.get("method", "not recorded"))
    metered = "; no meter was read" if "assumed" in method else ""
    rows = [
        _cost_row("floating-point operations", predicted.get("flops"), run.get("flops"), _operations,
                  "counted from shape and steps, not observed"),
        _cost_row("training time", predicted.get("seconds"), run.get("seconds", last.get("seconds")), duration,
                  f"predicted from: {method}"),
        _cost_row("peak memory", expected, run.get("memory", peak), _memory, "of the whole process"),
        _cost_row("energy", predicted.get("joules"), run.get("energy"), energy,
                  f"{run.get('energy_method', method)}{metered}"),
    ]  # fmt: skip
    return [
        Heading("Cost"),
        Table(("", ">predicted", ">measured", ">ratio", "how"), rows),
        Paragraph("Not measured: carbon and price; they depend on the electricity and the machine.", "soft"),
    ]


def _cost_row(name: str, guess: Any, found: Any, form: Callable[[Any], str], how: str) -> list[str]:
    return [name, form(guess), form(found), ratio(found, guess), how]


def _operations(value: Any) -> str:
    return scaled(value, "FLOP")


def _memory(value: Any) -> str:
    return scaled(value, "B")
