from pathlib import Path

import numpy as np
import pytest

from glasshouse.corpus.documents import Document
from glasshouse.corpus.quality import CleanRules
from glasshouse.corpus.screening import (
    CHUNK_CHARACTERS,
    chunk_documents,
    normalise,
    run_in_order,
    screen_documents,
)
from glasshouse.corpus.waterfall import Tally


@pytest.mark.parametrize(
    ("text", "mended"),
    [
        ("a\r\nb\rc\u2028d", "a\nb\nc\nd"),
        ("\ufeffa\x00b\x1bc\x7f", "abc"),
        ("a  \nb\t\nc\u3000\n", "a\nb\nc"),
        ("a\n\n\n\n\n\nb", "a\n\n\nb"),
        ("\n\n  a", "  a"),
        ("e\u0301", "é"),
        ("Ａ，１\u00a0 ﬁ …", "Ａ，１\u00a0 ﬁ …"),
        ("a\tb\n\n\nc", "a\tb\n\n\nc"),
        ("x\ud800y", "xy"),
    ],
)
def test_normalise(text: str, mended: str):
    assert normalise(text) == mended
    assert normalise(mended) == mended


def test_results_come_in_order():
    assert list(run_in_order(str, range(50), 2)) == list(map(str, range(50)))


def test_chunks_are_bounded_and_complete():
    documents = [Document(str(n), "x" * (n * 997 % 5000), "", "", "", {}) for n in range(400)]
    chunks = list(chunk_documents(documents))
    assert [one for chunk in chunks for one in chunk] == documents
    assert all(sum(len(one.text) for one in chunk[:-1]) < CHUNK_CHARACTERS for chunk in chunks)
    assert list(chunk_documents([])) == []


def test_a_part_holds_what_the_shelf_reads(tmp_path: Path):
    documents = [
        Document(str(n), f"Number {n} is one of the many.", "s", "l", "en", {"n": n}) for n in range(30)
    ]
    part = tmp_path / "part"
    for _ in range(2):  # a second attempt replaces the first
        tallies = list(screen_documents(documents, CleanRules(), part, seed=0))
    assert sum(tally.documents for tally in tallies) == 30
    ends = np.fromfile(part / "offsets", np.int64)
    assert ends[-1] == (part / "documents").stat().st_size
    assert (part / "exact").stat().st_size == 16 * 30
    assert (part / "bucket-39").stat().st_size == 8 * 30


def test_metadata_of_any_type_comes_through(tmp_path: Path):
    document = Document("1", "A text of the day.", "", "", "en", {"path": Path("a/b")})
    tallies = list(screen_documents([document], CleanRules(), tmp_path / "part", seed=0))
    assert isinstance(tallies[0], Tally)
    assert b'"a/b"' in (tmp_path / "part" / "documents").read_bytes()
