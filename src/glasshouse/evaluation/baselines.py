"""What a model must beat: an n-gram language model over the same token ids, with modified Kneser-Ney smoothing.

Knows token ids and where documents end; nothing of text. Counting and scoring are array operations: each distinct
n-gram is a node of a tree, a child is found by (parent, token) in one sorted array per order, and the node of the
k tokens that end at a position comes from the node of the k-1 tokens that end one position earlier.

Source: Chen and Goodman 1999, "An empirical study of smoothing techniques for language modeling", section 3.3,
interpolated, with the lower-order counts and document starts as KenLM has them (Heafield et al. 2013).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from glasshouse.errors import InputError
from glasshouse.inference.sampling import GenerationConfig, apply_rules, choose, logit_rules

FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)
"""For orders with too few n-grams to estimate discounts from; KenLM's --discount_fallback."""


@dataclass(frozen=True)
class Order:
    """The n-grams of one order, as children of those one token shorter.

    Args:
        keys: int64 [n], sorted: parent * vocab_size + last token; a node's number is its place here. Order 1 has no
            keys: there is a node for every token.
        probability: float32 [n]: discounted count over the parent's total; for order 1, with the uniform share.
        backoff: float32 [n]: what a node, as a context, leaves to the shorter context; 1 for one that was never one.
    """

    keys: np.ndarray
    probability: np.ndarray
    backoff: np.ndarray


@dataclass(frozen=True)
class NgramModel:
    """An n-gram model; made by `train_ngram`.

    Args:
        vocab_size: number of tokens.
        end_of_document: the token that closes a document; also the context of a document's first token.
        orders: orders[k - 1] holds the k-grams.
        discounts: D1, D2 and D3+ of each order.
        tokens: how many tokens were counted.
    """

    vocab_size: int
    end_of_document: int
    orders: Sequence[Order] = field(repr=False)
    discounts: Sequence[tuple[float, float, float]]
    tokens: int

    def log_probabilities(self, tokens: np.ndarray) -> np.ndarray:
        """The log-probability, in nats, of each token given those before it in its document.

        Args:
            tokens: ids of one or more documents, [T]; the first follows a document's start, and each
                end_of_document starts another.

        Returns:
            float64 [T].

        Raises:
            InputError: an id is outside the vocabulary.
        """
        stream, depth = _stream([np.asarray(tokens)], self.vocab_size, self.end_of_document)
        depth, last = depth[1:], stream[1:]
        probability = self.orders[0].probability[last].astype(np.float64)
        node = stream.astype(np.int64)  # of the (length - 1)-gram that ends at each position, or -1
        for length, order in enumerate(self.orders[1:], start=2):
            context = np.where(depth >= length - 1, node[:-1], -1)
            found = _find(order.keys, context, last, self.vocab_size)
            own = _take(order.probability, found, 0.0)
            left = _take(self.orders[length - 2].backoff, context, 1.0)
            probability = own + left * probability
            node = np.concatenate([[-1], found])
        return np.log(probability)

    def distribution(self, context: Sequence[int]) -> np.ndarray:
        """The probability of every token after a document that begins with `context`: float64 [vocab_size]."""
        history = [self.end_of_document, *(int(token) for token in context)]
        history = history[_last(history, self.end_of_document) :]
        probability = self.orders[0].probability.astype(np.float64)
        for length in range(1, min(len(self.orders), len(history) + 1)):
            node = self._node(history[-length:])
            if node < 0:
                break
            order = self.orders[length]
            start, stop = np.searchsorted(order.keys, [node * self.vocab_size, (node + 1) * self.vocab_size])
            probability = probability * float(self.orders[length - 1].backoff[node])
            probability[order.keys[start:stop] - node * self.vocab_size] += order.probability[start:stop]
        return probability

    def sample(self, prompt: Sequence[int], config: GenerationConfig) -> Iterator[int]:
        """Draw tokens one at a time under the same rules as a model's, until end_of_document (which is yielded)."""
        tokens = [int(token) for token in prompt]
        rules, generator = logit_rules(config, len(tokens)), torch.Generator().manual_seed(config.seed)
        for _ in range(config.max_new_tokens):
            logits = torch.from_numpy(np.log(self.distribution(tokens)))
            logits = apply_rules(rules, torch.tensor(tokens, dtype=torch.int64), logits)
            token = int(choose(logits, config, generator))
            yield token
            if token == self.end_of_document:
                return
            tokens.append(token)

    def _node(self, tokens: Sequence[int]) -> int:
        """The node of an n-gram, or -1."""
        node = np.array([tokens[0]])
        for order, token in zip(self.orders[1:], tokens[1:], strict=False):
            node = _find(order.keys, node, np.array([token]), self.vocab_size)
        return int(node[0])


def train_ngram(
    documents: Iterable[np.ndarray], vocab_size: int, end_of_document: int, order: int = 5
) -> NgramModel:
    """Count and smooth an n-gram model.

    N-grams never cross a document's border; a document's first tokens are predicted from its start. Takes about
    80 bytes of memory per token while it counts.

    Args:
        documents: arrays of token ids, one or more documents each, every document closed by end_of_document (a last
            one that is not is closed here).
        vocab_size: number of tokens.
        end_of_document: the closing token.
        order: longest n-gram, at least 1.

    Raises:
        InputError: there are no tokens, an id is outside the vocabulary, or the order is below 1.
    """
    if order < 1:
        raise InputError(f"order is {order}", "n-gram baseline", "give an order of at least 1")
    stream, depth = _stream(documents, vocab_size, end_of_document)
    if len(stream) < 2:
        raise InputError("no tokens to count", "n-gram baseline", "give a training split that is not empty")
    levels = _count(stream, depth, vocab_size, order)
    orders: list[Order] = []
    discounts = []
    for keys, counts in levels:
        found = _discounts(counts)
        parents = keys // vocab_size if orders else np.zeros(vocab_size, np.int64)
        size = len(orders[-1].probability) if orders else 1
        total = np.bincount(parents, weights=counts, minlength=size)
        discounted = counts - np.array((0.0, *found))[np.minimum(counts, 3)]
        probability = discounted / total[parents]
        backoff = np.ones(size)
        freed = total - np.bincount(parents, weights=discounted, minlength=size)
        np.divide(freed, total, out=backoff, where=total > 0)
        if orders:
            orders[-1] = replace(orders[-1], backoff=backoff.astype(np.float32))
        else:  # unigrams are interpolated with the uniform distribution
            probability += backoff[0] / vocab_size
        orders.append(Order(keys, probability.astype(np.float32), np.ones(0, np.float32)))
        discounts.append(found)
    return NgramModel(vocab_size, end_of_document, orders, discounts, len(stream) - 1)


def _stream(
    documents: Iterable[np.ndarray], vocab_size: int, end_of_document: int
) -> tuple[np.ndarray, np.ndarray]:
    """One array of all tokens after a leading end_of_document, and the depth of each in its document, from 1.

    A document's start is the end_of_document before it: it has depth 0 as a start, and the length of its own
    document plus one as an end, which is the number given.
    """
    start_format = np.uint16 if end_of_document < 2**16 else np.uint32
    stream = np.concatenate([np.array([end_of_document], start_format), *documents])
    low, high = int(stream.min()), int(stream.max())
    if low < 0 or high >= vocab_size:
        raise InputError(
            f"token {low if low < 0 else high} in a vocabulary of {vocab_size}", "n-gram baseline",
            "score the tokens of the corpus that the model was trained on",
        )  # fmt: skip
    stream = stream.astype(np.int32)
    place = np.arange(len(stream), dtype=np.int32)
    start = np.maximum.accumulate(np.where(stream == end_of_document, place, 0))
    depth = np.zeros(len(stream), np.int32)
    depth[1:] = place[1:] - start[:-1]
    return stream, depth


def _count(
    stream: np.ndarray, depth: np.ndarray, vocab_size: int, order: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Keys and adjusted counts of each order.

    The adjusted count of an n-gram below the highest order is the number of different tokens that precede it; of one
    at a document's start, which nothing precedes, and of the highest order, it is how often it occurs.
    """
    levels: list[tuple[np.ndarray, np.ndarray]] = []
    node = stream.astype(np.int32)  # of the (length - 1)-gram that ends at each position
    size = vocab_size
    keys = np.arange(vocab_size, dtype=np.int64)
    raw = np.bincount(stream[1:], minlength=vocab_size)
    opening = np.zeros(vocab_size, bool)
    for length in range(2, order + 1):
        places = np.flatnonzero(depth >= length - 1).astype(np.int32)
        pairs = node[places - 1].astype(np.int64) * vocab_size + stream[places]
        unique, inverse, counts = _unique(pairs)
        del pairs
        first_at = np.empty(len(unique), np.int32)
        first_at[inverse] = places  # any place where it occurs
        # Each distinct n-gram is one token that precedes the n-gram without its first.
        preceded = np.bincount(node[first_at], minlength=size)
        levels.append((keys, np.where(opening, raw, preceded).astype(np.int32)))
        node = np.full(len(stream), -1, np.int32)
        node[places] = inverse
        opening = depth[first_at] == length - 1
        keys, raw, size = unique, counts, len(unique)
    levels.append((keys, raw.astype(np.int32)))
    return levels


def _unique(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sorted distinct values, the place of each value among them (int32), and how often each occurs."""
    order = np.argsort(values)
    ordered = values[order]
    new = np.empty(len(values), bool)
    new[:1] = True
    np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    starts = np.flatnonzero(new)
    inverse = np.empty(len(values), np.int32)
    inverse[order] = np.cumsum(new, dtype=np.int32) - 1
    return ordered[starts], inverse, np.diff(np.append(starts, len(values)))


def _find(keys: np.ndarray, parents: np.ndarray, tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """The node that is each parent's child by each token, or -1."""
    wanted = parents.astype(np.int64) * vocab_size + tokens
    if not len(keys):
        return np.full(len(wanted), -1)
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where((parents >= 0) & (keys[place] == wanted), place, -1)


def _take(values: np.ndarray, nodes: np.ndarray, otherwise: float) -> np.ndarray:
    """The value of each node, or `otherwise` where there is no node; float64."""
    if not len(values):
        return np.full(len(nodes), otherwise)
    return np.where(nodes >= 0, values[nodes].astype(np.float64), otherwise)


def _discounts(counts: np.ndarray) -> tuple[float, float, float]:
    """D1, D2 and D3+ from how many n-grams have counts 1, 2, 3 and 4 (Chen and Goodman, equation 26)."""
    one, two, three, four = (int((counts == number).sum()) for number in (1, 2, 3, 4))
    if min(one, two, three) == 0:
        return FALLBACK_DISCOUNTS
    base = one / (one + 2 * two)
    found = (1 - 2 * base * two / one, 2 - 3 * base * three / two, 3 - 4 * base * four / three)
    usable = all(0 <= value <= limit for value, limit in zip(found, (1, 2, 3), strict=True))
    return found if usable else FALLBACK_DISCOUNTS


def _last(tokens: Sequence[int], wanted: int) -> int:
    """The place of the last occurrence."""
    return len(tokens) - 1 - list(reversed(tokens)).index(wanted)
