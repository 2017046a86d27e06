"""A small corpus of generated sentences, made once by the real writer."""

import random
from pathlib import Path

import pytest

from glasshouse.corpus.documents import Document
from glasshouse.files import atomic_folder
from glasshouse.text.shards import write_corpus
from glasshouse.text.tokenizer import train_tokenizer

NOUNS, VERBS = ["cat", "dog", "bird", "cow", "child"], ["sees", "likes", "finds", "follows"]


def sentences(count: int, seed: int = 0) -> list[str]:
    """Documents of one to eight simple sentences."""
    draw = random.Random(seed)
    return [
        " ".join(
            f"The {draw.choice(NOUNS)} {draw.choice(VERBS)} the {draw.choice(NOUNS)}."
            for _ in range(draw.randint(1, 8))
        )
        + f" {number}"
        for number in range(count)
    ]


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a corpus of 400 documents and a vocabulary of 320 tokens."""
    run = tmp_path_factory.mktemp("prepared")
    documents = [
        Document(str(n), text, "generated", "CC0-1.0", "en", {}) for n, text in enumerate(sentences(400))
    ]
    tokenizer = train_tokenizer(iter(document.text for document in documents), 320)
    with atomic_folder(run / "corpus") as folder:
        write_corpus(folder, documents, tokenizer, validation_fraction=0.1)
    return run
