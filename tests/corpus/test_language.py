import csv
import gzip
from collections import Counter
from pathlib import Path

import pytest

from glasshouse.corpus import language as module
from glasshouse.corpus.language import (
    convention,
    count_sentences,
    identify_language,
    normalise_code,
    split_words,
)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The old man and the sea is a book that he had to read when he was at school.", "en"),
        ("我们去公园玩。", "zh"),
        ("猫", "zh"),
        ("これは猫です。", "ja"),
        ("고양이가 자고 있어요.", "ko"),
        ("Η γάτα κοιμάται.", "el"),
        (
            "The word 猫 means cat, and it is one of the first that a child will learn to write at school.",
            "en",
        ),
        ("GPT 是一种语言模型，由 OpenAI 公司开发。", "zh"),
        ("Die Katze ist nicht im Haus, sie ist auf dem Dach und schläft in der Sonne.", "de"),
        ("42", ""),
        ("", ""),
        ("ok", ""),
    ],
)
def test_identify_language(text: str, language: str):
    assert identify_language(text) == language


def test_accuracy_on_twelve_languages(shared_data: Path):
    with gzip.open(shared_data / "mt/flores200_dev_12langs.tsv.gz", "rt", encoding="utf-8") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    pytest.importorskip("lingua")
    counts: Counter[str] = Counter()
    for column, name in enumerate(rows[0]):
        found = Counter(identify_language(row[column]) for row in rows[1:120])
        right = found[normalise_code(name)]
        assert right > 0.9 * found.total(), (name, found)
        counts.update(right=right, unknown=found[""], wrong=found.total() - right - found[""])
    assert counts["right"] > 0.97 * counts.total(), counts
    assert counts["wrong"] < 0.01 * counts.total(), counts


def test_without_lingua_few_are_wrong(shared_data: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "lingua_detector", lambda: None)
    with gzip.open(shared_data / "mt/flores200_dev_12langs.tsv.gz", "rt", encoding="utf-8") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    answers = [
        (normalise_code(rows[0][c]), identify_language(text))
        for row in rows[1:300]
        for c, text in enumerate(row)
    ]
    wrong = sum(found not in ("", truth) for truth, found in answers)
    assert wrong < 0.005 * len(answers)
    assert sum(found == truth for truth, found in answers) > 0.65 * len(answers)


@pytest.mark.parametrize(
    ("stated", "code"),
    [
        ("zh-Hans", "zh"),
        ("zho_Hans", "zh"),
        ("EN_us", "en"),
        ("eng", "en"),
        ("swh_Latn", "sw"),
        ("", ""),
        ("yue", "yue"),
    ],
)
def test_normalise_code(stated: str, code: str):
    assert normalise_code(stated) == code


def test_words_and_sentences():
    assert split_words("Don't stop, 3.5 km!") == ["Don't", "stop", ",", "3", ".", "5", "km", "!"]
    assert split_words("我爱GPT。") == ["我", "爱", "GPT", "。"]
    assert split_words("कि मैं") == ["कि", "मैं"]
    assert count_sentences("One. Two! Three?") == 3
    assert count_sentences("他说：“好。”然后走了。没有人") == 3
    assert count_sentences("no end") == 1
    assert count_sentences("3.5 is a number.") == 1
    assert count_sentences("") == 0


def test_conventions():
    assert convention("zh").by_character
    assert not convention("en").by_character
    assert convention("en").mean_word == (3.0, 10.0)
    assert convention("zh").mean_word is None
    assert convention("").stop_words == frozenset()
    assert convention("de").stop_words >= {"und", "der"}
