"""Beam search finds what transformers' finds, for every rule of stopping and any length penalty."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from glasshouse.artifact import open_artifact
from glasshouse.inference.paged import PagedCache, Reader
from glasshouse.inference.search import BeamConfig, search_continuation, search_translations
from glasshouse.text.tokenizer import train_tokenizer

transformers = pytest.importorskip("transformers")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VOCABULARY, NEW = 300, 16
ENDS = [11, 42]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A random Llama in both libraries; its head is sharp enough that some texts end early and some never do."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            noise = torch.randn(parameter.shape, generator=random)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.25 * noise)
        theirs.lm_head.weight[ENDS] *= 1.5
    folder = tmp_path_factory.mktemp("llama")
    theirs.save_pretrained(folder)
    train_tokenizer(iter(["The cat sat on the mat. 猫坐在垫子上。" * 40] * 4), VOCABULARY, exact=False).save(
        folder
    )
    ours = open_artifact(folder, dtype=torch.float32).model
    return ours, theirs


@pytest.mark.parametrize(
    ("penalty", "early_stopping", "ends"),
    [
        (1.0, False, ENDS[:1]),
        (0.6, True, ENDS),
        (0.3, "never", ENDS),
        (-0.5, False, ENDS),
        (0.0, True, ENDS[:1]),
    ],
)
def test_the_same_texts_and_scores(models, penalty, early_stopping, ends):
    ours, theirs = models
    reader = Reader(ours, PagedCache(ours, 64, 4), 4, 16)
    random, lengths = torch.Generator().manual_seed(2), set()
    for number in range(20):
        prompt = torch.randint(0, VOCABULARY, (1 + number,), generator=random).tolist()
        config = BeamConfig(4, 3, penalty, early_stopping, NEW)
        found = search_continuation(reader, prompt, config, ends, VOCABULARY)
        expected = theirs.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), num_beams=4,
            num_return_sequences=3, length_penalty=penalty, early_stopping=early_stopping, max_new_tokens=NEW,
            do_sample=False, eos_token_id=ends, pad_token_id=299, return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        for answer, row, score in zip(found, expected.sequences, expected.sequences_scores, strict=True):
            wanted = row[len(prompt) :].tolist()
            assert [*answer.tokens] == wanted[: len(answer.tokens)], (number, found)
            assert set(wanted[len(answer.tokens) :]) <= {299}  # padding
            assert answer.score == pytest.approx(float(score), rel=1e-4, abs=1e-5)
            lengths.add(len(answer.tokens))
    assert len(lengths) > 2


def random_translator(family, folder):
    """A random encoder-decoder in both libraries."""
    size = {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }
    if family == "T5":
        shape = {
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
        }
        theirs = transformers.T5ForConditionalGeneration(transformers.T5Config(**size, **shape)).eval()
    else:
        shape = {
            f"{side}_{name}": value
            for side in ("encoder", "decoder")
            for name, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))
        }
        shape |= {
            "max_position_embeddings": 64,
            "activation_function": "swish",
            "forced_eos_token_id": None,
            "scale_embedding": True,
        }
        theirs = transformers.MarianMTModel(transformers.MarianConfig(**size, **shape)).eval()
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "embed_positions" not in name:
                noise = torch.randn(parameter.shape, generator=random)
                parameter.copy_(1 + 0.3 * noise if "norm" in name and "weight" in name else 0.3 * noise)
    theirs.save_pretrained(folder)
    train_tokenizer(iter(["The cat sat on the mat. 猫坐在垫子上。" * 40] * 4), VOCABULARY, exact=False).save(
        folder
    )
    return open_artifact(folder, dtype=torch.float32).model, theirs


@pytest.mark.parametrize("family", ["T5", "Marian"])
@pytest.mark.parametrize(("penalty", "early_stopping"), [(1.0, False), (0.6, True), (1.4, "never")])
def test_the_same_translations(family, penalty, early_stopping, tmp_path):
    ours, theirs = random_translator(family, tmp_path)
    sources = torch.randint(2, VOCABULARY, (6, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.arange(9)[None] < torch.tensor([9, 3, 1, 7, 5, 9])[:, None]
    sources = sources.masked_fill(~mask, 0)
    config = BeamConfig(4, 2, penalty, early_stopping, NEW)
    found = search_translations(ours, sources, mask, config, start_token=0, end_tokens=[1])
    expected = theirs.generate(
        sources, attention_mask=mask.long(), num_beams=4, num_return_sequences=2, length_penalty=penalty,
        early_stopping=early_stopping, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True,
        output_scores=True, bad_words_ids=None,
    )  # fmt: skip
    answers = [answer for two in found for answer in two]
    for answer, row, score in zip(answers, expected.sequences, expected.sequences_scores, strict=True):
        wanted = row[1:].tolist()
        assert [*answer.tokens] == wanted[: len(answer.tokens)]
        # Padding; theirs takes the end token where the padding is token 0.
        assert set(wanted[len(answer.tokens) :]) <= {0, 1}
        assert answer.score == pytest.approx(float(score), rel=1e-4, abs=1e-5)
    assert len({answer.tokens for answer in answers}) > 6
