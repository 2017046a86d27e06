"""The task of translation: scores that are the reference library's own, a dictionary, overlap."""

import numpy as np
import pytest
import sacrebleu

from glasshouse.errors import InputError
from glasshouse.tasks.metrics import bleu, chrf
from glasshouse.tasks.task import Score, TaskExample
from glasshouse.tasks.translation import (
    TRANSLATION,
    count_overlap,
    join_words,
    learn_dictionary,
    split_words,
)

RIGHT = ["Ein Mann fährt Fahrrad.", "Zwei Hunde rennen im Park.", "Eine Frau liest ein Buch."] * 5
ANSWERS = ["Ein Mann fährt ein Fahrrad.", "zwei Hunde laufen im Park.", "Eine Frau liest."] * 5


def test_scores_are_sacrebleus():
    assert bleu(ANSWERS, RIGHT).value == sacrebleu.corpus_bleu(ANSWERS, [RIGHT]).score
    assert bleu(ANSWERS, RIGHT, True).value == sacrebleu.corpus_bleu(ANSWERS, [RIGHT], lowercase=True).score
    assert chrf(ANSWERS, RIGHT).value == sacrebleu.corpus_chrf(ANSWERS, [RIGHT]).score
    chinese = ["我 喜欢 猫。", "他在看书"]
    assert bleu(["我喜欢狗。", "他在读书"], chinese).value == pytest.approx(
        sacrebleu.corpus_bleu(["我喜欢狗。", "他在读书"], [chinese], tokenize="zh").score
    )


def test_intervals_hold_the_figure_and_narrow_with_more_lines():
    right, answers = (
        [*lines, "Der große Hund rennt schnell durch den Park."] for lines in (RIGHT[:5], ANSWERS[:5])
    )
    few, many = bleu(answers, right), bleu(answers * 8, right * 8)
    assert few.value == pytest.approx(many.value)
    assert few.low < few.value < few.high
    assert many.high - many.low < few.high - few.low
    assert str(Score("BLEU", 36.04, 35.0, 37.06)) == "BLEU 36.0 [35.0, 37.1]"


def test_sides_of_different_length_are_refused():
    with pytest.raises(InputError, match="2 answers and 1 references"):
        bleu(["a", "b"], ["a"])


def test_words_and_their_joining():
    assert split_words("It's a well-known fact, 3.5 猫猫!") == ["It's", "a", "well-known", "fact", ",", "3", ".", "5", "猫", "猫", "!"]  # fmt: skip
    assert join_words(["Ein", "Hund", ",", "zwei", "Hunde", "."]) == "Ein Hund, zwei Hunde."
    assert join_words(["我", "喜", "欢", "猫", "。"]) == "我喜欢猫。"


def plain_model_one(pairs, iterations):
    """IBM's first model written out, one link at a time."""
    table: dict[tuple[str, str], float] = {}
    for _ in range(iterations):
        count: dict[tuple[str, str], float] = {}
        for source, target in pairs:
            given = ["", *split_words(source)]
            for word in split_words(target):
                norm = sum(table.get((e, word), 1.0) for e in given)
                for e in given:
                    count[e, word] = count.get((e, word), 0.0) + table.get((e, word), 1.0) / norm
        totals: dict[str, float] = {}
        for (e, _), value in count.items():
            totals[e] = totals.get(e, 0.0) + value
        table = {key: value / totals[key[0]] for key, value in count.items()}
    return table


def test_the_dictionary_is_that_of_ibms_first_model():
    draw = np.random.default_rng(0)
    nouns = [("cat", "Katze"), ("dog", "Hund"), ("bird", "Vogel"), ("cow", "Kuh")]
    verbs = [("sees", "sieht"), ("hears", "hört"), ("likes", "mag")]
    pairs = []
    for _ in range(60):
        a, v, b = nouns[draw.integers(4)], verbs[draw.integers(3)], nouns[draw.integers(4)]
        pairs.append((f"the {a[0]} {v[0]} the {b[0]} .", f"{a[1]} {v[1]} {b[1]} ."))
    found = learn_dictionary(pairs, 5)
    assert {word: found[word] for word, _ in nouns + verbs} == dict(nouns + verbs)
    table = plain_model_one(pairs, 5)
    for word, answer in found.items():
        best = max(value for (e, _), value in table.items() if e == word)
        assert table[word, answer] == pytest.approx(best, rel=1e-9)
    examples = [TaskExample(source, (target,)) for source, target in pairs]
    assert TRANSLATION.baseline(examples, ["cow likes bird quickly ."]) == ["Kuh mag Vogel quickly."]
    assert learn_dictionary([]) == {}


def test_overlap_counts_sources_and_whole_pairs():
    train = [TaskExample("A cat", ("Eine Katze",)), TaskExample("Two dogs", ("Zwei Hunde",))]
    test = [
        TaskExample("a  cat", ("eine Katze",)),
        TaskExample("Two dogs", ("Zwei Rüden",)),
        TaskExample("x", ("y",)),
    ]
    assert count_overlap(train, test) == (2, 1)


def test_examples_are_read_asked_and_scored(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("".join(f"source {n}\t{line}\n" for n, line in enumerate(RIGHT)))
    examples = TRANSLATION.read([path])
    assert TRANSLATION.prompt(examples[2]) == "source 2"
    assert examples[2].row == "a.tsv:3"
    values = {score.name: score.value for score in TRANSLATION.score(RIGHT, examples)}
    assert values == {
        "BLEU": pytest.approx(100),
        "BLEU, lower-cased": pytest.approx(100),
        "chrF": pytest.approx(100),
    }
