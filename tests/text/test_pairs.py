"""Pairs: read from the formats people have, refused where one-sided, dealt out in batches of like length."""

import gzip
import json

import numpy as np
import pytest

from glasshouse.errors import InputError
from glasshouse.text.pairs import IGNORED, Pair, PairStream, encode_pairs, encode_sources, read_pairs
from glasshouse.text.reading import read_text
from glasshouse.text.tokenizer import train_tokenizer

ROWS = [("a cat", "eine Katze"), ("two dogs", "zwei Hunde"), ("a bird", "ein Vogel")]
PAIRS = tuple(Pair(*row) for row in ROWS)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(iter([side for row in ROWS for side in row] * 20), 280, exact=False)


def write(path, text: str):
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_every_format_gives_the_same_pairs(tmp_path):
    tsv = "".join(f"{s}\t{t}\tignored\n" for s, t in ROWS)
    files = [
        [write(tmp_path / "a.tsv", tsv)],
        [write(tmp_path / "a.tsv.gz", tsv.replace("\n", "\r\n"))],
        [write(tmp_path / "a.jsonl", "".join(json.dumps({"source": s, "target": t}) + "\n" for s, t in ROWS))],
        [write(tmp_path / "b.jsonl", "".join(json.dumps({"translation": {"en": s, "de": t}}) + "\n" for s, t in ROWS))],
        [write(tmp_path / "s.txt", "\n".join(s for s, _ in ROWS)), write(tmp_path / "t.gz", "\n".join(t for _, t in ROWS) + "\n")],
    ]  # fmt: skip
    assert [read_pairs(paths).pairs for paths in files] == [PAIRS] * 5
    assert len({read_pairs(paths).digest for paths in files}) == 1


def test_columns_by_name(tmp_path):
    path = write(tmp_path / "a.tsv", "id\tde\ten\n1\teine Katze\ta cat\n")
    assert read_pairs([path], ("en", "de")).pairs == (Pair("a cat", "eine Katze"),)
    with pytest.raises(InputError, match=r"no column 'fr'.*columns: id, de, en"):
        read_pairs([path], ("en", "fr"))


def test_a_line_separator_in_a_sentence_ends_no_line(tmp_path):
    files = [write(tmp_path / "s", "a\u2028b\nc\x0cd\n"), write(tmp_path / "t", "A\nB\n")]
    assert [pair.target for pair in read_pairs(files).pairs] == ["A", "B"]


def test_one_sided_rows_are_counted_and_repeated_ones_too(tmp_path):
    path = write(tmp_path / "a.tsv", "a\tA\n \tB\nc\t\na\tA\n")
    found = read_pairs([path])
    assert (found.pairs, found.empty, found.repeated) == ((Pair("a", "A"), Pair("a", "A")), (2, 3), 1)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.tsv", "only one side\n", r"line 1.*tab"),
        ("a.jsonl", '{"source": "a", "target": "b"}\n{"source": 3}\n', r"no source and target.*line 2"),
        ("a.jsonl", '{"source": "a", "target": 5}\n', "no text"),
        ("a.jsonl", "{\n", "not JSON"),
        ("a.jsonl", "[1]\n", "not a JSON object"),
        ("a.tsv", "\t\n", "no row has two sides"),
    ],
)
def test_bad_rows_are_refused_by_number(tmp_path, name, text, message):
    with pytest.raises(InputError, match=message):
        read_pairs([write(tmp_path / name, text)])


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    short, long = write(tmp_path / "s", "a\n"), write(tmp_path / "t", "A\nB\n")
    with pytest.raises(InputError, match="1 lines against 2"):
        read_pairs([short, long])
    with pytest.raises(InputError, match="3 files"):
        read_pairs([short, long, long])
    with pytest.raises(InputError, match="cannot read"):
        read_pairs([tmp_path / "nothing.tsv"])
    bad = tmp_path / "bad.tsv"
    bad.write_bytes(b"a\tb\n\xff\tc\n")
    with pytest.raises(InputError, match="line 2 is not UTF-8"):
        read_pairs([bad])


def test_sources_are_what_an_encoder_reads_and_targets_end(tokenizer):
    sources, targets = encode_pairs(tokenizer, PAIRS, 50)
    assert [ids.tolist() for ids in sources] == [read_text(tokenizer, pair.source).ids for pair in PAIRS]
    assert [ids.tolist() for ids in targets] == [
        [*tokenizer.encode(pair.target), tokenizer.end_of_document] for pair in PAIRS
    ]
    assert encode_sources(tokenizer, ["<|pad|>"])[0].tolist()[1:] == tokenizer.encode("<|pad|>")
    with pytest.raises(InputError, match="pair 2 has"):
        encode_pairs(tokenizer, [PAIRS[0], Pair("x " * 60, "y")], 50)


def stream(count: int = 4000, batch_tokens: int = 1024) -> PairStream:
    """Pairs whose lengths are those of sentences: around 14, the target's near the source's."""
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.normal(14, 4, count).round(), 3, 40).astype(int)
    sources = [np.full(n, 7) + np.arange(n) for n in lengths]
    targets = [np.full(max(2, n + draw.integers(-2, 4)), 9) for n in lengths]
    return PairStream(sources, targets, start=1, pad=0, batch_tokens=batch_tokens, seed=3)


def test_an_epoch_has_each_pair_once_and_little_padding():
    pairs = stream()
    for number, source in enumerate(pairs.sources):
        source[0] = 10_000 + number  # a name for each
    batches = [pairs.batch(number) for number in range(pairs.batches)]
    assert sorted(row[0] for b in batches for row in b.sources) == [10_000 + n for n in range(4000)]
    assert all(b.sources.size + b.tokens.size <= 1024 for b in batches)
    spent = sum(b.sources.size + b.labels.size for b in batches)
    real = sum(b.source_mask.sum() + (b.labels != IGNORED).sum() for b in batches)
    assert pairs.padding() == pytest.approx(1 - real / spent)
    assert pairs.padding() <= 0.05


def test_a_batch_is_a_function_of_seed_and_number():
    one, other = stream(), stream()
    number = one.batches * 2 + 3
    one.batch(0)  # what was asked for before does not matter
    assert all(
        np.array_equal(a, b)
        for a, b in zip(vars(one.batch(number)).values(), vars(other.batch(number)).values(), strict=True)
    )
    first, second = one.batch(5), one.batch(one.batches + 5)
    assert first.sources.shape != second.sources.shape or not np.array_equal(first.sources, second.sources)


def test_the_decoder_is_given_the_target_behind_the_start_token():
    pairs = PairStream(
        [np.array([5, 6]), np.array([5])], [np.array([7, 8, 9]), np.array([7, 9])], 1, 0, 100, 0
    )
    rows = pairs.rows([0, 1])
    assert rows.sources.tolist() == [[5, 6], [5, 0]]
    assert rows.source_mask.tolist() == [[True, True], [True, False]]
    assert rows.tokens.tolist() == [[1, 7, 8], [1, 7, 9]]
    assert rows.labels.tolist() == [[7, 8, 9], [7, 9, IGNORED]]
