"""A tokenizer's fields, and the tokenizers that llama.cpp would misread."""

import copy
import json

import pytest
import tokenizers
from tokenizers import AddedToken, models, pre_tokenizers

from glasshouse.errors import InputError
from glasshouse.export.gguf_tokenizer import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, tokenizer_fields
from glasshouse.text.tokenizer import Tokenizer, open_tokenizer


@pytest.fixture
def parts(tokenizer, tmp_path) -> dict:
    tokenizer.save(tmp_path)
    return json.loads((tmp_path / "tokenizer.json").read_text())


def test_our_own(parts, tokenizer):
    fields = tokenizer_fields(parts, tokenizer)
    get = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items()}
    assert (get["model"], get["pre"], get["add_bos_token"]) == ("gpt2", "llama-bpe", True)
    assert len(get["tokens"]) == len(get["token_type"]) == tokenizer.vocab_size
    assert all(token == parts_token(parts, number) for number, token in enumerate(get["tokens"]))
    assert "Ġcat" in get["tokens"]  # a space is written as llama.cpp expects it
    assert set(get["token_type"][:316]) == {NORMAL}
    assert get["token_type"][316:] == [CONTROL] * 4
    assert get["merges"][0].count(" ") == 1
    assert get["tokens"][get["eos_token_id"]] == get["tokens"][get["bos_token_id"]] == "<|endoftext|>"
    assert get["tokens"][get["eot_token_id"]] == "<|im_end|>"
    assert get["tokens"][get["padding_token_id"]] == "<|pad|>"
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template


def parts_token(parts: dict, number: int) -> str:
    added = {token["id"]: token["content"] for token in parts["added_tokens"]}
    return added.get(number) or next(t for t, other in parts["model"]["vocab"].items() if other == number)


def test_known_patterns_have_their_name(parts, tokenizer):
    pattern = parts["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    pattern["Regex"] = pattern["Regex"].replace(r"\p{N}{1,3}", r"\p{N}")
    assert tokenizer_fields(parts, tokenizer)["tokenizer.ggml.pre"] == "qwen2"
    parts["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    assert tokenizer_fields(parts, tokenizer)["tokenizer.ggml.pre"] == "gpt-2"


def test_a_word_that_merges_never_reach_is_not_looked_up(parts, tokenizer):
    """llama-bpe takes a word that is a token whole; here merging gives [b, cd], so the other name is right."""
    small = copy.deepcopy(parts)
    vocabulary = {character: number for number, character in enumerate("abcd")} | {"bc": 4, "bcd": 5, "cd": 6}
    small["model"] |= {"vocab": vocabulary, "merges": [["c", "d"], ["b", "c"], ["bc", "d"]]}
    small["added_tokens"] = []
    assert tokenizer_fields(small, tokenizer)["tokenizer.ggml.pre"] == "dbrx"
    small["model"]["ignore_merges"] = True
    assert tokenizer_fields(small, tokenizer)["tokenizer.ggml.pre"] == "llama-bpe"


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFKC"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "Whitespace"}},
    ],
)
def test_other_rules_are_refused(change, parts, tokenizer):
    with pytest.raises(InputError, match="read text differently"):
        tokenizer_fields(parts | change, tokenizer)


@pytest.mark.parametrize("change", [{"byte_fallback": True}, {"unk_token": "<unk>"}])
def test_other_models_are_refused(change, parts, tokenizer):
    with pytest.raises(InputError, match="no plain byte-level BPE"):
        tokenizer_fields(parts | {"model": parts["model"] | change}, tokenizer)


def test_wordpiece(wordpiece, tmp_path):
    wordpiece.save(tmp_path)
    parts = json.loads((tmp_path / "tokenizer.json").read_text())
    fields = tokenizer_fields(parts, wordpiece)
    tokens = fields["tokenizer.ggml.tokens"]
    assert fields["tokenizer.ggml.model"] == "bert"
    assert tokens[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert fields["tokenizer.ggml.token_type"][:6] == [CONTROL, UNKNOWN, CONTROL, CONTROL, CONTROL, NORMAL]
    [cat] = wordpiece.encode("cat")
    assert tokens[cat] == "\u2581cat"
    inside = parts["model"]["vocab"]["##a"]
    assert tokens[inside] == "a"
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.seperator_token_id"]) == (2, 3)
    for change in ({"lowercase": False}, {"strip_accents": False}, {"handle_chinese_chars": False}):
        other = parts | {"normalizer": parts["normalizer"] | change}
        with pytest.raises(InputError, match="read text differently"):
            tokenizer_fields(other, wordpiece)
    with pytest.raises(InputError, match="read text differently"):
        tokenizer_fields(parts | {"pre_tokenizer": {"type": "Whitespace"}}, wordpiece)


def test_an_unknown_pattern_is_refused(parts, tokenizer):
    parts["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+|\s+"
    with pytest.raises(InputError, match="no name for this split pattern"):
        tokenizer_fields(parts, tokenizer)


def test_without_a_begin_token_none_is_added(tmp_path):
    backend = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate("abc")}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_tokens([AddedToken("word", special=False)])
    backend.add_special_tokens(["<|endoftext|>"])
    Tokenizer(backend, {"eos_token": "<|endoftext|>"}, "").save(tmp_path)
    plain = open_tokenizer(tmp_path)
    fields = tokenizer_fields(json.loads((tmp_path / "tokenizer.json").read_text()), plain)
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.ggml.token_type"] == [NORMAL] * 3 + [USER_DEFINED, CONTROL]
    assert "tokenizer.ggml.merges" not in fields
    assert "tokenizer.chat_template" not in fields
