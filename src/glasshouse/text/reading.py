"""Text as an encoder reads it: one or two texts between special tokens, and where words begin.

Knows tokenizers, and neither corpora nor models.
"""

import re
import unicodedata
from dataclasses import dataclass

import numpy as np
import tokenizers
from tokenizers import AddedToken

from glasshouse.text.tokenizer import Tokenizer

MASK = "<|mask|>"
"""What our encoders are shown in place of a hidden token."""
SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Reading:
    """A text, or two, with the special tokens that the tokenizer puts around them.

    Args:
        ids: token ids.
        token_types: 0, and 1 in the second text where the tokenizer tells them apart.
        parts: 0 for tokens of the first text, 1 for those of the second, None for special tokens.
        offsets: where each token begins and ends in its text, in characters.
    """

    ids: list[int]
    token_types: list[int]
    parts: list[int | None]
    offsets: list[tuple[int, int]]


def read_text(tokenizer: Tokenizer, text: str, second: str | None = None) -> Reading:
    """A text, or two (question and passage), as an encoder reads it; a special token spelled in it is text.

    Nothing is cut: the caller knows the model's length, and which part may be cut. Lone surrogates, which no
    vocabulary has, are read as U+FFFD.
    """
    text = SURROGATES.sub("\ufffd", text)
    second = None if second is None else SURROGATES.sub("\ufffd", second)
    encoded = tokenizer.plain.encode(text, second)
    return Reading(encoded.ids, encoded.type_ids, encoded.sequence_ids, encoded.offsets)


def with_mask(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer with a token that stands for a hidden one, as its last; itself where it has one.

    What ends a document in it also stands at the start and between two texts, as its template has it.
    """
    if tokenizer.mask is not None:
        return tokenizer
    backend = tokenizers.Tokenizer.from_str(tokenizer.plain.to_str())
    backend.add_special_tokens([AddedToken(MASK, special=True, normalized=False)])
    end = backend.id_to_token(tokenizer.end_of_document)
    settings = {**tokenizer.settings, "mask_token": MASK, "cls_token": end, "sep_token": end}
    return Tokenizer(backend, settings, tokenizer.chat_template)


@dataclass(frozen=True)
class Words:
    """Where words begin, told from token ids alone.

    In scripts with spaces a word is a run of letters, with the space before it; each sign, each number and each
    character of a script without spaces (Chinese, kana, Thai) begins a word of its own. WordPiece marks the pieces that
    go on with a word itself.

    Args:
        begins: bool [vocab_size]: the token begins a word wherever it stands.
        goes_on: bool [vocab_size]: it goes on with the word before it, wherever it stands.
        is_open: bool [vocab_size]: a token after it that neither begins a word nor must go on, goes on.
        is_special: bool [vocab_size]: it belongs to no word.
    """

    begins: np.ndarray
    goes_on: np.ndarray
    is_open: np.ndarray
    is_special: np.ndarray

    def starts(self, tokens: np.ndarray) -> np.ndarray:
        """Which of the tokens begin a word, special ones among them: int [rows, T] to bool [rows, T]."""
        before = np.zeros(tokens.shape, dtype=bool)
        before[:, 1:] = self.is_open[tokens[:, :-1]]
        starts = self.begins[tokens] | (~self.goes_on[tokens] & ~before)
        starts[:, :1] = True
        return starts


def words_of(tokenizer: Tokenizer) -> Words:
    """The table of a tokenizer's words."""
    count = tokenizer.vocab_size
    begins, goes_on, is_open = (np.zeros(count, dtype=bool) for _ in range(3))
    special = np.array([tokenizer.is_special(token) for token in range(count)])
    pieces = tokenizer.plain.decoder is not None and tokenizer.plain.decoder.__class__.__name__ == "WordPiece"
    for token in range(count):
        written = tokenizer.token_bytes(token)
        first, last = written[:4].decode("utf-8", "ignore")[:1], written[-4:].decode("utf-8", "ignore")[-1:]
        if special[token] or not written:
            begins[token] = True
        elif pieces:
            goes_on[token] = (tokenizer.plain.id_to_token(token) or "").startswith("##")
            begins[token] = not goes_on[token]
        else:
            goes_on[token] = 0x80 <= written[0] < 0xC0  # the inside of a character
            begins[token] = not goes_on[token] and not _is_letter(first) and not 0xC2 <= written[0] < 0xE0
            is_open[token] = written == b" " or _is_letter(last) or (not last and written[0] >= 0x80)
    return Words(begins, goes_on, is_open, special)


UNSPACED = ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x3400, 0x9FFF), (0xF900, 0xFAFF),
            (0x20000, 0x3FFFF))  # fmt: skip
"""Thai and Lao, Burmese, Khmer, kana, Chinese characters: scripts that put no spaces between words."""


def _is_letter(character: str) -> bool:
    """Whether a character is a letter, or a mark on one, of a script that puts spaces between words."""
    if not character or any(low <= ord(character) <= high for low, high in UNSPACED):
        return False
    return unicodedata.category(character)[0] in "LM"
