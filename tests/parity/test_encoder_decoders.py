"""What our encoder-decoder computes is what transformers computes, for every layout on disk, in both directions."""

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from glasshouse.artifact import open_artifact, save_artifact
from glasshouse.inference.generate import TranslationConfig, translate_texts
from glasshouse.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from glasshouse.text.tokenizer import Tokenizer, train_tokenizer

transformers = pytest.importorskip("transformers")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

TOLERANCE = 1e-4
TEXT = [
    "A man in a red shirt rides a bicycle. ",
    "Ein Mann fährt Fahrrad, 猫坐在垫子上。\n",
    "Two dogs run.\n",
] * 20
T5 = {"vocab_size": 320, "d_model": 48, "d_kv": 8, "d_ff": 80, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4,
      "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20,
      "pad_token_id": 299, "eos_token_id": 296, "decoder_start_token_id": 299}  # fmt: skip
BART = {"vocab_size": 320, "d_model": 48, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 80, "decoder_ffn_dim": 80, "max_position_embeddings": 96,
        "pad_token_id": 299, "eos_token_id": 296, "bos_token_id": 296, "decoder_start_token_id": 299,
        "forced_eos_token_id": None}  # fmt: skip
CASES = {
    "t5 v1.1": ("T5", T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "t5 original": ("T5", T5 | {"feed_forward_proj": "relu"}),
    "t5 gated silu": ("T5", T5 | {"feed_forward_proj": "gated-silu", "num_decoder_layers": None}),
    "marian": ("Marian", BART | {"activation_function": "swish", "scale_embedding": True}),
    "marian relu": ("Marian", BART | {"activation_function": "relu"}),
    "bart": ("Bart", BART | {"activation_function": "gelu"}),
    "bart scaled": ("Bart", BART | {"activation_function": "relu", "scale_embedding": True}),
}
CLASSES = {
    "T5": "T5ForConditionalGeneration",
    "Marian": "MarianMTModel",
    "Bart": "BartForConditionalGeneration",
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter(TEXT), 300)


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Every parameter and bias of the logits at random: a norm of ones or a bias of zero hides a forgotten one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            if "embed_positions" in name and "Marian" in type(model).__name__:
                continue  # a table of sines is no parameter
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name and "weight" in name else 0.15 * noise)


def theirs(case: str):
    family, settings = CASES[case]
    model = getattr(transformers, CLASSES[family])(
        getattr(transformers, f"{family}Config")(**settings)
    ).eval()
    if case == "t5 v1.1":  # a head of its own: transformers 5 always begins with a tied one
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    randomise(model, seed=1)
    return model


def pairs(seed: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sources with their mask, one of them padded, and targets."""
    generator = torch.Generator().manual_seed(seed)
    sources = torch.randint(0, 296, (2, length), generator=generator)
    mask = torch.ones_like(sources, dtype=torch.bool)
    mask[1, max(1, length - 5) :] = False
    return sources, mask, torch.randint(0, 296, (2, length + 3), generator=generator)


def assert_same_logits(model: EncoderDecoder, reference) -> None:
    for length in (1, 2, 9, 70):
        sources, mask, targets = pairs(length, length)
        with torch.no_grad():
            expected = reference(
                input_ids=sources, attention_mask=mask.long(), decoder_input_ids=targets
            ).logits
            found = model.logits(model(targets, memory=model.encode(sources, mask), memory_mask=mask))
        assert expected.std() > 0.1  # a flat output would agree with anything
        assert (found - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_both_directions(case, tokenizer, tmp_path):
    reference = theirs(case)
    reference.save_pretrained(tmp_path / "theirs")
    tokenizer.save(tmp_path / "theirs")
    artifact = open_artifact(tmp_path / "theirs")
    assert isinstance(artifact.model, EncoderDecoder)
    assert_same_logits(artifact.model, reference)
    save_artifact(tmp_path / "ours", artifact.model, tokenizer, generation=artifact.generation)
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours").eval()
    assert type(again) is type(reference)
    assert_same_logits(artifact.model, again)
    assert again.config.decoder_start_token_id == 299
    assert open_artifact(tmp_path / "ours").config == artifact.config


NATIVE = {  # no T5 here has more decoder than encoder layers: transformers 5.23 makes its caches too short for that
    "t5": EncoderDecoderConfig(300, 32, 2, 1, 4, 8, 48, 96),
    "t5 tied": EncoderDecoderConfig(300, 32, 2, 2, 2, 8, 48, 96, output="tied", activation="relu", gated=False),
    "marian": EncoderDecoderConfig(
        300, 32, 1, 2, 4, 8, 48, 96, position="sinusoidal", norm="layer", norm_epsilon=1e-5, norm_place="after",
        activation="relu", gated=False, bias="all", embedding_scale=32**0.5, output="tied", dropout=0.2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NATIVE)
def test_what_we_make_opens_as_theirs(case, tokenizer, tmp_path):
    model = EncoderDecoder(NATIVE[case]).eval()
    randomise(model, seed=3)
    ids = {"decoder_start_token_id": tokenizer.pad}
    save_artifact(tmp_path / "model", model, tokenizer, generation=ids)
    reference = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model").eval()
    assert_same_logits(model, reference)
    facts = json.loads((tmp_path / "model" / "config.json").read_text())
    assert facts["decoder_start_token_id"] == tokenizer.pad
    assert open_artifact(tmp_path / "model").config == NATIVE[case]


@pytest.mark.parametrize("case", ["t5 v1.1", "marian", "bart"])
def test_loss_is_theirs(case, tokenizer, tmp_path):
    """Teacher forcing: the targets shifted behind the start token, padding not counted."""
    from glasshouse.training.objectives import IGNORED, SequenceBatch, sequence_to_sequence

    reference = theirs(case)
    reference.save_pretrained(tmp_path / "theirs")
    tokenizer.save(tmp_path / "theirs")
    model = open_artifact(tmp_path / "theirs").model
    sources, mask, labels = pairs(5, 12)
    labels[1, 9:] = IGNORED
    tokens = torch.where(labels == IGNORED, 299, labels).roll(1, dims=1)
    tokens[:, 0] = 299
    with torch.no_grad():
        expected = reference(input_ids=sources, attention_mask=mask.long(), labels=labels).loss
        loss, weight = sequence_to_sequence()(model, SequenceBatch(sources, mask, tokens, labels))
    assert weight == int((labels != IGNORED).sum())
    assert loss / weight == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("case", NATIVE)
@pytest.mark.parametrize("beams", [1, 4])
def test_the_text_is_theirs(case, beams, tokenizer, tmp_path):
    """From a folder of ours, greedily and with four beams: theirs generates what `translate_texts` does."""
    model = EncoderDecoder(NATIVE[case]).eval()
    randomise(model, seed=4)
    ids = {
        "decoder_start_token_id": tokenizer.pad,
        "eos_token_id": 17,
        "num_beams": beams,
        "length_penalty": 0.8,
    }
    save_artifact(tmp_path / "model", model, tokenizer, generation=ids)
    texts = ["A man rides a bicycle.", "Two dogs", "猫坐在垫子上。 Ein Mann fährt", "in a red shirt rides a"]
    found = translate_texts(open_artifact(tmp_path / "model"), texts, TranslationConfig(max_new_tokens=14))
    reference = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model").eval()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    given = theirs(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        made = reference.generate(
            input_ids=given["input_ids"], attention_mask=given["attention_mask"], max_new_tokens=14
        )
    expected = [tokenizer.decode([t for t in row[1:].tolist() if t != tokenizer.pad]).strip() for row in made]
    assert found == expected
    assert len(set(found)) > 1
