import json
from collections import Counter

from glasshouse.corpus.waterfall import Tally, Waterfall, digest_document, shorten


def test_examples_are_a_fair_sample():
    counts = [0] * 40
    for seed in range(400):
        tally = Tally(seed)
        for number in range(40):
            tally.drop("rule", 1, str(number), "text")
        for _, identity, _ in tally.examples["rule"]:
            counts[int(identity)] += 1
    assert sum(counts) == 2000
    assert min(counts) > 20  # 50 expected, standard deviation 6.6
    assert max(counts) < 80


def fill(tally: Tally, first: int, last: int) -> Tally:
    for number in range(first, last):
        identity, text = f"d{number}", f"text {number}"
        tally.enter(len(text))
        if number % 3:
            tally.change("mend", -1, identity, text)
        if number % 4 == 0:
            tally.drop("bad", len(text) - bool(number % 3), identity, text)
        else:
            tally.leave("quality", len(text) - bool(number % 3), digest_document(identity, text))
        tally.facts.setdefault("languages", Counter())["en"] += 1
    return tally


def test_pieces_add_up_to_the_whole():
    rules = [("normalise", "mend"), ("quality", "bad"), ("quality", "never")]
    whole, pieces = Waterfall(5), Waterfall(5)
    whole.expect(rules)
    pieces.expect(rules)
    whole.add(fill(Tally(5), 0, 100))
    for first, last in ((0, 10), (10, 11), (11, 100)):
        piece = fill(Tally(5), first, last)
        pieces.add(Tally.from_dict(json.loads(json.dumps(piece.to_dict()))))
    assert whole.to_dict() == pieces.to_dict()
    report = whole.to_dict()
    assert [row["documents_dropped"] for row in report["rules"]] == [0, 25, 0]
    assert [row["documents_changed"] for row in report["rules"]] == [66, 0, 0]
    assert report["documents_out"] == 75
    assert report["stages"][1]["documents"] == 75
    assert "documents_out" in repr(whole)


def test_order_counts_in_the_hash():
    hashes = []
    for order in ((0, 1), (1, 0)):
        waterfall = Waterfall()
        waterfall.expect([("quality", "bad")])
        tally = Tally()
        for number in order:
            tally.enter(1)
            tally.leave("quality", 1, digest_document(str(number), "x"))
        waterfall.add(tally)
        hashes.append(waterfall.to_dict()["stages"][0]["sha256"])
    assert hashes[0] != hashes[1]
    assert digest_document("a", "bc") != digest_document("ab", "c")


def test_shorten():
    assert shorten("a\n b\t c") == "a b c"
    assert len(shorten("word " * 100)) == 160
    assert shorten("word " * 100).endswith("…")
