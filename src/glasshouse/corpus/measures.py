"""What the quality rules measure in one text: words, lines, repeats, shares. Pure functions of text and language.

Where words are not separated by spaces, characters are counted: 1.6 to a word, n-grams twice as long. It knows no
limits and drops nothing.
"""

import re
import zlib
from collections.abc import Callable
from functools import cached_property

import numpy as np

from glasshouse.corpus.language import CHARACTERS_PER_WORD, convention, count_sentences, split_words

PARAGRAPH_BREAK, LINE_BREAK = re.compile(r"\n{2,}"), re.compile("\n+")
TERMINAL = (
    ".",
    "?",
    "!",
    "‼",
    "‽",
    "⁇",
    "⁈",
    "⁉",
    "。",
    "！",
    "？",
    "．",
    "｡",
    "।",
    "॥",
    "؟",
    "۔",
    "።",
    "։",
    "។",
    "။",
)
ALPHANUMERIC = bytes(code for code in range(128) if chr(code).isalnum())
SPACES = bytes(code for code in range(128) if chr(code).isspace())
OTHER_SPACES = "\x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
LOOK = 10**6  # characters that are looked through for a loop
UNBROKEN = re.compile(r"\S{1000,}")


class View:
    """One text as the rules look at it: its words, lines and paragraphs, each computed once.

    Args:
        text: the text.
        language: two-letter code, "" when unknown.
    """

    def __init__(self, text: str, language: str):
        self.text, self.language, self.convention = text, language, convention(language)

    @cached_property
    def words(self) -> list[str]:
        """Words and punctuation marks."""
        return split_words(self.text)

    @cached_property
    def plain_words(self) -> list[str]:
        """The words that are no punctuation."""
        return [word for word in self.words if any(map(str.isalnum, word))]

    @cached_property
    def lines(self) -> list[str]:
        """The lines, empty ones included."""
        return self.text.splitlines() or [""]

    @cached_property
    def filled_lines(self) -> list[str]:
        """The lines that are not blank."""
        return [line for line in self.text.split("\n") if line.strip()]

    @cached_property
    def word_count(self) -> float:
        """Words, punctuation included; where characters are counted, their number over 1.6."""
        return len(self.words) / (CHARACTERS_PER_WORD if self.convention.by_character else 1)

    @cached_property
    def numbered(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 [words] numbers of the words, equal for equal words, and int64 [words] their lengths."""
        numbers: dict[str, int] = {}
        ids = np.array([numbers.setdefault(word, len(numbers)) for word in self.words], np.int64)
        return ids, np.array([len(word) for word in self.words], np.int64)

    def grams(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Hash uint64 [grams] and size int64 [grams] of every run of `length` words (by character twice that)."""
        ids, sizes = self.numbered
        length *= 2 if self.convention.by_character else 1
        if len(ids) < length:
            return np.empty(0, np.uint64), np.empty(0, np.int64)
        count = len(ids) - length + 1
        hashes = np.zeros(count, np.uint64)
        for offset in range(length):
            hashes = (hashes ^ ids[offset : offset + count].view(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
            hashes ^= hashes >> np.uint64(29)
        ends = np.concatenate([[0], np.cumsum(sizes)])
        return hashes, ends[length:] - ends[:-length]


def repeated(parts: list[str]) -> tuple[int, int]:
    """How many parts repeat an earlier one, and their characters."""
    seen: set[str] = set()
    count = characters = 0
    for part in parts:
        if part in seen:
            count, characters = count + 1, characters + len(part)
        seen.add(part)
    return count, characters


def repeated_gram_share(view: View, length: int) -> float:
    """Share of characters in n-grams that repeat an earlier one; a repeat is stepped over whole, as Gopher counts."""
    hashes, sizes = view.grams(length)
    if not len(hashes):
        return 0.0
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    origin = first[inverse]
    candidates = np.flatnonzero(origin < np.arange(len(hashes)))
    if not len(candidates):
        return 0.0
    stride = length * (2 if view.convention.by_character else 1)
    free, characters = 0, 0
    skipped, added = np.zeros(len(hashes) + stride, bool), set()
    for position in candidates.tolist():
        if position < free:
            continue
        gram = int(origin[position])
        if not skipped[gram] or gram in added:
            characters += int(sizes[position])
            free = position + stride
            skipped[position + 1 : free] = True
        else:
            added.add(gram)
    return characters / len(view.text)


def top_gram_share(view: View, length: int) -> float:
    """Share of characters in the most frequent n-gram (the spaces within it included)."""
    hashes, sizes = view.grams(length)
    if not len(hashes):
        return 0.0
    _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
    best = int(first[counts == counts.max()].min())
    spaces = 0 if view.convention.by_character else length - 1
    return (int(sizes[best]) + spaces) * int(counts.max()) / len(view.text)


def mean_word(view: View) -> float:
    """Mean characters of the words that are no punctuation."""
    words = view.plain_words
    return sum(map(len, words)) / len(words) if words else 0.0


def plain_word_count(view: View) -> float:
    """Words that are no punctuation; characters over 1.6 where words are not separated."""
    return len(view.plain_words) / (CHARACTERS_PER_WORD if view.convention.by_character else 1)


def alphabetic_share(view: View) -> float:
    """Share of words and marks that have a letter."""
    return sum(any(map(str.isalpha, word)) for word in view.words) / max(1, len(view.words))


def readable_share(view: View) -> float:
    """Share of letters, digits and marks in what is not white space; 1 for short texts, which may be anything."""
    if len(view.text) < 200:
        return 1.0
    plain = view.text.encode("ascii", "ignore")
    solid = plain.translate(None, SPACES)
    dense = len(view.text) - (len(plain) - len(solid))
    if len(plain) < len(view.text):
        dense -= sum(map(view.text.count, OTHER_SPACES))
    # Outside ASCII everything but punctuation is taken for a letter: combining marks are no `isalnum`.
    signs = len(solid.translate(None, ALPHANUMERIC))
    return (dense - signs) / max(1, dense)


def unbroken_share(view: View) -> float:
    """Share of ASCII characters in runs of 1,000 or more without white space."""
    text = view.text
    if view.convention.by_character or len(text) < 1000:
        return 0.0
    # A run of 1,000 covers a whole block of 500: with a space in each, as in most texts, there is none.
    if all(text.find(" ", at, at + 500) >= 0 for at in range(0, len(text) - 499, 500)):
        return 0.0
    return sum(len(run) for run in UNBROKEN.findall(text) if run.isascii()) / len(text)


def loop_share(view: View) -> float:
    """Share of characters (spaces left out) in repeated 10-grams, for texts long enough to be a loop rather than a refrain.

    A text that zlib cannot press to a quarter has no such loop within 32 kB, and is not looked at closely.
    """
    if len(view.text) < 1000:
        return 0.0
    if len(view.text) > LOOK:
        view = View(view.text[:LOOK], view.language)
    data = view.text.encode("utf-8", "replace")
    if len(zlib.compress(data, 1)) >= 0.25 * len(data):
        return 0.0
    return repeated_gram_share(view, 10) * len(view.text) / max(1, int(view.numbered[1].sum()))


def share_of_lines(view: View, test: Callable[[str], bool]) -> float:
    """Share of lines that pass a test."""
    return sum(map(test, view.lines)) / len(view.lines)


def starts_with_bullet(line: str) -> bool:
    """Whether a line is a list item."""
    return line.lstrip().startswith(("•", "-"))


def ends_in_ellipsis(line: str) -> bool:
    """Whether a line ends in three dots."""
    return line.rstrip().endswith(("...", "…"))


def stop_words(view: View) -> float:
    """How many different stop words of the language occur; infinite where no list is known."""
    known = view.convention.stop_words
    return len(known.intersection(view.words)) if known else float("inf")


def short_line_share(view: View) -> float:
    """Share of lines of 30 characters or fewer (12 by character)."""
    short = 30 / (CHARACTERS_PER_WORD * 1.5 if view.convention.by_character else 1)
    return sum(len(line) <= short for line in view.filled_lines) / max(1, len(view.filled_lines))


def finished_line_share(view: View) -> float:
    """Share of lines that end like a sentence; outside English a closing quotation mark may follow."""
    closing = "" if view.language == "en" else "\"'”’»」』）)"
    lines = view.filled_lines
    return sum(line.rstrip(closing).endswith(TERMINAL) for line in lines) / max(1, len(lines))


def repeated_line_share(view: View) -> float:
    """Share of characters in lines that repeat an earlier one."""
    return repeated(view.filled_lines)[1] / max(1, len(view.text.replace("\n", "")))


def sentence_count(view: View) -> float:
    """Sentences, line by line."""
    return sum(map(count_sentences, view.filled_lines))


def paragraphs(view: View) -> list[str]:
    """Parts between blank lines."""
    return PARAGRAPH_BREAK.split(view.text.strip())


def broken_lines(view: View) -> list[str]:
    """Parts between line breaks."""
    return LINE_BREAK.split(view.text)


def lacks_end(view: View, line: str) -> bool:
    """Whether a line does not end like a sentence."""
    return not line.endswith(view.convention.terminal) or line.endswith("...")


def is_short(view: View, line: str) -> bool:
    """Whether a line has fewer than three words."""
    if view.convention.by_character:
        return len("".join(line.split())) < 3 * CHARACTERS_PER_WORD
    return len(line.split()) < 3


def has_long_word(view: View, line: str) -> bool:
    """Whether a line has a word of more than 1,000 characters."""
    return not view.convention.by_character and any(len(word) > 1000 for word in line.split())


def outside(view: View) -> float:
    """How far the mean length of a word lies outside what the language allows; 0 inside, or where none is known."""
    if view.convention.mean_word is None:
        return 0.0
    shortest, longest = view.convention.mean_word
    return max(0.0, shortest - mean_word(view), mean_word(view) - longest)
