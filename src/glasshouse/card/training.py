"""What a card says of how a model was trained: its course, its data, its settings, its cost. Reads no files."""

from typing import Any

from glasshouse.card.corpus import mixture
from glasshouse.card.facts import Facts, Row, numbers, part, rows_of, spread, tokens_seen
from glasshouse.card.page import Block, Code, Figures, Heading, Listing, Paragraph, Pieces, Table
from glasshouse.card.plots import Series, can_draw, draw_bars, draw_lines, smooth
from glasshouse.card.quantity import count, decimal, duration, energy, number_of, ratio, scaled, share

MOST_ROWS = 12


def course(facts: Facts) -> list[Block]:
    """The course of the training: as plots where they can be drawn, and as a table always."""
    if not facts.steps and not facts.validations:
        return [Heading("How the training went"), Paragraph("Not measured: the run holds no metrics.")]
    merged: dict[Any, Row] = {}
    for row in (*facts.steps, *facts.validations):
        merged.setdefault(row.get("step"), {}).update(row)
    rows = [
        (count(row.get("step")), decimal(row.get("bits_per_byte")), decimal(row.get("validation_bits_per_byte")) if "validation_loss" in row else "",
         f"{number_of(row.get('learning_rate')) or 0:.2g}", count(row.get("tokens_per_second")), share(row.get("utilization"), 1), scaled(row.get("memory"), "B"))
        for row in spread(facts.validations or facts.steps, MOST_ROWS) for row in [merged[row.get("step")]]
    ]  # fmt: skip
    odd = [f"step {count(row.get('step'))}: {row['skipped']}" for row in facts.steps if row.get("skipped")]
    odd += [
        f"step {count(row.get('step'))}: loss {decimal(row.get('loss'))} stands out"
        for row in facts.steps
        if row.get("spike")
    ]
    plots: list[Block] = [Figures(_plots(facts))] if can_draw() else [
        Paragraph(("Plots need matplotlib: ", Code("pip install 'glasshouse[report]'"), ", then ", Code(f"glasshouse report {facts.place}"), "."), "soft")
    ]  # fmt: skip
    return [
        Heading("How the training went"), *plots,
        Table((">step", ">training bits/byte", ">validation bits/byte", ">learning rate", ">tokens/s", ">share of peak", ">memory"), rows),
        Paragraph("Share of peak: of this machine's measured matrix-multiplication rate. The plots are in report.html.", "soft"),
        Paragraph(f"Skipped steps and loss spikes: {'; '.join(odd[:20]) if odd else 'none'}{' and more' if len(odd) > 20 else ''}."),
    ]  # fmt: skip


def _plots(facts: Facts) -> list[tuple[str, str, str]]:
    at, bits = numbers(facts.steps, "bits_per_byte")
    lines = [Series("", at, bits, "faint"), Series("training, smoothed", at, smooth(bits))] if at else []
    seen, held_out = numbers(facts.validations, "validation_bits_per_byte")
    if seen:
        place = held_out.index(min(held_out))
        lines += [
            Series("validation", seen, held_out, "points", True),
            Series("best", [seen[place]], [held_out[place]], "ring", True),
        ]
    spikes = [row for row in facts.steps if row.get("spike")]
    if spikes:
        lines.append(Series("spike", *numbers(spikes, "bits_per_byte"), "cross", True))
    found = (
        [
            (
                "Learning curve",
                "lower is better",
                draw_lines("learning-curve", lines, "bits per byte", from_zero=False),
            )
        ]
        if lines
        else []
    )
    model, baseline = part(facts.evaluation, "bits_per_byte"), part(facts.evaluation, "baseline")
    if number_of(model.get("value")) is not None and number_of(baseline.get("value")) is not None:
        ends = [
            (row["low"], row["high"])
            if number_of(row.get("low")) is not None and number_of(row.get("high")) is not None
            else None
            for row in (model, baseline)
        ]
        drawn = draw_bars(
            "baseline", ["this model", "5-gram"], [model["value"], baseline["value"]], ends, "bits per byte"
        )
        found.append(("Beside the baseline", "held-out text, 95 % intervals; lower is better", drawn))
    for key, title, note, unit, scale in (
        ("learning_rate", "Learning rate", "warm-up, stable, decay", "learning rate", 1.0),
        ("tokens_per_second", "Throughput", "training steps only", "tokens per second", 1.0),
        ("utilization", "Share of peak", "of the measured matrix-multiplication rate", "per cent", 100.0),
        ("memory", "Memory", "of the whole process", "GB", 1e-9),
    ):
        at, values = numbers(facts.steps, key)
        if at:
            drawn = draw_lines(
                key.replace("_", "-"), [Series("", at, [scale * value for value in values])], unit
            )
            found.append((title, note, drawn))
    return found


def data(facts: Facts) -> list[Block]:
    """The text the model was trained on, and how it was cleaned."""
    head = Heading("What it was trained on")
    digest = Code(
        str(
            facts.run.get("corpus_digest")
            or part({"": next(iter(rows_of(facts.run.get("parents"))), {})}, "").get("digest")
            or "not recorded"
        )
    )
    if not facts.corpus:
        return [
            head,
            Paragraph(
                (
                    "What the text was is not known here: its corpus is not at the recorded place. Digest of the corpus: ",
                    digest,
                )
            ),
        ]
    rules = rows_of(facts.waterfall.get("rules"))
    acted = [
        row
        for row in rules
        if number_of(row.get("documents_dropped")) or number_of(row.get("documents_changed"))
    ]
    water = facts.waterfall
    cleaned = f"Cleaning took {count(water.get('documents_in'))} documents ({scaled(water.get('bytes_in'), 'B')}) and left {count(water.get('documents_out'))} ({scaled(water.get('bytes_out'), 'B')}); {len(rules)} rules acted."
    rows = [
        (
            str(row.get("rule")).replace("_", " "),
            count(row.get("documents_dropped")),
            count(row.get("documents_changed")),
            scaled(row.get("bytes_dropped"), "B"),
        )
        for row in acted
    ]
    return [
        head, *mixture(facts), Heading("Cleaning", 3), Paragraph(cleaned if water else "How it was cleaned is not recorded."),
        *([Table(("rule", ">dropped", ">changed", ">text dropped"), rows)] if rows else []),
        Paragraph(("Digest of the corpus: ", digest), "soft"),
    ]  # fmt: skip


def making(facts: Facts) -> list[Block]:
    """Shape, steps, optimizer, device, and how to make it again."""
    run, shape, device = facts.run, facts.shape, part(facts.run, "device")
    plan, optimization = part(run, "shape"), part(run, "optimization")
    rate = (
        f"; best matrix-multiplication rate {scaled(run.get('matmul_rate'), 'FLOP/s')}"
        if number_of(run.get("matmul_rate"))
        else ""
    )
    learning = f"peak learning rate {optimization.get('learning_rate')}, of hidden matrices {optimization.get('matrix_learning_rate')}"
    rows: list[tuple[str, Pieces]] = [
        ("shape", f"{count(shape.get('num_layers'))} layers, width {count(shape.get('embedding_dim'))}, {count(shape.get('num_heads'))} heads "
                  f"({count(shape.get('num_key_value_heads'))} for keys and values), feed-forward {count(shape.get('feed_forward_dim'))}, "
                  f"vocabulary {count(shape.get('vocab_size'))}, context {count(shape.get('context_length'))} tokens"),
        ("weights", count(run.get("parameters", part(run, "predicted").get("parameters")))),
        ("steps", f"{facts.done:,} of {count(plan.get('steps'))}, each of {count(plan.get('rows'))} rows of {count(plan.get('context'))} tokens"),
        ("tokens", count(tokens_seen(facts))),
        ("objective", "next token; documents " + ("do not see each other" if facts.settings.get("isolate_documents") else "in one row see each other")),
        ("optimizer", f"{optimization.get('optimizer', 'not recorded')}, {learning}, weight decay {optimization.get('weight_decay')}, "
                      f"gradient norm at most {optimization.get('clip')}, warm-up {share(optimization.get('warmup'), 1)} and decay {share(optimization.get('decay'), 1)} of the steps"),
        ("device", f"{device.get('kind', 'unknown')}, {device.get('dtype', 'unknown')}, {count(device.get('threads'))} threads, {count(device.get('world_size'))} process(es){rate}"),
        ("begun, seed, code", f"{run.get('created', 'unknown')}, seed {run.get('seed', 'unknown')}, glasshouse {run.get('code_version', 'unknown')}"),
        ("digest of the weights", Code(str(run.get("digest") or "none yet"))),
    ]  # fmt: skip
    again = Listing(f"glasshouse pretrain --config {facts.place}/recipe.yaml --out again", "sh")
    return [
        Heading("How it was trained"),
        Table(("", ""), rows),
        Paragraph("To make it again:"),
        again,
        Listing(facts.recipe, "yaml", "All settings (recipe.yaml)"),
    ]


def cost(facts: Facts) -> list[Block]:
    """What was predicted before the first step, beside what was measured."""
    run, predicted = facts.run, part(facts.run, "predicted")
    last = facts.steps[-1] if facts.steps else {}
    peak = max((number_of(row.get("memory")) or 0 for row in facts.steps), default=None)
    expected = run.get("predicted_memory") or (
        (number_of(predicted.get("memory")) or 0) + (number_of(run.get("baseline_memory")) or 0) or None
    )
    pairs = (
        ("floating-point operations", predicted.get("flops"), run.get("flops"), lambda value: scaled(value, "FLOP"), "counted from the shape and the steps, not observed"),
        ("time of the steps", predicted.get("seconds"), run.get("seconds", last.get("seconds")), duration, "predicted: " + str(predicted.get("method", "not recorded"))),
        ("peak memory", expected, run.get("memory", peak), lambda value: scaled(value, "B"), "predicted: training and what the process held before; measured: the process"),
        ("energy", predicted.get("joules"), run.get("energy"), energy, str(run.get("energy_method") or predicted.get("method") or "not recorded") + "; no meter was read" * ("assumed" in str(predicted.get("method")))),
    )  # fmt: skip
    rows = [(name, form(guess), form(found), ratio(found, guess), how)
            for name, guess, found, form, how in pairs]  # fmt: skip
    return [Heading("Cost"), Table(("", ">predicted", ">measured", ">measured / predicted", "how"), rows),
            Paragraph("Not measured: carbon and price, because they depend on where the electricity and the machine came from.", "soft")]  # fmt: skip
