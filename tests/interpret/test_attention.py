"""Attention patterns: each row a distribution over what is before it, and the ones that transformers gives."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from glasshouse.artifact import open_artifact
from glasshouse.errors import InputError
from glasshouse.interpret.attention import attention_patterns, is_pattern
from glasshouse.text.tokenizer import train_tokenizer

LLAMA = {"vocab_size": 300, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
         "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}  # fmt: skip
TOKENS = torch.tensor([7, 100, 200, 31, 4, 4, 90, 255, 12])


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tiny Llama of transformers', and the same one opened by us."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**LLAMA, attn_implementation="eager")
    theirs = transformers.LlamaForCausalLM(config).eval()
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random) + (parameter.dim() == 1))
    folder = tmp_path_factory.mktemp("llama")
    theirs.save_pretrained(folder)
    train_tokenizer(iter(["The cat sat on the mat. "] * 4), 270).save(folder)
    return theirs, open_artifact(folder).model


@torch.no_grad()
def test_rows_sum_to_one_and_nothing_looks_ahead(pair):
    patterns = attention_patterns(pair[1], TOKENS)
    assert patterns.shape == (3, 4, 9, 9)
    torch.testing.assert_close(patterns.sum(-1), torch.ones(3, 4, 9))
    assert patterns.triu(1).abs().max() == 0
    assert patterns.min() >= 0


@torch.no_grad()
def test_same_as_transformers(pair):
    theirs, ours = pair
    expected = torch.cat(theirs(TOKENS[None], output_attentions=True).attentions)
    patterns = attention_patterns(ours, TOKENS)
    torch.testing.assert_close(patterns, expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.1  # patterns that are all alike would agree with anything


@torch.no_grad()
def test_one_position_is_that_row_of_all(pair):
    whole = attention_patterns(pair[1], TOKENS)
    for position in (0, 4, 8):
        row = attention_patterns(pair[1], TOKENS, position)
        assert row.shape == (3, 4, 9)
        assert torch.equal(row, whole[:, :, position])
        assert row.untyped_storage().nbytes() == row.nbytes  # not a view that holds all positions in memory


def test_names_of_other_stacks():
    assert is_pattern("layers.11.attention.pattern")
    assert not is_pattern("layers.11.cross_attention.pattern")
    assert not is_pattern("encoder.layers.1.attention.pattern")
    assert is_pattern("decoder.layers.1.cross_attention.pattern", "cross_attention", "decoder.")


def test_a_model_without_such_attention_is_refused(pair):
    with pytest.raises(InputError, match="no such activation"):
        attention_patterns(pair[1], TOKENS, block="cross_attention")
