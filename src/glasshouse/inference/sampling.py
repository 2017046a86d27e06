"""Choosing the next token: logit rules that compose, and a seeded draw.

A rule is a function `(tokens, logits) -> logits` with tokens int64 [..., T] (prompt and text so far) and logits
float [..., vocab_size]; a token is ruled out by the logit minus infinity. Knows nothing of models or text.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glasshouse.errors import InputError

LogitRule = Callable[[Tensor, Tensor], Tensor]
"""Called with the tokens so far [..., T] and the logits [..., vocab_size]; returns the changed logits."""

FORBIDDEN = float("-inf")


@dataclass(frozen=True)
class GenerationConfig:
    """How text is written: how each token is drawn, and when to stop.

    Args:
        temperature: divides the logits: below 1 safer, above 1 wilder, 1 the model's own distribution; 0 always takes
            the likeliest token.
        top_k: draw only among this many likeliest tokens; 0 for all of them.
        top_p: draw only among the likeliest tokens that together have this probability (nucleus); 1 for all of them.
        min_p: draw only among tokens at least this fraction as likely as the likeliest; 0 for all of them.
        repetition_penalty: divides the positive and multiplies the negative logits of tokens already in the text; 1
            for no penalty.
        seed: seed of the draw; the same seed gives the same text.
        max_new_tokens: write at most this many tokens.
        stop: end before the first of these strings.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    max_new_tokens: int = 200
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_number("temperature", self.temperature, 0.0, math.inf)
        require_whole("top_k", self.top_k, 0)
        require_number("top_p", self.top_p, 0.0, 1.0, above=True)
        require_number("min_p", self.min_p, 0.0, 1.0)
        require_number("repetition_penalty", self.repetition_penalty, 0.0, math.inf, above=True)
        require_whole("seed", self.seed, 0, 2**63 - 1)
        require_whole("max_new_tokens", self.max_new_tokens, 1)
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise InputError(
                f"stop is {self.stop!r}", "--stop", "give one or more strings that are not empty"
            )


def require_number(name: str, value: float, low: float, high: float, *, above: bool = False) -> None:
    """Refuse a value that is not a finite number from `low` (itself left out with `above`) to `high`.

    Raises:
        InputError: it is not.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if number and low <= value <= high and not (above and value == low):
        return
    bounds = f"{'above' if above else 'at least'} {low:g}" + (
        "" if high == math.inf else f" and at most {high:g}"
    )
    raise InputError(f"{name} is {value!r}", f"--{name}", f"give a number {bounds}")


def require_whole(name: str, value: int, low: int, high: int | None = None) -> None:
    """Refuse a value that is not a whole number from `low` to `high`.

    Raises:
        InputError: it is not.
    """
    if (
        isinstance(value, int)
        and not isinstance(value, bool)
        and low <= value
        and (high is None or value <= high)
    ):
        return
    bounds = f"at least {low}" + ("" if high is None else f" and at most {high}")
    raise InputError(f"{name} is {value!r}", f"--{name}", f"give a whole number {bounds}")


def scale_temperature(temperature: float) -> LogitRule:
    """Logits divided by the temperature. The largest is first moved to 0, so that no temperature overflows."""

    def rule(tokens: Tensor, logits: Tensor) -> Tensor:
        return (logits - logits.amax(-1, keepdim=True)) / temperature

    return rule


def keep_top_k(count: int) -> LogitRule:
    """Only the `count` largest logits stay, and those equal to the last of them (Fan et al. 2018, arXiv:1805.04833)."""

    def rule(tokens: Tensor, logits: Tensor) -> Tensor:
        if count >= logits.shape[-1]:
            return logits
        last = torch.topk(logits, count).values[..., -1:]
        return logits.masked_fill(logits < last, FORBIDDEN)

    return rule


def keep_top_p(mass: float) -> LogitRule:
    """The smallest set of likeliest tokens whose probabilities reach `mass` (Holtzman et al. 2020, arXiv:1904.09751).

    The token that crosses the border stays, so at least one always does.
    """

    def rule(tokens: Tensor, logits: Tensor) -> Tensor:
        ordered, order = torch.sort(logits, descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        dropped = before >= mass
        dropped[..., 0] = False
        return logits.masked_fill(torch.zeros_like(dropped).scatter_(-1, order, dropped), FORBIDDEN)

    return rule


def keep_min_p(fraction: float) -> LogitRule:
    """Only tokens at least `fraction` times as likely as the likeliest (Nguyen et al. 2024, arXiv:2407.01082)."""

    def rule(tokens: Tensor, logits: Tensor) -> Tensor:
        return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(fraction), FORBIDDEN)

    return rule


def penalize_repetition(penalty: float) -> LogitRule:
    """Tokens already in the text lose: positive logits are divided, negative ones multiplied by the penalty.

    Once per token, however often it occurred (CTRL, Keskar et al. 2019, arXiv:1909.05858).
    """

    def rule(tokens: Tensor, logits: Tensor) -> Tensor:
        seen = logits.gather(-1, tokens)
        return logits.scatter(-1, tokens, torch.where(seen > 0, seen / penalty, seen * penalty))

    return rule


def logit_rules(config: GenerationConfig) -> list[LogitRule]:
    """The rules a config asks for, in the order they apply; rules that would change nothing are left out.

    Penalty, temperature, top-k, top-p, min-p: each sees what those before it left, as in transformers.
    """
    rules = []
    if config.repetition_penalty != 1:
        rules.append(penalize_repetition(config.repetition_penalty))
    if config.temperature == 0:
        return rules
    if config.temperature != 1:
        rules.append(scale_temperature(config.temperature))
    if config.top_k:
        rules.append(keep_top_k(config.top_k))
    if config.top_p < 1:
        rules.append(keep_top_p(config.top_p))
    if config.min_p > 0:
        rules.append(keep_min_p(config.min_p))
    return rules


def apply_rules(rules: Sequence[LogitRule], tokens: Tensor, logits: Tensor) -> Tensor:
    """The logits after every rule in turn."""
    for rule in rules:
        logits = rule(tokens, logits)
    return logits


def draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One token id drawn from softmax(logits): logits [vocab_size], the id int64 with no dimension.

    By inverting the cumulative distribution in float64 with one number of a CPU generator, so that a seed gives the
    same token on every device that gives the same logits. A token of probability zero is never drawn.
    """
    uniform = torch.rand(1, generator=generator, dtype=torch.float64).to(logits.device)
    cumulative = logits.double().softmax(-1).cumsum(-1)
    total = cumulative[-1:]
    drawn = torch.searchsorted(cumulative, uniform * total, right=True)
    last = torch.searchsorted(cumulative, total)  # of the tokens that have any probability
    return torch.minimum(drawn, last).clamp_(max=logits.shape[-1] - 1)[0]


def choose(logits: Tensor, config: GenerationConfig, generator: torch.Generator) -> Tensor:
    """One token id from logits [vocab_size] that have been through the rules: the likeliest at temperature 0."""
    return logits.argmax(-1) if config.temperature == 0 else draw(logits, generator)
