import itertools
import json
import lzma
import random
import secrets
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from glasshouse.corpus.language import count_sentences, split_words
from glasshouse.corpus.quality import (
    C4,
    FINEWEB,
    GOPHER_QUALITY,
    GOPHER_REPETITION,
    PROFILES,
    CleanRules,
    check_rules,
    choose_rules,
    judge,
)
from glasshouse.errors import InputError

STORIES = [
    "I see a cat.",
    "猫在睡觉。",
    "The sun is up. The sun is hot. The sun is up and the sun is hot.",
    "Brown bear, brown bear, what do you see? I see a red bird looking at me.\n" * 6,
    "The old woman pulled. The old man pulled. They pulled and pulled. But the turnip would not come up.\n"
    * 4,
    "小白兔，白又白，两只耳朵竖起来。爱吃萝卜爱吃菜，蹦蹦跳跳真可爱。",
    "床前明月光，疑是地上霜。\n举头望明月，低头思故乡。",
    "- milk\n- eggs\n- bread\n- a toy for the cat",
    "Q: What is 3 + 5?\nA: 8",
    "def add(a, b):\n    return a + b\n",
    "यह एक बिल्ली है।",
    "القطة نائمة.",
    "ดวงอาทิตย์ขึ้นแล้ว",
]
CHINESE = (
    "春天来了，公园里的花都开了。小明和妈妈一起去公园散步。他们看见很多人在湖边放风筝，风筝飞得很高。\n"
    "小明问妈妈：“为什么风筝能飞那么高呢？”妈妈笑着说：“因为有风，也因为有人牵着线。”\n"
    "后来他们在树下休息，吃了带来的水果和面包。一只小狗跑过来，摇着尾巴看着他们。小明分给它一块面包，小狗高兴极了。\n"
    "傍晚的时候，太阳慢慢落到山的后面，天空变成了红色。小明说，今天是他最快乐的一天，下个星期他还想再来。\n"
    "回家的路上，他们经过一家书店。妈妈给小明买了一本关于天空和风的书，晚上他读了很久才睡着。\n"
)


@pytest.mark.parametrize("text", STORIES)
def test_gentle_keeps_small_texts(text: str):
    for language in ("en", "zh", ""):
        assert judge(text, language, PROFILES["gentle"]).dropped_by == ""


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("--- *** ---", "no_text"),
        ("caf\ufffd\ufffd tr\ufffds", "broken_characters"),
        ("#=-+|" * 100 + "end", "few_letters"),
        ("QUJDREVGR0g" * 200, "unbroken_text"),
        ("buy it now " * 300, "repeated_text"),
        ("快来买快来买" * 400, "repeated_text"),
    ],
)
def test_gentle_drops_what_is_no_text(text: str, rule: str):
    language = "zh" if "买" in text else "en"
    assert judge(text, language, PROFILES["gentle"]).dropped_by == rule
    assert judge(
        text, language, choose_rules("gentle", tuple(PROFILES["gentle"][i].name for i in range(5)), {})
    ).text


def test_web_keeps_chinese_prose():
    judgement = judge(CHINESE, "zh", PROFILES["web"])
    assert judgement.dropped_by == ""
    assert judgement.text.count("\n") == 4
    assert judge(CHINESE, "en", PROFILES["web"]).dropped_by  # what English rules would do to it


def test_web_keeps_most_of_the_chinese_wikipedia(shared_data: Path):
    with lzma.open(shared_data / "pretrain_zh/wikipedia_zh.jsonl.xz", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in itertools.islice(file, 600)]
    dropped = Counter(judge(text, "zh", PROFILES["web"]).dropped_by for text in texts)
    assert dropped[""] > 0.8 * len(texts), dropped
    assert dropped["gopher_stop_words"] + dropped["gopher_word_length"] == 0
    gentle = Counter(judge(text, "zh", PROFILES["gentle"]).dropped_by for text in texts)
    assert gentle[""] == len(texts)


WORDS = [
    "the",
    "be",
    "to",
    "of",
    "and",
    "that",
    "have",
    "with",
    "dog",
    "house",
    "running",
    "blue",
    "seventeen",
]
WORDS += ["42", "3.5", "a", "I", "extraordinary", "#", "…", "..."]


def make_page(random: random.Random) -> str:
    """A page of random lines, some repeated, so that every rule has something to find."""
    vocabulary = random.sample(WORDS, random.randint(6, len(WORDS)))
    lines = []
    for _ in range(random.randint(1, 25)):
        line = " ".join(random.choices(vocabulary, k=random.randint(1, 30)))
        extras = ["terms of use", "JavaScript", "lorem ipsum", "{", "[3]", "x" * 1100]
        line += f" {random.choice(extras)}" if random.random() < 0.03 else ""
        line = (
            random.choice(["- ", "- ", "", "", ""])
            + line
            + random.choice([".", "!", "?", "...", "", ".", '"'])
        )
        lines.append(random.choice(lines) if lines and random.random() < 0.15 else line)
        lines.extend([""] * (random.random() < 0.2))
    return "\n".join(lines)


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """datatrove's filters, given our words and sentences: without them they want spaCy and its models."""
    pytest.importorskip("datatrove")
    from datatrove.pipeline.filters import c4_filters, fineweb_quality_filter
    from datatrove.pipeline.filters import gopher_quality_filter as quality
    from datatrove.pipeline.filters import gopher_repetition_filter as repetition

    for module in (fineweb_quality_filter, quality, repetition):
        monkeypatch.setattr(module, "split_into_words", lambda text, language: split_words(text))
    sentences = lambda text, language: [""] * count_sentences(text)  # noqa: E731
    monkeypatch.setattr(c4_filters, "split_into_sentences", sentences)
    return {
        "repetition": (repetition.GopherRepetitionFilter(), GOPHER_REPETITION),
        "quality": (quality.GopherQualityFilter(), GOPHER_QUALITY),
        "c4": (c4_filters.C4QualityFilter(), C4),
        "fineweb": (fineweb_quality_filter.FineWebQualityFilter(), FINEWEB),
    }


@pytest.mark.parametrize("name", ["repetition", "quality", "c4", "fineweb"])
def test_verdicts_equal_datatrove(name: str, blocks: dict[str, Any]):
    from datatrove.data import Document

    block, rules = blocks[name]
    seed, verdicts = secrets.randbelow(2**32), Counter()
    generator = random.Random(seed)
    for number in range(400):
        page = make_page(generator)
        if name == "quality":  # enough words to come past the first rule
            page = "\n".join([page] * generator.randint(1, 3))
        sample = Document(page, str(number))
        theirs = block.filter(sample)
        kept, reason = (theirs, "") if isinstance(theirs, bool) else theirs
        ours = judge(page, "en", rules)
        assert (ours.dropped_by == "") == kept, f"seed {seed}, page {number}: {reason} / {ours.dropped_by}"
        if kept:
            assert ours.text == (sample.text if name == "c4" else page), f"seed {seed}, page {number}"
        verdicts[ours.dropped_by] += 1
    assert len(verdicts) > 2, verdicts  # both verdicts, and more than one rule


def test_limits_can_be_changed_and_rules_left_out():
    text = "The cat and the dog went to the house with the blue door. " * 2
    assert judge(text, "en", choose_rules("web", (), {})).dropped_by
    skipped = tuple(rule.name for rule in PROFILES["web"] if rule.name != "gopher_short_document")
    assert judge(text, "en", choose_rules("web", skipped, {})).dropped_by == "gopher_short_document"
    assert judge(text, "en", choose_rules("web", skipped, {"gopher_short_document": 20})).dropped_by == ""
    assert judge(text, "en", choose_rules("none", (), {})).text == text


@pytest.mark.parametrize("text", ["", "\n", " ", "\ufffd", "。", "x", "#", "…", "{", "\n\n-\n\n-"])
@pytest.mark.parametrize("language", ["en", "zh", ""])
@pytest.mark.parametrize("profile", ["gentle", "web"])
def test_texts_of_next_to_nothing(text: str, language: str, profile: str):
    for skip in ((), ("no_text",)):
        judgement = judge(text, language, choose_rules(profile, skip, {}))
        assert bool(judgement.text) or judgement.dropped_by
        for rule in choose_rules(profile, skip, {}):
            judge(text, language, [rule])


@pytest.mark.parametrize(
    ("rules", "what"),
    [
        (CleanRules(skip=("gofer",)), "no cleaning rule 'gofer'"),
        (CleanRules(thresholds={"gopher_hashes": 1.0}), "no limit 'gopher_hashes' in profile gentle"),
        (CleanRules(profile="web", thresholds={"c4_javascript": 1.0}), "no limit 'c4_javascript'"),
        (CleanRules(profile="harsh"), "no cleaning profile 'harsh'"),  # type: ignore[arg-type]
        (CleanRules(near_duplicate_similarity=1.5), "near_duplicate_similarity"),
        (CleanRules(evaluation_ngram=0), "evaluation_ngram must be at least 1"),
        (CleanRules(personal_data=("shoe_size",)), "no kind of personal data 'shoe_size'"),  # type: ignore[arg-type]
    ],
)
def test_rules_that_cannot_be_meant(rules: CleanRules, what: str):
    with pytest.raises(InputError, match=what):
        check_rules(rules)
