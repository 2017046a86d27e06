"""Choosing the next token: logit rules that compose, and a seeded draw.

A rule is a function `(tokens, logits) -> logits` with tokens int64 [..., T] (prompt and text so far) and logits
float [..., vocab_size]; a token is ruled out by the logit minus infinity. A rule that counts the answer alone is made
for one prompt's length. Knows nothing of models or text.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from glasshouse.errors import InputError

LogitRule = Callable[[Tensor, Tensor], Tensor]
"""Called with the tokens so far [..., T] and the logits [..., vocab_size]; returns the changed logits."""

FORBIDDEN = float("-inf")
NUCLEUS = 1024
"""Likeliest tokens in which the border of top-p is looked for before all are sorted."""


@dataclass(frozen=True)
class Bounds:
    """What a number may be.

    Args:
        low: the least value, itself left out with `above`.
        high: the largest value.
        whole: whether it must be a whole number.
        above: whether it must be larger than `low`.
    """

    low: float
    high: float
    whole: bool = False
    above: bool = False

    def __str__(self) -> str:
        low, high = (f"{value:.0f}" if self.whole else f"{value:g}" for value in (self.low, self.high))
        return f"{'above' if self.above else 'at least'} {low} and at most {high}"

    def admit(self, value: object) -> bool:
        """Whether a value is a finite number of the right kind within the bounds."""
        kinds = int if self.whole else int | float
        if not isinstance(value, kinds) or isinstance(value, bool):
            return False
        return self.low <= value <= self.high and not (self.above and value == self.low)


BOUNDS: Mapping[str, Bounds] = {
    "temperature": Bounds(0, 100),
    "top_k": Bounds(0, 2**31 - 1, whole=True),
    "top_p": Bounds(0, 1, above=True),
    "min_p": Bounds(0, 1),
    "repetition_penalty": Bounds(0.001, 1000),
    "presence_penalty": Bounds(-2, 2),
    "frequency_penalty": Bounds(-2, 2),
    "seed": Bounds(0, 2**63 - 1, whole=True),
    "max_new_tokens": Bounds(1, 2**20, whole=True),
    "n": Bounds(1, 64, whole=True),
    "best_of": Bounds(1, 64, whole=True),
}
"""What every number of a GenerationConfig may be; a server refuses by the same table."""
BIAS_BOUNDS = Bounds(-100, 100)
SPAN = 128
"""Numbers that are added up at once where a sum must not depend on how many rows there are."""
MOST_BIASES = 1024
"""Entries of a logit_bias."""
MOST_STOPS, LONGEST_STOP = 64, 1024
"""Stop strings, and characters in one of them."""


@dataclass(frozen=True)
class GenerationConfig:
    """How text is written: how each token is drawn, and when to stop.

    Args:
        temperature: divides the logits: below 1 safer, above 1 wilder, 1 the model's own distribution; 0 always takes
            the likeliest token.
        top_k: draw only among this many likeliest tokens; 0 for all of them.
        top_p: draw only among the likeliest tokens that together have this probability (nucleus); 1 for all of them.
        min_p: draw only among tokens at least this fraction as likely as the likeliest; 0 for all of them.
        repetition_penalty: divides the positive and multiplies the negative logits of tokens already in the text, the
            prompt's included; 1 for no penalty.
        seed: seed of the draw; the same seed gives the same text.
        max_new_tokens: write at most this many tokens.
        stop: end before the first of these strings.
        presence_penalty: subtracted from the logit of a token that the answer already holds; 0 for none.
        frequency_penalty: subtracted from the logit of a token as often as the answer already holds it; 0 for none.
        logit_bias: token id -> what is added to its logit; -100 all but forbids it, 100 all but demands it.
        n: how many answers.
        best_of: write this many and keep the `n` likeliest by the mean log-probability of their tokens; n when None.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    max_new_tokens: int = 200
    stop: tuple[str, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    n: int = 1
    best_of: int | None = None

    def __post_init__(self) -> None:
        for name, bounds in BOUNDS.items():
            value = getattr(self, name)
            if not (value is None and name == "best_of"):
                require_within(name, value, bounds)
        _require_stop(self.stop)
        _require_bias(self.logit_bias)
        if self.best_of is not None and self.best_of < self.n:
            raise InputError(f"best_of is {self.best_of} and n is {self.n}", "--best_of", "give n or more")


def require_within(name: str, value: object, bounds: Bounds) -> None:
    """Refuse a value outside its bounds.

    Raises:
        InputError: it is.
    """
    if not bounds.admit(value):
        kind = "whole number" if bounds.whole else "number"
        raise InputError(f"{name} is {_short(value)}", f"--{name}", f"give a {kind} {bounds}")


def _short(value: object) -> str:
    """A value as Python writes it, cut where it is long: a number of a million digits is not printed."""
    try:
        shown = repr(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        return "a number of thousands of digits"
    return shown if len(shown) <= 60 else shown[:60] + "..."


def _require_stop(stop: object) -> None:
    if not isinstance(stop, tuple | list) or not all(isinstance(text, str) and text for text in stop):
        raise InputError(f"stop is {_short(stop)}", "--stop", "give one or more strings that are not empty")
    if len(stop) > MOST_STOPS or any(len(text) > LONGEST_STOP for text in stop):
        raise InputError(
            f"stop has {len(stop):,} strings, the longest of {max(map(len, stop)):,} characters", "--stop",
            f"give at most {MOST_STOPS} of at most {LONGEST_STOP:,} characters",
        )  # fmt: skip


def _require_bias(bias: object) -> None:
    if not isinstance(bias, Mapping):
        raise InputError(f"logit_bias is {_short(bias)}", "--logit_bias", "give a table of token id: bias")
    if len(bias) > MOST_BIASES:
        raise InputError(
            f"logit_bias has {len(bias):,} entries", "--logit_bias", f"give at most {MOST_BIASES:,}"
        )
    for token, value in bias.items():
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise InputError(
                f"logit_bias names {_short(token)}", "--logit_bias", "give token ids: whole numbers from 0"
            )
        if not BIAS_BOUNDS.admit(value):
            raise InputError(
                f"logit_bias of token {token} is {_short(value)}",
                "--logit_bias",
                f"give a number {BIAS_BOUNDS}",
            )


def require_tokens(config: GenerationConfig, vocab_size: int) -> None:
    """Refuse a logit_bias for an id that is no token of the model.

    Raises:
        InputError: there is one.
    """
    largest = max(config.logit_bias, default=0)
    if largest >= vocab_size:
        raise InputError(
            f"logit_bias names token {_short(largest)} in a vocabulary of {vocab_size:,}", "--logit_bias",
            "use the model's tokenizer",
        )  # fmt: skip


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

    The token that crosses the border stays, so at least one always does; of equal ones at the border the first.
    """

    def rule(tokens: Tensor, logits: Tensor) -> Tensor:
        total = logits.logsumexp(-1, keepdim=True)
        # Sorting a large vocabulary takes longer than reading with a small model: mostly its head is enough.
        likely = torch.topk(logits, min(NUCLEUS, logits.shape[-1])).values
        before = _mass_before(likely, total)
        if bool((before[..., -1] < mass).any()):
            likely = torch.sort(logits, descending=True).values
            before = _mass_before(likely, total)
        count = (before < mass).sum(-1, keepdim=True).clamp_(min=1)
        border = likely.gather(-1, count - 1)
        above, equal = logits > border, logits == border
        room = count - above.sum(-1, keepdim=True)
        return logits.masked_fill(~(above | (equal & (equal.cumsum(-1) <= room))), FORBIDDEN)

    return rule


def _mass_before(likely: Tensor, total: Tensor) -> Tensor:
    """The probability of all tokens likelier than each, of logits in falling order."""
    probabilities = (likely - total).exp()
    return probabilities.cumsum(-1) - probabilities


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


def penalize_occurrence(presence: float, frequency: float, prompt_length: int) -> LogitRule:
    """A token of the answer loses `presence` once and `frequency` per time that it occurred there.

    OpenAI's definition (API reference, "Frequency and presence penalties"): logit - frequency · count
    - presence · [count > 0], counted in tokens[..., prompt_length:] alone.
    """

    def rule(tokens: Tensor, logits: Tensor) -> Tensor:
        answer = tokens[..., prompt_length:]
        counts = torch.zeros_like(logits).scatter_add(-1, answer, torch.ones_like(answer, dtype=logits.dtype))
        return logits - frequency * counts - presence * (counts > 0)

    return rule


def add_bias(bias: Mapping[int, float]) -> LogitRule:
    """What is asked for is added to the logits of some tokens."""
    ids, values = torch.tensor(list(bias)), torch.tensor(list(bias.values()), dtype=torch.float64)

    def rule(tokens: Tensor, logits: Tensor) -> Tensor:
        return logits.index_add(-1, ids.to(logits.device), values.to(logits).expand(*logits.shape[:-1], -1))

    return rule


def logit_rules(config: GenerationConfig, prompt_length: int = 0) -> list[LogitRule]:
    """The rules a config asks for, in the order they apply; rules that would change nothing are left out.

    Bias, repetition, occurrence, temperature, top-k, top-p, min-p: each sees what those before it left. The order of
    transformers and of vLLM (except that vLLM takes min-p before top-k and top-p). What a constraint forbids is
    forbidden before all of them.

    Args:
        config: what is asked for.
        prompt_length: how many of the tokens are the prompt's: presence and frequency are counted after them.
    """
    rules = []
    if config.logit_bias:
        rules.append(add_bias(config.logit_bias))
    if config.repetition_penalty != 1:
        rules.append(penalize_repetition(config.repetition_penalty))
    if config.presence_penalty or config.frequency_penalty:
        rules.append(penalize_occurrence(config.presence_penalty, config.frequency_penalty, prompt_length))
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


@dataclass
class Sampler:
    """How one answer's tokens are chosen; the generator's state is the answer's own, whatever else is in a batch.

    Args:
        config: what is asked for.
        rules: `logit_rules` of the config and the prompt's length.
        generator: a CPU generator seeded with the config's seed; one number is drawn per token.
    """

    config: GenerationConfig
    rules: Sequence[LogitRule]
    generator: torch.Generator

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token is taken, as the model has it."""
        return self.config.temperature == 0 and not self.rules

    def choose(self, tokens: Tensor, logits: Tensor, allowed: Tensor | None = None) -> Tensor:
        """One token id: tokens [T] so far, logits [vocab_size], and which tokens a constraint allows, bool [vocab_size]."""
        if allowed is not None:
            logits = logits.masked_fill(~allowed, FORBIDDEN)
        return choose(apply_rules(self.rules, tokens, logits), self.config, self.generator)


def make_sampler(config: GenerationConfig, prompt_length: int) -> Sampler:
    """The sampler of an answer that follows a prompt of so many tokens."""
    rules = logit_rules(config, prompt_length)
    return Sampler(config, rules, torch.Generator().manual_seed(config.seed))


def likeliest(logits: Tensor, wanted: Mapping[int, int]) -> dict[int, list[tuple[int, float]]]:
    """Ids and probabilities of the likeliest tokens of some rows, as many as each wants: row -> [(id, probability)].

    Rows that want equally many are done in one call: which of equally likely tokens come first depends on the number.
    """
    found = {}
    for count in {count for count in wanted.values() if count}:
        rows = [row for row, own in wanted.items() if own == count]
        top = logits[rows].softmax(-1).topk(min(count, logits.shape[1]))
        for row, ids, chances in zip(rows, top.indices.tolist(), top.values.tolist(), strict=True):
            found[row] = list(zip(ids, chances, strict=True))
    return found


def odds(logits: Tensor, chosen: Tensor) -> Tensor:
    """Id, log-probability, rank and entropy (nats) of a token per row under softmax(logits): float64 [R, 4]."""
    logs = logits.log_softmax(-1)
    rank = (logits > logits.gather(1, chosen[:, None])).sum(-1) + 1
    terms = (logs.exp() * logs).nan_to_num_(0.0)  # 0 · log 0 is 0
    # A single long row would be shared out among the threads, and added up in another order than one of many.
    even = terms.shape[1] // SPAN * SPAN
    entropy = -(terms[:, :even].unflatten(1, (-1, SPAN)).sum(-1).sum(-1) + terms[:, even:].sum(-1))
    told = logs.gather(1, chosen[:, None])[:, 0]
    return torch.stack([chosen.double(), told.double(), rank.double(), entropy.double()], dim=1)


def expand(config: GenerationConfig) -> list[GenerationConfig]:
    """One config per answer that has to be written: `best_of` or `n` of them, each with a seed of its own.

    The first keeps the seed, so that asking for more answers does not change it.
    """
    count = config.best_of or config.n
    return [
        replace(config, seed=_derive_seed(config.seed, index), n=1, best_of=None) for index in range(count)
    ]


def _derive_seed(seed: int, index: int) -> int:
    digest = hashlib.sha256(f"{seed}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1 if index else seed


def rank_answers(probabilities: Sequence[Sequence[float]], count: int) -> list[int]:
    """The numbers of the `count` answers with the largest mean log-probability, best first; the earlier of equals.

    Args:
        probabilities: of each answer, the probabilities of its tokens under the model itself; none empty.
        count: how many to keep.
    """

    def mean(answer: int) -> float:
        chances = probabilities[answer]
        return sum(math.log(max(chance, 1e-300)) for chance in chances) / len(chances)

    return sorted(range(len(probabilities)), key=lambda answer: -mean(answer))[:count]
