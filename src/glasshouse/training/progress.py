"""What a person sees while a model trains: one live line at a terminal, plain lines in a log. Decides nothing."""

import importlib.util
import math
import statistics
import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from glasshouse.text.examples import ExampleCounts
from glasshouse.text.supervision import Lessons, show_row
from glasshouse.text.tokenizer import Tokenizer

STYLES = {"learned": "green", "seen": "dim"}
PLAIN_EVERY = 10.0
"""Seconds between two lines where the output is not a terminal."""


class Progress:
    """A line about training that is renewed in place at a terminal and repeated every ten seconds elsewhere.

    Args:
        steps: steps of the whole run.
        first: steps done before.
        quiet: print nothing (every process but the first).
    """

    def __init__(self, steps: int, first: int, quiet: bool = False):
        self.steps, self.first, self.quiet = steps, first, quiet
        self.console = Console(quiet=quiet, highlight=False)
        self.live = (
            Live(console=self.console, auto_refresh=False) if self.console.is_terminal and not quiet else None
        )
        self.started = time.perf_counter()
        self.printed = -math.inf

    def __enter__(self) -> "Progress":
        if self.live:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self.live.stop()

    def show(
        self, done: int, loss: float, bits_per_byte: float, rate: float, utilization: float, memory: int
    ) -> None:
        """Renew the line.

        Args:
            done: steps done.
            loss: smoothed training loss in nats per token.
            bits_per_byte: the same in bits per byte of text; NaN where a byte has no meaning.
            rate: tokens per second.
            utilization: share of the machine's measured matrix rate.
            memory: bytes held.
        """
        elapsed = time.perf_counter() - self.started
        left = elapsed / max(1, done - self.first) * (self.steps - done)
        bits = "" if math.isnan(bits_per_byte) else f"{bits_per_byte:.3f} bits/byte  "
        line = (
            f"step {done}/{self.steps}  loss {loss:.3f}  {bits}{rate:,.0f} tokens/s  "
            f"{utilization:.0%} of peak  {memory / 1e9:.2f} GB  {clock(left)} left"
        )
        if self.live:
            self.live.update(Text(line), refresh=True)
        elif not self.quiet and (time.perf_counter() - self.printed > PLAIN_EVERY or done == self.steps):
            self.printed = time.perf_counter()
            self.console.print(line, soft_wrap=True)

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self.console.print(line, soft_wrap=True, markup=False)


def clock(seconds: float) -> str:
    """Seconds as a person writes them: 45s, 3m05s, 2h10m."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    return (
        f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    )


class Scalars:
    """The logged numbers in TensorBoard's format, under RUN/tensorboard, where TensorBoard is installed.

    Args:
        folder: the run folder.
        quiet: write nothing (every process but the first).
    """

    def __init__(self, folder: Path, quiet: bool = False):
        self.writer = None
        if quiet or importlib.util.find_spec("tensorboard") is None:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder / "tensorboard")

    def add(self, record: dict[str, Any]) -> None:
        """Add the numbers of one line of metrics.jsonl."""
        if self.writer is None:
            return
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                self.writer.add_scalar(name, value, record["step"])
        self.writer.flush()


class SpikeDetector:
    """Finds a loss that stands out from those before it.

    Args:
        window: how many losses it is compared with.
        threshold: how many robust standard deviations (1.4826 times the median absolute deviation) count as a spike.
    """

    def __init__(self, window: int = 64, threshold: float = 8.0):
        self.losses: deque[float] = deque(maxlen=window)
        self.threshold = threshold

    def deviation(self, loss: float) -> float:
        """How many robust standard deviations the loss lies above the median of those before it; 0 for the first 16."""
        deviation = 0.0
        if len(self.losses) >= 16:
            median = statistics.median(self.losses)
            spread = 1.4826 * statistics.median(abs(earlier - median) for earlier in self.losses)
            deviation = (loss - median) / max(spread, 1e-3 * abs(median), 1e-9)
        if math.isfinite(loss):
            self.losses.append(loss)
        return deviation

    def is_spike(self, loss: float) -> bool:
        """Whether the loss is a spike; it joins the losses that later ones are compared with."""
        return self.deviation(loss) > self.threshold


def show_lessons(console: Console, tokenizer: Tokenizer, rows: Lessons, counts: ExampleCounts) -> None:
    """Show what will be learned: what was left out, and one row as the model will see it."""
    console.print(
        f"{counts.kept:,} examples ({counts.form}); {rows.rows:,} rows of {rows.context:,} tokens, {rows.waste:.1%} of them padding"
    )
    for line in counts.lines():
        console.print(line, markup=False)
    console.print(
        "the first row: ",
        Text("learned", "green"),
        " and only ",
        Text("seen", "dim"),
        "; what a line parts cannot see each other",
        sep="",
    )
    shown = Text()
    for stretch in show_row(tokenizer, rows.batch(0, 1), 0):
        shown.append(
            "\n" + "─" * 40 + "\n" if stretch.kind == "border" else stretch.text, STYLES.get(stretch.kind, "")
        )
    console.print(shown)
