"""What the demo prints: samples as they came, what they copied, and figures with their intervals."""

from pathlib import Path

import pytest
from rich.console import Console

import glasshouse.cli as cli
from glasshouse.demo import PROMPT, longest_copy, model_sample, ngram_sample, show_demo
from glasshouse.inference.generate import CONTROLS
from glasshouse.run import open_run
from glasshouse.text.packing import open_corpus

TEXTS = ["A cat is a small animal with soft fur.", "The dog\nbarks at the moon."]


@pytest.mark.parametrize(
    ("sample", "copied"),
    [
        ("I said a cat is a small animal with wings", "cat is a small animal with"),
        ("The dog barks at the sun", "The dog barks at the"),
        ("small animal with soft fur. The dog", "small animal with soft fur."),
        ("at", "at"),
        ("nothing of this", ""),
        ("", ""),
    ],
)
def test_longest_copy(sample: str, copied: str):
    found = longest_copy(sample, TEXTS)
    assert found == copied or (not copied and len(found.split()) <= 1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of a recipe with a model of the smallest size, trained for a moment."""
    folder = tmp_path_factory.mktemp("demo")
    stories = [
        f"Describe a cat.\nA cat number {n} is a small animal. It has {n} kittens and a tail."
        for n in range(200)
    ]
    (folder / "text.txt").write_text("\n\n".join(stories))
    (folder / "recipe.yaml").write_text(
        f"name: demo\nprepare: {{documents: ['{folder / 'text.txt'}'], vocab_size: 300, text_unit: paragraph, "
        "near_duplicates: none, profile: none}\npretrain: {size: nano, steps: 3, validations: 1, threads: 1}\nevaluate: {}\n"
    )
    assert cli.main(["demo", "--config", str(folder / "recipe.yaml"), "--out", str(folder / "runs")]) == 0
    return folder / "runs"


def test_everything_a_person_needs_is_printed_and_the_same_again(finished: Path):
    pages = []
    for _ in range(2):
        console = Console(width=200, record=True, quiet=True, highlight=False)
        console.quiet = False
        with console.capture() as captured:
            show_demo(finished, console)
        pages.append(captured.get())
    assert pages[0] == pages[1]
    for part in (
        "as it came",
        "5-gram",
        "bits per byte",
        "glasshouse generate",
        "README.md",
        str(finished / "pretrain"),
    ):
        assert part in pages[0]


def test_the_samples_are_not_touched_up(finished: Path):
    console = Console(width=400, highlight=False)
    with console.capture() as captured:
        show_demo(finished, console)
    corpus = open_corpus(finished / "prepare" / "corpus")
    samples = (
        model_sample(open_run(finished / "pretrain")),
        ngram_sample(corpus, finished / "prepare" / "corpus"),
    )
    assert samples[0] != samples[1]
    for sample in samples:
        assert not sample.startswith(PROMPT)
        first = sample.strip().split("\n")[0].strip()[:60]
        assert first.translate(CONTROLS) in captured.get()
