"""Finding training texts that share a long n-gram with texts a model will be evaluated on.

GPT-3's rule (arXiv 2005.14165, appendix C): 13 words in a row, in lower case, without punctuation. In scripts without
spaces 20 characters stand for 13 words. An evaluation text too short for that is looked for whole, if it has at least
8 words or 12 characters. It does not find paraphrases or translations: nothing that counts n-grams does.

datatrove's block is not used: its index needs the lighteval package and its tasks, and spaCy to split words.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from glasshouse.text.deduplicate import grams, read_units

SHORTEST_WORDS, SHORTEST_CHARACTERS = 8, 12


class EvaluationIndex:
    """Hashes of the n-grams of evaluation texts, 8 bytes each.

    Args:
        texts: the evaluation texts.
        ngram: words in a row that count as overlap.
        ngram_characters: the same in scripts without spaces.
    """

    def __init__(self, texts: Iterable[str], ngram: int = 13, ngram_characters: int = 20):
        found: dict[int, list[np.ndarray]] = {}
        for text in texts:
            units = read_units([text])
            count, spaced = len(units.hashes), units.by_character.mean() <= 0.5 if len(units.hashes) else True
            length, shortest = (ngram, SHORTEST_WORDS) if spaced else (ngram_characters, SHORTEST_CHARACTERS)
            if count >= shortest:
                length = min(length, count)
                found.setdefault(length, []).append(grams(units, length)[0])
        self.hashes = {length: np.unique(np.concatenate(parts)) for length, parts in sorted(found.items())}

    def find(self, texts: Sequence[str]) -> list[str]:
        """For each text the first n-gram that it shares with an evaluation text, as it stands there; "" for none."""
        units = read_units(texts)
        overlaps = [""] * len(texts)
        edges = np.cumsum([0, *(len(text) + 1 for text in texts)])
        for length, index in self.hashes.items():
            hashes, at = grams(units, length)
            place = np.minimum(np.searchsorted(index, hashes), len(index) - 1)
            for unit in at[index[place] == hashes].tolist():
                text = int(np.searchsorted(units.starts, unit, side="right")) - 1
                if not overlaps[text]:
                    first, last = units.first[unit] - edges[text], units.last[unit + length - 1] - edges[text]
                    overlaps[text] = texts[text][first:last]
        return overlaps
