"""The task of translation: pairs of sentences, BLEU and chrF, and a word-by-word dictionary as the program to beat.

The dictionary is learned from the training pairs: IBM's first model (Brown et al. 1993), which asks only which words go
together. Knows no model.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from glasshouse.tasks.metrics import bleu, chrf
from glasshouse.tasks.task import Score, Task, TaskExample
from glasshouse.text.pairs import read_pairs

WORD = re.compile(r"[\u3040-\u9fff]|[^\W\u3040-\u9fff]+(?:['’-]\w+)*|[^\w\s]")
ITERATIONS = 8


def read_translations(paths: Sequence[Path]) -> list[TaskExample]:
    """Pairs as examples; see `text.pairs.read_pairs` for the formats and what is refused."""
    found = read_pairs(paths).pairs
    return [
        TaskExample(pair.source, (pair.target,), f"{paths[0].name}:{row}")
        for row, pair in enumerate(found, 1)
    ]


def score_translations(answers: Sequence[str], examples: Sequence[TaskExample]) -> list[Score]:
    """BLEU (cased, detokenized), BLEU (lower-cased) and chrF."""
    references = [example.targets[0] for example in examples]
    return [bleu(answers, references), bleu(answers, references, True), chrf(answers, references)]


def translate_by_dictionary(train: Sequence[TaskExample], sources: Sequence[str]) -> list[str]:
    """Each word by the likeliest word for it in the training pairs; a word that was never seen stays as it is."""
    dictionary = learn_dictionary([(example.source, example.targets[0]) for example in train])
    return [join_words([dictionary.get(word, word) for word in split_words(source)]) for source in sources]


def split_words(text: str) -> list[str]:
    """Words, numbers and single punctuation marks; a Chinese or Japanese character is a word."""
    return WORD.findall(text)


def join_words(words: Sequence[str]) -> str:
    """Words as a line: no space before punctuation, none between Chinese characters."""
    line = " ".join(word for word in words if word)
    line = re.sub(r" ([.,;:!?)\]}。，！？；：])", r"\1", line)
    return re.sub(r"(?<=[\u3000-\u9fff！？，。]) (?=[\u3000-\u9fff！？，。])", "", line)


def learn_dictionary(pairs: Sequence[tuple[str, str]], iterations: int = ITERATIONS) -> dict[str, str]:
    """The likeliest word of the target language for each word of the source language.

    IBM's first model by expectation maximization: each target word comes from one word of its source sentence, or from
    none (the empty word), all positions equally likely beforehand.

    Args:
        pairs: sentences that say the same.
        iterations: of the estimation.
    """
    source_ids: dict[str, int] = {"": 0}
    target_ids: dict[str, int] = {}
    sources, targets, slots = [], [], []
    slot = 0
    for source, target in pairs:
        given = [0, *(source_ids.setdefault(word, len(source_ids)) for word in split_words(source))]
        for word in split_words(target):
            number = target_ids.setdefault(word, len(target_ids))
            sources += given
            targets += [number] * len(given)
            slots += [slot] * len(given)
            slot += 1
    if not targets:
        return {}
    from_word, to_word, of_slot = np.array(sources), np.array(targets), np.array(slots)
    links, link = np.unique(from_word * len(target_ids) + to_word, return_inverse=True)
    linked = links // len(target_ids)
    probability = np.ones(len(links))
    for _ in range(iterations):
        weight = probability[link]
        share = weight / np.bincount(of_slot, weight)[of_slot]
        count = np.bincount(link, share)
        probability = count / np.bincount(linked, count)[linked]
    source_words, target_words = list(source_ids), list(target_ids)
    best: dict[str, str] = {}
    for place in np.argsort(probability, kind="stable"):  # the last one written is the likeliest
        best[source_words[linked[place]]] = target_words[links[place] % len(target_ids)]
    best.pop("", None)
    return best


def count_overlap(train: Sequence[TaskExample], test: Sequence[TaskExample]) -> tuple[int, int]:
    """How many test examples have their source, and how many the whole pair, among the training examples; case and
    spaces aside."""
    sources = {_plain(example.source) for example in train}
    whole = {(_plain(example.source), _plain(example.targets[0])) for example in train}
    shared = sum(_plain(example.source) in sources for example in test)
    return shared, sum((_plain(example.source), _plain(example.targets[0])) in whole for example in test)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


TRANSLATION = Task(
    "translation",
    read_translations,
    lambda example: example.source,
    score_translations,
    translate_by_dictionary,
)
