"""Text as an encoder reads it: the same ids as transformers for WordPiece and byte-level tokenizers, and words."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from glasshouse.text.reading import MASK, read_text, with_mask, words_of
from glasshouse.text.tokenizer import Tokenizer, open_tokenizer, train_tokenizer

TEXTS = [
    "The cat sat on the mat.",
    "Unaffordable naïveté, isn't it? 12345",
    "猫坐在垫子上。今天 weather 很好",
    "",
    "  spaces   and\nlines ",
    "say [SEP] or </s> or <|endoftext|>",
    "emoji 😀 and Ünïcödé",
]
SENTENCES = [
    "The cat sat on the mat and isn't there.",
    "unaffordable weather, naïve",
    "猫坐在垫子上。今天很好",
] * 30


def word_piece(folder: Path) -> Tokenizer:
    """BERT's: lower case, WordPiece, [CLS] and [SEP]; with the truncation and padding that some files carry."""
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend.train_from_iterator(
        SENTENCES, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    )
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    backend.enable_truncation(6)
    backend.enable_padding(length=6)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "cls_token": "[CLS]", "sep_token": "[SEP]",
                "pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return open_tokenizer(folder)


def roberta(folder: Path) -> Tokenizer:
    """RoBERTa's: byte-level, <s> and </s>, no kinds of token."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>",
                "sep_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return open_tokenizer(folder)


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    random.seed(0)
    return train_tokenizer(iter(SENTENCES), 330)


@pytest.mark.parametrize("make", [word_piece, roberta])
def test_the_ids_are_those_of_transformers(make, tmp_path):
    tokenizer = make(tmp_path)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path, use_fast=True)
    for text in TEXTS:
        plain = reference(text, split_special_tokens=True)
        assert read_text(tokenizer, text).ids == plain["input_ids"], text
        pair = reference(text, "the cat", split_special_tokens=True)
        found = read_text(tokenizer, text, "the cat")
        assert found.ids == pair["input_ids"], text
        kinds = pair.get("token_type_ids", [0] * len(found.ids))
        assert found.token_types == kinds
        assert len(found.parts) == len(found.ids)
        words = [
            text[start:end]
            for part, (start, end) in zip(found.parts, found.offsets, strict=True)
            if part == 1
        ]
        assert len(words) >= 2
        assert tokenizer.decode(read_text(tokenizer, text).ids) == reference.decode(
            plain["input_ids"], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def test_the_roles_of_special_tokens(tmp_path, ours):
    (tmp_path / "bert").mkdir()
    (tmp_path / "roberta").mkdir()
    bert = word_piece(tmp_path / "bert")
    assert (bert.start, bert.end_of_document, bert.pad, bert.mask) == (2, 3, 0, 4)
    other = roberta(tmp_path / "roberta")
    assert (other.start, other.end_of_document, other.pad, other.mask) == (0, 2, 1, 4)
    assert (ours.start, ours.mask) == (ours.end_of_document, None)
    assert read_text(ours, "The cat").ids[0] == ours.end_of_document
    assert bert.token_bytes(bert.plain.token_to_id("##t")) == b"t"
    assert read_text(bert, "cat \ud800").ids == read_text(bert, "cat \ufffd").ids


def test_offsets_point_into_the_text(tmp_path):
    tokenizer = word_piece(tmp_path)
    question, passage = "the cat?", "The Cat sat on the mat"
    found = read_text(tokenizer, question, passage)
    inside = [
        passage[start:end].lower()
        for part, (start, end) in zip(found.parts, found.offsets, strict=True)
        if part == 1
    ]
    assert "".join(inside) == passage.lower().replace(" ", "")
    assert found.parts[0] is None
    assert found.token_types[-1] == 1
    assert len(found.ids) > 6  # the file's own truncation would have hidden the rest


def test_a_mask_is_added_at_the_end_and_saved(ours, tmp_path):
    masked = with_mask(ours)
    assert masked.vocab_size == ours.vocab_size + 1
    assert masked.mask == ours.vocab_size
    assert masked.special[MASK] == masked.mask
    assert with_mask(masked) is masked
    assert ours.mask is None
    for text in TEXTS:
        assert masked.encode(text) == ours.encode(text)
        assert masked.encode_batch_arrays([text])[0].tolist() == ours.encode(text)
    assert masked.mask not in masked.encode(f"say {MASK}")
    masked.save(tmp_path)
    again = open_tokenizer(tmp_path)
    assert again.mask == masked.mask
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert reference.mask_token_id == masked.mask
    assert reference.cls_token_id == reference.sep_token_id == masked.end_of_document
    assert reference("The cat")["input_ids"] == read_text(masked, "The cat").ids


def test_words_of_bytes(ours):
    """Each word is a run of letters with its space; signs and tokens of Chinese stand alone."""
    words = words_of(ours)
    for text, expected in (
        ("The cat isn't there", ["The", " cat", " isn", "'t", " there"]),
        ("mat.\nsat", ["mat", ".", "\n", "sat"]),
        ("人猫坐在 it", ["人", "猫坐在", " it"]),
        ("naïve Ünïcödé", ["naïve", " Ünïcödé"]),
    ):
        ids = np.array([ours.encode(text)])
        starts = words.starts(ids)[0]
        pieces: list[bytes] = []
        for token, start in zip(ids[0].tolist(), starts.tolist(), strict=True):
            if start:
                pieces.append(b"")
            pieces[-1] += ours.token_bytes(token)
        assert [piece.decode() for piece in pieces] == expected
    row = np.array([[ours.end_of_document, *ours.encode("cat"), ours.end_of_document, *ours.encode("cat")]])
    starts, half = words.starts(row)[0], row.shape[1] // 2
    assert starts[0]
    assert starts[1]
    assert starts[half]
    assert starts[half + 1]


def test_words_of_pieces(tmp_path):
    tokenizer = word_piece(tmp_path)
    ids = np.array([read_text(tokenizer, "unaffordable cats").ids])
    pieces = [tokenizer.plain.id_to_token(token) for token in ids[0].tolist()]
    assert words_of(tokenizer).starts(ids)[0].tolist() == [not piece.startswith("##") for piece in pieces]
    assert any(piece.startswith("##") for piece in pieces)
