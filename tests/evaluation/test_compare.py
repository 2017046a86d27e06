"""Comparisons: equal sides are never told apart more often than stated, and real differences are."""

import json

import numpy as np
import pytest

from glasshouse.errors import InputError
from glasshouse.evaluation.compare import (
    Comparison,
    Costs,
    compare_costs,
    compare_runs,
    compare_sides,
    correct,
    describe,
    read_costs,
)

BIT = np.log(2)


@pytest.fixture
def few_draws(monkeypatch):
    """Fewer draws than users get: for tests that compare hundreds of times."""
    monkeypatch.setattr("glasshouse.evaluation.compare.DRAWS", 1000)


def documents(random, number=60):
    """Sizes of some documents, and how hard each is in nats per byte."""
    return random.lognormal(5, 0.7, number), 2 + 0.5 * random.standard_normal(number)


def runs(random, hardness, sizes, count, *, level=0.0, seed_noise=0.0, noise=0.05):
    """[count, units] nats of runs whose score differs by seed, and by document besides."""
    scores = hardness + level + seed_noise * random.standard_normal((count, 1))
    return sizes * (scores + noise * random.standard_normal((count, len(sizes))))


def costs(nats, sizes, name="run", weights=None, held_out="same", languages=()):
    return Costs(name, weights or name, held_out, np.asarray(nats), np.asarray(sizes, float), languages)


def test_a_against_a_shows_no_difference():
    random = np.random.default_rng(0)
    sizes, hardness = documents(random)
    one = runs(random, hardness, sizes, 1)[0]
    [found] = compare_sides([costs(one, sizes)], [costs(one, sizes)])
    assert (found.left, found.low, found.high, found.probability) == (found.right, 0, 0, 1)
    assert "no difference shown" in found.verdict
    three = runs(random, hardness, sizes, 3, seed_noise=0.1)
    side = [costs(nats, sizes, f"seed {number}") for number, nats in enumerate(three)]
    assert "no difference shown" in compare_sides(side, side)[0].verdict


@pytest.mark.parametrize(
    ("count", "seed_noise", "noise", "interaction", "number"),
    [
        (1, 0.0, 0.1, 0.0, 40),
        (1, 0.0, 0.05, 0.05, 150),
        (3, 0.02, 0.05, 0.0, 60),
        (3, 0.02, 0.02, 0.05, 60),
        (3, 0.005, 0.05, 0.02, 60),
    ],
)
def test_false_differences_are_about_five_in_a_hundred(
    few_draws, count, seed_noise, noise, interaction, number
):
    """200 comparisons of sides that are equal: seeds, single documents and the sides' way with documents vary. At a
    rate of 5 %, 200 trials show 2 to 20 of them with a probability above 0.998; a rate of 14 % would give about 28."""
    random, shown = np.random.default_rng(1), 0
    for trial in range(200):
        sizes, hardness = documents(random, number)
        left, right = (
            runs(random, way, sizes, count, seed_noise=seed_noise, noise=noise)
            for way in hardness + interaction * random.standard_normal((2, number))
        )
        shown += compare_costs("", left, right, sizes, seed=trial).is_shown
    assert 2 <= shown <= 20


def test_seeds_count_when_they_are_given():
    """Runs that differ by seed more than by side: documents alone would swear to a difference."""
    random = np.random.default_rng(2)
    sizes, hardness = documents(random, 500)
    left = runs(random, hardness, sizes, 3, seed_noise=0.1, noise=0.01)
    right = runs(random, hardness, sizes, 3, seed_noise=0.1, noise=0.01)
    assert compare_costs("", left[:1], right[:1], sizes).is_shown
    assert not compare_costs("", left, right, sizes).is_shown
    assert "Welch" in compare_costs("", left, right, sizes).method
    assert "Welch" in compare_costs("", left, right[:1], sizes).method
    assert "Welch" not in compare_costs("", left[:1], right[:1], sizes).method


@pytest.mark.parametrize("count", [1, 3])
def test_real_differences_are_shown_with_an_interval_that_holds_them(few_draws, count):
    random, shown, held = np.random.default_rng(3), 0, 0
    for trial in range(100):
        sizes, hardness = documents(random)
        left = runs(random, hardness, sizes, count, level=0.08, seed_noise=0.01 * (count > 1))
        right = runs(random, hardness, sizes, count, seed_noise=0.01 * (count > 1))
        found = compare_costs("", left, right, sizes, seed=trial)
        shown += found.is_shown and found.left > found.right
        held += found.low <= 0.08 / BIT <= found.high
    assert shown >= 98
    assert held >= 85


def test_pairing_sees_what_unpaired_scores_would_not():
    random = np.random.default_rng(4)
    sizes, hardness = documents(random, 40)
    left, right = sizes * hardness, sizes * (hardness + 0.005 + 0.002 * random.standard_normal(40))
    found = compare_costs("", left[None], right[None], sizes)
    assert found.is_shown
    assert found.high < 0
    assert "the first is better" in found.verdict
    assert "nothing is said of other seeds" in found.verdict
    assert "the second is better" in compare_costs("", right[None], left[None], sizes).verdict


def test_the_interval_and_the_probability_agree():
    random = np.random.default_rng(5)
    for trial in range(60):
        sizes, hardness = documents(random, 40)
        left, right = (
            runs(random, hardness, sizes, 2, level=level, seed_noise=0.01) for level in (0, 0.002 * trial)
        )
        found = compare_costs("", left, right, sizes, seed=trial)
        assert found.is_shown == (found.low > 0 or found.high < 0) or abs(found.probability - 0.05) < 0.002


def test_a_detectable_difference_is_detected_four_times_in_five(few_draws):
    random, shown = np.random.default_rng(6), 0
    sizes = np.full(80, 100.0)
    first = compare_costs("", *(sizes * 0.1 * random.standard_normal((1, 80)) for _ in "ab"), sizes)
    for trial in range(200):
        left, right = (sizes * 0.1 * random.standard_normal((1, 80)) for _ in "ab")
        shown += compare_costs("", left + first.detectable * BIT * sizes, right, sizes, seed=trial).is_shown
    assert 130 <= shown <= 190


def test_figures_are_bits_per_byte():
    sizes = np.array([10.0, 30.0] * 20)
    found = compare_costs("", (2 * sizes)[None], (1 * sizes)[None], sizes)
    assert (found.left, found.right) == (pytest.approx(2 / BIT), pytest.approx(1 / BIT))
    assert (found.units, found.runs) == (40, (1, 1))


def test_one_unit_shows_nothing():
    found = compare_costs("", np.array([[5.0]]), np.array([[1.0]]), np.array([4.0]))
    assert not found.is_shown
    assert "no difference shown" in found.verdict


def comparison(probability):
    return Comparison("m", 1, 2, -2, 0, probability, probability, 0.1, 40, (1, 1), "")


def test_holm():
    adjusted = [found.adjusted for found in correct([comparison(p) for p in (0.02, 0.01, 0.04, 0.9)])]
    assert adjusted == pytest.approx([0.06, 0.04, 0.08, 0.9])
    assert [found.adjusted for found in correct([comparison(0.03)])] == [0.03]
    assert [found.adjusted for found in correct([comparison(0.6), comparison(0.7)])] == [1.0, 1.0]


def test_languages_are_compared_when_there_are_enough_documents():
    random = np.random.default_rng(7)
    sizes, hardness = documents(random, 110)
    languages = ["en"] * 60 + ["zh"] * 40 + ["de"] * 10
    left, right = sizes * hardness, sizes * (hardness + np.where(np.array(languages) == "zh", 0.1, 0))
    right += sizes * 0.01 * random.standard_normal(110)
    found = compare_sides(
        [costs(left, sizes, "a", languages=languages)], [costs(right, sizes, "b", languages=languages)]
    )
    assert [one.metric for one in found] == ["bits per byte", "bits per byte, en", "bits per byte, zh"]
    assert [one.is_shown for one in found] == [True, False, True]
    assert found[2].units == 40
    text = describe(found)
    assert text.count("no difference shown") == 1
    assert "Holm's correction for 3 metrics" in text


def test_other_documents_and_repeated_weights_are_refused():
    sizes = np.ones(40)
    one, other = costs(sizes, sizes, "a"), costs(sizes, sizes, "b", held_out="other")
    with pytest.raises(InputError, match=r"not measured on the same held-out documents.*a and b.*--corpus"):
        compare_sides([one], [other])
    with pytest.raises(InputError, match="same weights twice"):
        compare_sides([one, one], [costs(sizes, sizes, "c")])


def write_report(folder, digest="w", nats=(1.0, 2.0), recorded=None):
    (folder / "reports").mkdir(parents=True)
    units = {"nats": list(nats), "bytes": [10, 20], "languages": ["en", "en"]}
    report = {"digest": digest, "held_out": {"digest": "h"}, "units": units}
    (folder / "reports" / "evaluation.json").write_text(json.dumps(report))
    (folder / "run.json").write_text(json.dumps({"digest": recorded or digest}))
    return folder


def test_reports_are_read_and_checked(tmp_path):
    found = read_costs(write_report(tmp_path / "a"))
    assert (found.weights, found.held_out, list(found.languages)) == ("w", "h", ["en", "en"])
    assert found.nats.tolist() == [1.0, 2.0]
    assert found.sizes.tolist() == [10.0, 20.0]
    with pytest.raises(InputError, match="other weights than the run's"):
        read_costs(write_report(tmp_path / "b", recorded="newer"))
    (tmp_path / "c").mkdir()
    with pytest.raises(InputError, match=r"was not evaluated.*run: glasshouse evaluate"):
        compare_runs([tmp_path / "a"], [tmp_path / "c"])
    assert "no difference shown" in describe(compare_runs([tmp_path / "a"], [tmp_path / "a"]))
