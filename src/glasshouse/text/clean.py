"""Cleaning a corpus: normalise, tell the language, drop what is no text, drop duplicates, redact, decontaminate."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from glasshouse.text.corpus import Document
from glasshouse.text.waterfall import Waterfall


@dataclass(frozen=True)
class CleanRules:
    """Which cleaning rules act, and how hard. Every rule can be switched off: by its field or by `skip`.

    Args:
        profile: quality rules. "gentle" drops only what is no text at all, so that short sentences, poems, lists and
            children's stories stay; "web" applies the published rules of Gopher, C4 and FineWeb in full, per
            language, as for pages crawled from the web; "none" applies no quality rule.
        skip: names of rules to switch off, as they stand in waterfall.json.
        thresholds: other limits for rules, by name, for instance {"gopher_short_document": 20}.
        normalise: mend line endings, and remove control characters, byte order marks, trailing spaces and runs of
            more than two blank lines. Never touches words, case, punctuation or full-width forms.
        unicode_form: "NFC" (an accented letter is one character, however it was typed) or "none".
        identify_language: tell the language of documents that do not state theirs.
        languages: keep only documents in these languages (two-letter codes); empty keeps all. A document whose
            language cannot be told is kept.
        exact_duplicates: drop documents that repeat an earlier one but for case and white space.
        near_duplicates: "verified" drops a document whose 5-grams overlap those of an earlier one with a real Jaccard
            similarity of `near_duplicate_similarity` or more; "published" is FineWeb's MinHash (14 buckets of 8
            hashes, unverified, about 0.72); "none" drops none.
        near_duplicate_similarity: for "verified". 0.55 is where 5 % of the words differ.
        near_duplicate_ngram: words (characters in Chinese, Japanese, Thai) in a row that make one 5-gram.
        near_duplicate_minimum: documents of fewer words (characters) are only compared exactly: two short sentences
            that differ in one word say different things.
        personal_data: kinds of personal data to replace, see `personal_data`; empty replaces none.
        evaluation_sets: files whose texts must not be trained on: documents that share a 13-gram with them are dropped.
        evaluation_ngram: words in a row that count as overlap.
        evaluation_ngram_characters: the same in Chinese, Japanese and Thai, in characters.
    """

    profile: Literal["gentle", "web", "none"] = "gentle"
    skip: tuple[str, ...] = ()
    thresholds: dict[str, float] = field(default_factory=dict)
    normalise: bool = True
    unicode_form: Literal["NFC", "none"] = "NFC"
    identify_language: bool = True
    languages: tuple[str, ...] = ()
    exact_duplicates: bool = True
    near_duplicates: Literal["verified", "published", "none"] = "verified"
    near_duplicate_similarity: float = 0.55
    near_duplicate_ngram: int = 5
    near_duplicate_minimum: int = 20
    personal_data: tuple[str, ...] = ()
    evaluation_sets: tuple[str, ...] = ()
    evaluation_ngram: int = 13
    evaluation_ngram_characters: int = 20


def clean_documents(
    documents: Iterator[Document], rules: CleanRules, waterfall: Waterfall, work: Path, workers: int = 1
) -> Iterator[Document]:
    """Clean documents in one stream, in order, in memory that does not grow with the text.

    Args:
        documents: what to clean; read once.
        rules: which rules act.
        waterfall: filled as documents pass; complete when the last document has been taken.
        work: an empty folder for what has to be kept between passes, about the size of the text.
        workers: processes; the result is the same for any number.

    Raises:
        InputError: a rule, threshold, language or evaluation set that does not exist.
    """
    raise NotImplementedError
    yield from documents
