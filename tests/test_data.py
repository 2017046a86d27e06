"""The shipped corpus is what its attribution says: licensed, attributed, plain, small, and built again to the byte."""

import gzip
import importlib.util
import json
import re
import sys
import unicodedata
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
DATA = ROOT / "src/glasshouse/data"
ALLOWED_LICENCES = {"CC0-1.0", "CC-BY", "CC-BY-2.0-FR", "Public domain"}
PRIMER_SOURCE = "Glasshouse primer (written by a language model for this project, 2026)"


def read_lines(path: Path) -> list[str]:
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8", errors="strict")
    return text.splitlines()


@pytest.fixture(scope="module")
def documents() -> dict[str, list[dict[str, str]]]:
    files = sorted([*DATA.glob("*.jsonl"), *DATA.glob("*.jsonl.gz")])
    return {path.name: [json.loads(line) for line in read_lines(path)] for path in files}


@pytest.fixture(scope="module")
def builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_corpus", ROOT / "benchmarks/build_corpus.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["build_corpus"] = module
    spec.loader.exec_module(module)
    return module


def everything(documents: dict[str, list[dict[str, str]]]) -> list[dict[str, str]]:
    return [document for part in documents.values() for document in part]


def test_the_whole_corpus_is_at_most_ten_megabytes():
    assert sum(path.stat().st_size for path in DATA.iterdir()) <= 10e6


def test_every_document_has_an_id_of_its_own_text_source_licence_and_language(documents):
    found = everything(documents)
    for document in found:
        for field in ("id", "text", "source", "licence", "language"):
            assert document.get(field), (field, document.get("id"))
    repeated = [name for name, count in Counter(document["id"] for document in found).items() if count > 1]
    assert repeated == []


def test_every_licence_is_one_that_allows_shipping(documents):
    assert {document["licence"] for document in everything(documents)} <= ALLOWED_LICENCES


def test_every_document_that_is_not_ours_names_its_makers(documents):
    for document in everything(documents):
        if document["source"] == PRIMER_SOURCE:
            assert document["licence"] == "CC0-1.0"
        else:
            assert len(document["attribution"]) > 10, document["id"]


def test_every_tatoeba_sentence_has_its_number_and_author(documents):
    for name in ("tatoeba_en.jsonl.gz", "tatoeba_zh.jsonl.gz"):
        for document in documents[name]:
            credits = re.findall(r"#\d+ \([^)]+\)", document["attribution"])
            # An ending in the middle of a sentence can only make more endings than credits.
            assert 1 <= len(credits) <= len(re.findall(r"[.!?。！？]", document["text"])), document["id"]


def test_both_tatoeba_files_hold_the_same_sentences_in_the_same_order(documents):
    english, chinese = (documents[f"tatoeba_{language}.jsonl.gz"] for language in ("en", "zh"))
    assert [item["id"].replace("-en-", "-zh-", 1) for item in english] == [item["id"] for item in chinese]
    for ours, theirs in zip(english, chinese, strict=True):
        assert ours["attribution"].count("#") == theirs["attribution"].count("#")


def test_text_is_normalised_and_free_of_marks_and_control_characters(documents):
    for document in everything(documents):
        text = document["text"]
        assert unicodedata.normalize("NFC", text) == text, document["id"]
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\ufeff\ufffd]|^#|License:", text, re.MULTILINE), (
            document["id"]
        )


def test_both_languages_are_there_and_are_what_they_say(documents):
    shares: dict[str, int] = Counter()
    for document in everything(documents):
        shares[document["language"]] += len(document["text"].encode())
        chinese = len(re.findall(r"[\u4e00-\u9fff]", document["text"])) / len(document["text"])
        assert (chinese > 0.5) == (document["language"] == "zh"), document["id"]
    assert set(shares) == {"en", "zh"}
    assert min(shares.values()) > 0.2 * sum(shares.values())


def test_no_document_repeats_twenty_words_of_another(documents, builder):
    seen: dict[int, str] = {}
    for document in everything(documents):
        for run in builder.runs(document["text"], 20):
            assert seen.setdefault(run, document["id"]) == document["id"], (document["id"], seen[run])


def test_a_document_that_repeats_an_earlier_one_is_left_out(builder):
    story = " ".join(f"word{'abcdefghij'[i % 10]}{'klmnopqrst'[i // 10]}" for i in range(40))
    parts = {"a": [{"text": story}, {"text": "Once. " + story}, {"text": "Another tale."}]}
    assert builder.without_repeats(parts, []) == {"a": [{"text": story}, {"text": "Another tale."}]}
    assert builder.without_repeats(parts, [story]) == {"a": [{"text": "Another tale."}]}


def test_the_english_primer_is_plain_and_varied(documents, builder):
    texts = [document["text"] for document in documents["primer_en.jsonl"]]
    counts = Counter(word for text in texts for word in builder.words(text))
    assert len(counts) < 2000
    assert sum(counts.values()) / len(counts) > 15
    assert builder.reading_grade(" ".join(texts)) < 4
    openings = Counter(text.split("\n")[-1][:40] for text in texts)
    assert openings.most_common(1)[0][1] <= 5
    assert sum(text.startswith("Describe a cat.\n") for text in texts) >= 3


def test_the_table_of_sources_counts_what_is_there(documents, builder):
    table = json.loads((DATA / "sources.json").read_text(encoding="utf-8"))
    assert table == {name: builder.summarise(part) for name, part in documents.items()}


def test_packing_the_same_documents_gives_the_same_bytes(builder):
    documents = [{"id": "1", "text": "一 cat"}]
    assert builder.pack(documents) == builder.pack(documents)
    assert builder.pack(documents)[4:8] == b"\0\0\0\0"
    assert json.loads(gzip.decompress(builder.pack(documents))) == documents[0]


def test_a_story_loses_its_page_marks_and_keeps_its_makers(builder, tmp_path):
    page = "# The goat\n\n##\nThe goat ran away\nfrom the old farmer's house.\n\n##\n"
    page += "She was very happy in the green forest.\n"
    footer = "\n##\n* License: [{}]\n* Text: A. Writer\n* Illustration: B. Painter\n* Language: en\n"
    path = tmp_path / "stories.jsonl.gz"
    stories = [
        {"file": f"en/000{number}_goat.md", "text": page + footer.format(licence)}
        for number, licence in enumerate(["CC-BY", "CC-BY-NC"])
    ]
    path.write_bytes(builder.pack(stories))
    (story,) = builder.read_stories(path)
    assert story["text"] == (
        "The goat\nThe goat ran away from the old farmer's house. She was very happy in the green forest."
    )
    assert "Text: A. Writer" in story["attribution"]
    assert "Illustration: B. Painter" in story["attribution"]


def test_pairs_that_are_long_rare_traditional_or_repeated_are_left_out(builder):
    rows = [
        ("The cat is here.", "猫在这里。", "1 (A)", "2 (B)"),
        ("The cat is here!", "猫在这儿。", "3 (A)", "4 (B)"),
        ("The zebu is here.", "牛在这里。", "5 (A)", "6 (B)"),
        ("The cat is there.", "貓在那裡。", "7 (A)", "8 (B)"),
        ("The cat " + "is here " * 6 + ".", "猫在。", "9 (A)", "10 (B)"),
    ]
    kept = list(builder.plain_pairs(rows, {"the", "cat", "is", "here", "there"}))
    assert [row[2] for row in kept] == ["1 (A)"]


def test_plainer_text_has_a_lower_grade(builder):
    plain = "The cat sat on the bed. It was warm. The dog came in."
    heavy = "Notwithstanding considerable opposition, administrators implemented comprehensive regulation."
    assert builder.reading_grade(plain) < 2 < 12 < builder.reading_grade(heavy)
    assert builder.unfamiliar_share("The cat sat", {"the", "cat"}) == pytest.approx(1 / 3)


def test_the_corpus_is_built_again_to_the_byte(builder, shared_data, tmp_path):
    for name in builder.PRIMERS:
        (tmp_path / name).write_bytes((DATA / name).read_bytes())
    builder.write_corpus(shared_data, tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (DATA / path.name).read_bytes(), path.name
