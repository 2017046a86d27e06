import hashlib
import itertools
import json
import random
import secrets
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from glasshouse.corpus.clean import clean_documents
from glasshouse.corpus.documents import Document
from glasshouse.corpus.quality import CleanRules
from glasshouse.corpus.waterfall import Waterfall, digest_document
from glasshouse.errors import InputError

STORY = "The little dog ran to the river and saw a big fish that was as blue as the sky on a day in June. "
EVERYTHING = CleanRules(
    profile="web", languages=("en",), personal_data=("email",), near_duplicates="verified"
)


def document(identity: str, text: str, language: str = "") -> Document:
    return Document(identity, text, "source", "CC0-1.0", language, {"page": 1})


def mixed_documents(seed: int, count: int) -> list[Document]:
    """Some of everything that a rule acts on, in random order."""
    generator = random.Random(seed)
    words = [
        f"{a}{b}"
        for a in ("ban", "lor", "mit", "sel", "tak")
        for b in ("do", "ri", "va", "nu", "pe", "th", "ow")
    ]
    texts: list[str] = []

    def sentence() -> str:
        return STORY[: generator.randint(30, 60)] + " ".join(generator.choices(words, k=12)) + ".\r\n"

    for number in range(count):
        text = "".join(sentence() for _ in range(generator.randint(1, 12)))
        kind = generator.randrange(8)
        if kind == 0 and texts:
            text = generator.choice(texts)
        elif kind == 1 and texts:
            text = generator.choice(texts) + " And so it ended."
        elif kind == 2:
            text += f"Write to name{number}@example.org today, and to no one else.\n"
        elif kind == 3:
            text = "Die Katze ist nicht im Haus, sie ist auf dem Dach und schläft in der Sonne. " * 9
        elif kind == 4:
            text = "!!! --- ???" * generator.randint(1, 5)
        texts.append(text)
    return [document(f"d{number}", text) for number, text in enumerate(texts)]


def clean(
    documents: list[Document], rules: CleanRules, work: Path, workers: int = 1
) -> tuple[list[Document], dict[str, Any]]:
    waterfall = Waterfall(7)
    return list(clean_documents(iter(documents), rules, waterfall, work, workers)), waterfall.to_dict()


def check_sums(report: dict[str, Any]) -> None:
    documents, size = report["documents_in"], report["bytes_in"]
    for row in report["rules"]:
        assert (row["documents_in"], row["bytes_in"]) == (documents, size), row
        assert row["documents_in"] == row["documents_kept"] + row["documents_dropped"], row
        assert row["bytes_in"] + row["bytes_added"] == row["bytes_kept"] + row["bytes_dropped"], row
        assert len(row["examples"]) == min(5, row["documents_dropped"] + row["documents_changed"]), row
        documents, size = row["documents_kept"], row["bytes_kept"]
    assert (documents, size) == (report["documents_out"], report["bytes_out"])
    last = {row["stage"]: (row["documents_kept"], row["bytes_kept"]) for row in report["rules"]}
    assert last == {stage["stage"]: (stage["documents"], stage["bytes"]) for stage in report["stages"]}


@pytest.mark.parametrize("profile", ["gentle", "web"])
def test_the_waterfall_adds_up(profile: Literal["gentle", "web"], tmp_path: Path):
    seed = secrets.randbelow(2**32)
    documents = mixed_documents(seed, 300)
    left, report = clean(documents, replace(EVERYTHING, profile=profile), tmp_path)
    check_sums(report)
    assert report["documents_in"] == 300, seed
    assert report["bytes_in"] == sum(len(one.text.encode()) for one in documents)
    assert report["documents_out"] == len(left)
    assert report["bytes_out"] == sum(len(one.text.encode()) for one in left)
    dropped = {row["rule"]: row["documents_dropped"] for row in report["rules"]}
    busy = {"gentle": ["exact_duplicates", "near_duplicates"], "web": ["gopher_short_document"]}
    for rule in ("language", "no_text", *busy[profile]):
        assert dropped[rule], f"seed {seed}: {rule} found nothing"
    everything = b"".join(digest_document(one.id, one.text) for one in left)
    assert report["stages"][-1]["sha256"] == hashlib.sha256(everything).hexdigest()
    assert [int(one.id[1:]) for one in left] == sorted(int(one.id[1:]) for one in left)
    assert list(tmp_path.iterdir()) == []  # nothing is left in the work folder
    json.dumps(report)


def test_any_number_of_processes_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    documents = mixed_documents(secrets.randbelow(2**32), 1300)
    one = clean(documents, EVERYTHING, tmp_path)
    two = clean(documents, EVERYTHING, tmp_path, workers=2)
    assert one == two
    monkeypatch.setattr("glasshouse.corpus.screening.CHUNK_DOCUMENTS", 17)
    assert clean(documents, EVERYTHING, tmp_path) == one


def test_another_text_gives_another_hash(tmp_path: Path):
    documents = mixed_documents(1, 50)
    one = clean(documents, CleanRules(), tmp_path)[1]["stages"]
    again = clean(documents, CleanRules(), tmp_path)[1]["stages"]
    changed = clean([replace(documents[0], text=STORY), *documents[1:]], CleanRules(), tmp_path)[1]["stages"]
    assert one == again
    assert all(left["sha256"] != right["sha256"] for left, right in zip(one, changed, strict=True))


def test_everything_off_changes_nothing(tmp_path: Path):
    rules = CleanRules("none", (), {}, False, "none", False, (), False, "none")
    texts = ["one\r\n\r\n\r\n\r\n\r\n two \x00 \ufeff", "e\u0301", "e\u0301", ""]
    documents = [document(name, text) for name, text in zip("aaac", texts, strict=True)]
    left, report = clean(documents, rules, tmp_path)
    assert left == documents
    assert report["rules"] == []
    assert report["documents_out"] == 4


def test_document_keeps_what_it_came_with(tmp_path: Path):
    left, report = clean(
        [document("x", STORY, "eng_Latn"), document("y", "There was a man who had a red hat and a goat.")],
        CleanRules(),
        tmp_path,
    )
    assert left[0] == document("x", STORY.strip(), "en")
    assert report["facts"]["language_known_by"] == {"stated": 1, "identified": 1}
    assert report["facts"]["languages"] == {"en": 2}


def test_no_documents(tmp_path: Path):
    left, report = clean([], CleanRules(), tmp_path)
    assert left == []
    check_sums(report)


def test_short_text_is_not_dropped_for_its_language(tmp_path: Path):
    texts = ["Ja, gut.", "Hallo Welt!", "Der Hund und die Katze.", "ok", "3 + 5 = 8", "猫在睡觉。"]
    german = "Die Katze ist nicht im Haus, sie ist auf dem Dach und schläft in der Sonne, wie immer."
    documents = [document(str(number), text) for number, text in enumerate([*texts, german, STORY])]
    left, _ = clean(documents, CleanRules(languages=("en",)), tmp_path)
    assert [one.text for one in left] == [*texts, STORY.strip()]
    left, _ = clean([document("1", "Ja, gut.", "de")], CleanRules(languages=("en",)), tmp_path)
    assert left == []  # it says so itself


def test_evaluation_sets(tmp_path: Path):
    question = "Which of the seven seas did the two old sailors cross when they were young and brave?"
    (tmp_path / "questions.txt").write_text(question, encoding="utf-8")
    documents = [document("clean", STORY), document("leak", STORY[:40] + question.upper() + STORY)]
    rules = CleanRules(evaluation_sets=(str(tmp_path / "questions.txt"),), near_duplicates="none")
    left, report = clean(documents, rules, tmp_path / "work")
    assert [one.id for one in left] == ["clean"]
    row = next(row for row in report["rules"] if row["rule"] == "evaluation_overlap")
    assert row["examples"][0]["text"].lower().startswith("which of the seven seas")
    (tmp_path / "short.txt").write_text("yes no", encoding="utf-8")
    with pytest.raises(InputError, match="no text long enough"):
        clean(documents, CleanRules(evaluation_sets=(str(tmp_path / "short.txt"),)), tmp_path / "work")
    assert list((tmp_path / "work").iterdir()) == []


def test_personal_data_is_replaced_and_not_shown(tmp_path: Path):
    documents = [
        document("a", STORY + "Mail joe@example.org."),
        document("b", "joe@example.org --- !!! " * 80),
    ]
    left, report = clean(documents, CleanRules(personal_data=("email",)), tmp_path)
    assert "joe" not in left[0].text
    assert "joe" not in json.dumps(report)
    assert report["facts"]["personal_data"]["email"] >= 1
    check_sums(report)


FLAT = """
import resource, sys
from pathlib import Path
from glasshouse.corpus.clean import clean_documents
from glasshouse.corpus.documents import Document
from glasshouse.corpus.quality import CleanRules
from glasshouse.corpus.waterfall import Waterfall
def documents(count):
    for n in range(count):
        text = f"Number {n} and {n * 7919 % 100003} went to see {n * 31} of the {n % 977} old men."
        yield Document(str(n), text, "", "", "en", {})
peak = []
for count in (2_000, 200_000):
    kept = sum(1 for _ in clean_documents(documents(count), CleanRules(), Waterfall(), Path(sys.argv[1])))
    peak.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
print(kept, peak[0], peak[1])
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(tmp_path: Path):
    result = subprocess.run(
        [sys.executable, "-c", FLAT, str(tmp_path)], capture_output=True, text=True, check=True
    )
    kept, small, large = map(float, result.stdout.split())
    assert kept == 200_000
    assert large - small < 60, f"{large - small} MB more for 100 times the documents"


def test_examples_of_many_documents_stay_five(tmp_path: Path):
    documents = [document(str(number), "---") for number in range(60)]
    _, report = clean(documents, CleanRules(), tmp_path)
    row = next(row for row in report["rules"] if row["documents_dropped"])
    assert (row["rule"], row["documents_dropped"], len(row["examples"])) == ("no_text", 60, 5)
    assert len(set(itertools.chain(example["id"] for example in row["examples"]))) == 5
