"""What the server counts, in Prometheus' text format, and its log: one line a request.

Knows figures and lines; how an engine comes to its figures is the engine's business.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TextIO

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from glasshouse.inference.request import EngineStatistics

PREFIX = "glasshouse_"
FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
GAUGES = {
    "queued": "requests that wait for the engine",
    "running": "requests in the engine's batch",
    "cache_blocks_used": "blocks of the key/value cache in use",
    "cache_blocks_total": "blocks of the key/value cache there are",
}
COUNTS = {
    "steps": "forward passes",
    "prompt_tokens": "tokens of prompts read, those taken from the cache not counted",
    "tokens": "tokens written, by the engine's own count",
    "reused_tokens": "tokens of prompts taken from the cache",
    "preemptions": "times a running request was put back because the cache was full",
    "accepted_tokens": "tokens written that a guess had right",
}

Statistics = Callable[[], Mapping[str, EngineStatistics]]


class _Engines(Collector):
    """The engines' figures, read when somebody asks."""

    def __init__(self, statistics: Statistics):
        self._statistics = statistics

    def collect(self) -> Iterator[Metric]:
        """One family per figure, one sample per model."""
        found = self._statistics()
        for name, text in GAUGES.items():
            gauge = GaugeMetricFamily(f"{PREFIX}engine_{name}", text, labels=["model"])
            for model, figures in found.items():
                gauge.add_metric([model], getattr(figures, name))
            yield gauge
        for name, text in COUNTS.items():
            count = CounterMetricFamily(f"{PREFIX}engine_{name}", text, labels=["model"])
            for model, figures in found.items():
                count.add_metric([model], getattr(figures, name))
            yield count


class Metrics:
    """The figures of one server, in a registry of its own.

    Args:
        statistics: the engines' figures by model, read when somebody asks.
    """

    def __init__(self, statistics: Statistics):
        self.registry = CollectorRegistry()
        self.registry.register(_Engines(statistics))
        registry = self.registry
        self.requests = Counter(
            f"{PREFIX}requests", "requests answered", ["route", "status"], registry=registry
        )
        self.errors = Counter(f"{PREFIX}errors", "requests that failed", ["route", "type"], registry=registry)
        self.tokens = Counter(
            f"{PREFIX}tokens", "tokens read and written", ["model", "kind"], registry=registry
        )
        self.first_token = Histogram(
            f"{PREFIX}time_to_first_token_seconds", "from request to first token", ["model"],
            buckets=FIRST_TOKEN_BUCKETS, registry=registry,
        )  # fmt: skip
        self.token_time = Histogram(
            f"{PREFIX}time_per_token_seconds", "between two tokens of a request", ["model"],
            buckets=TOKEN_BUCKETS, registry=registry,
        )  # fmt: skip

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)


@dataclass
class Line:
    """What the log says of one request; routes add to `facts` while it is under way."""

    request: str
    client: str
    method: str
    path: str
    started: float = field(default_factory=time.monotonic)
    facts: dict[str, Any] = field(default_factory=dict)

    def note(self, **facts: Any) -> None:
        """Add to the line."""
        self.facts.update(facts)


@dataclass
class Log:
    """Writes lines.

    Args:
        output: where to; standard error by default, None for nowhere.
    """

    output: TextIO | None = field(default_factory=lambda: sys.stderr)

    def write(self, line: Line, status: int) -> None:
        """One line: when, who, what, how it ended; whatever a client chose is escaped, so that it stays one line."""
        if self.output is None:
            return
        when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        milliseconds = round(1000 * (time.monotonic() - line.started))
        start = f"{when} {line.client} {escape(line.method)} {escape(line.path)} {status} {milliseconds} ms"
        rest = "".join(f" {name}={escape(value)}" for name, value in line.facts.items())
        self.output.write(f"{start} {line.request}{rest}\n")
        self.output.flush()


def escape(value: Any) -> str:
    """A value in one word of printable ASCII: in quotes, as JSON, where it is anything else."""
    if isinstance(value, int | float):
        return str(value)
    text = str(value)
    plain = text.isascii() and text.isprintable() and not set(text) & set(' "\\=') and text != ""
    return text if plain else json.dumps(text).replace("\x7f", "\\u007f")
