"""config.json of encoders both ways: what is written is read back, what is not computed is refused by its key."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glasshouse.errors import InputError
from glasshouse.models.encoder import Encoder, EncoderConfig, HeadConfig
from glasshouse.models.huggingface import (
    canonical_name,
    config_from_huggingface,
    config_to_huggingface,
    copied_tensors,
    fit_to_tensors,
    stored_tensors,
)

IDS = {"bos_token_id": 7, "eos_token_id": 8, "pad_token_id": 1}
MODERN = EncoderConfig(400, 48, 5, 4, 96, 128, local_window=8, dropout=0.1)
BERT = EncoderConfig(400, 48, 3, 4, 96, 128, position="learned", local_window=None, global_every=1, token_types=2,
                     norm_place="after", norm_epsilon=1e-12, gated=False, bias="all")  # fmt: skip
ROBERTA = replace(BERT, position_offset=2, token_types=1, norm_epsilon=1e-5)
LABELS = ("no", "yes", "perhaps")
CONFIGS = {
    "modernbert": MODERN,
    "modernbert global": replace(MODERN, local_window=None, global_every=1, bias="all"),
    "modernbert every fourth": replace(MODERN, global_every=4, rope_theta=1e4, local_rope_theta=5e3, activation="silu"),
    "modernbert sequence": replace(MODERN, head=HeadConfig("sequence", LABELS, "mean")),
    "modernbert tokens": replace(MODERN, head=HeadConfig("token", LABELS)),
    "modernbert span": replace(MODERN, head=HeadConfig("span")),
    "modernbert bare": replace(MODERN, head=HeadConfig("none")),
    "bert": BERT,
    "bert sequence": replace(BERT, head=HeadConfig("sequence", LABELS), activation="gelu_tanh"),
    "bert tokens": replace(BERT, head=HeadConfig("token", LABELS)),
    "bert span": replace(BERT, head=HeadConfig("span"), dropout=0.1),
    "bert pooler": replace(BERT, head=HeadConfig("pooler")),
    "roberta": ROBERTA,
    "roberta sequence": replace(ROBERTA, head=HeadConfig("sequence", LABELS)),
    "roberta pooler": replace(ROBERTA, head=HeadConfig("pooler"), position_offset=8),
}  # fmt: skip
each_config = pytest.mark.parametrize("name", CONFIGS)


def facts(name: str, **changes) -> dict:
    written = config_to_huggingface(CONFIGS[name], IDS, "float32") | changes
    return {key: value for key, value in written.items() if value is not ...}


@each_config
def test_round_trip_through_json(name):
    written = json.loads(json.dumps(facts(name), allow_nan=False))
    assert config_from_huggingface(written) == CONFIGS[name]
    assert written["model_type"] == name.split()[0]


@each_config
def test_every_tensor_has_one_place_and_comes_back(name):
    config = CONFIGS[name]
    generator = torch.Generator().manual_seed(5)
    tensors = {
        key: torch.randn(value.shape, generator=generator)
        for key, value in Encoder(config).state_dict().items()
    }
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    stored = stored_tensors(config, reversed(list(tensors)))
    assert sorted(part for entry in stored.values() for part in entry.parts) == sorted(tensors)
    back = {}
    for key, entry in stored.items():
        assert canonical_name(config, key) == key
        back |= entry.split(entry.join(tensors).clone(), shapes)
    assert all(torch.equal(back[key], value) for key, value in tensors.items())
    assert all(original in stored for original in copied_tensors(config).values())


def test_fused_in_order():
    tensors = Encoder(MODERN).state_dict()
    stored = stored_tensors(MODERN, tensors)
    fused = stored["model.layers.2.attn.Wqkv.weight"].join(tensors)
    inner = stored["model.layers.2.mlp.Wi.weight"].join(tensors)
    for index, part in enumerate(("query", "key", "value")):
        assert torch.equal(fused[48 * index : 48 * index + 48], tensors[f"layers.2.attention.{part}.weight"])
    assert torch.equal(inner[:96], tensors["layers.2.feed_forward.gate.weight"])  # the half that is activated
    assert stored["decoder.bias"].parts == ("head.bias",)


@pytest.mark.parametrize(
    ("name", "key", "expected"),
    [
        ("bert", "embeddings.LayerNorm.gamma", "bert.embeddings.LayerNorm.weight"),
        ("bert", "bert.encoder.layer.0.output.LayerNorm.beta", "bert.encoder.layer.0.output.LayerNorm.bias"),
        ("bert", "bert.embeddings.position_ids", None),
        ("bert", "cls.seq_relationship.weight", None),
        ("bert", "bert.pooler.dense.weight", None),
        ("bert", "cls.predictions.bias", "cls.predictions.bias"),
        ("bert sequence", "bert.pooler.dense.weight", "bert.pooler.dense.weight"),
        ("bert pooler", "bert.pooler.dense.weight", "pooler.dense.weight"),
        ("bert pooler", "cls.predictions.bias", None),
        ("roberta", "lm_head.bias", "lm_head.bias"),
        ("roberta sequence", "roberta.pooler.dense.weight", None),
        ("modernbert", "embeddings.norm.weight", "model.embeddings.norm.weight"),
        ("modernbert", "head.norm.weight", "head.norm.weight"),
        ("modernbert bare", "model.final_norm.weight", "final_norm.weight"),
        ("modernbert bare", "decoder.bias", None),
    ],
)
def test_canonical_names(name, key, expected):
    assert canonical_name(CONFIGS[name], key) == expected


def test_a_pooler_is_there_when_the_file_has_one():
    pooler = CONFIGS["bert pooler"]
    assert fit_to_tensors(pooler, ["pooler.dense.weight"]) == pooler
    assert fit_to_tensors(pooler, ["embeddings.LayerNorm.weight"]).head.kind == "none"
    assert fit_to_tensors(MODERN, []) == MODERN


def test_absent_keys_mean_what_transformers_takes():
    base = config_from_huggingface({"model_type": "modernbert"})
    assert (base.num_layers, base.embedding_dim, base.local_window, base.global_every) == (22, 768, 64, 3)
    assert (base.rope_theta, base.local_rope_theta, base.norm_epsilon) == (160_000.0, 10_000.0, 1e-5)
    bert = config_from_huggingface({"model_type": "bert", "architectures": ["BertForSequenceClassification"]})
    assert (bert.vocab_size, bert.dropout, bert.token_types) == (30522, 0.1, 2)
    assert bert.head == HeadConfig("sequence", ("LABEL_0", "LABEL_1"))
    roberta = config_from_huggingface({"model_type": "roberta", "max_position_embeddings": 514})
    assert (roberta.position_offset, roberta.context_length) == (2, 512)


@pytest.mark.parametrize(
    ("name", "changes", "word"),
    [
        ("modernbert", {"attention_bias": True}, "bias"),
        ("modernbert", {"decoder_bias": False}, "decoder_bias"),
        ("modernbert", {"tie_word_embeddings": False}, "tie_word_embeddings"),
        ("modernbert", {"classifier_activation": "silu"}, "classifier_activation"),
        ("modernbert", {"layer_types": ["sliding_attention"] * 5}, "layer_types"),
        ("modernbert", {"layer_types": 3}, "layer_types"),
        ("modernbert", {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "yarn"),
        ("modernbert", {"rope_parameters": {"full_attention": 3}}, "rope_parameters"),
        ("modernbert", {"rope_scaling": {"factor": 2.0}}, "rope_scaling"),
        ("modernbert", {"hidden_activation": "quick_gelu"}, "quick_gelu"),
        ("modernbert", {"num_attention_heads": 5}, "cannot be divided"),
        ("modernbert", {"local_attention": 0}, "local_attention"),
        ("modernbert sequence", {"classifier_pooling": "max"}, "classifier_pooling"),
        ("modernbert sequence", {"id2label": {"0": "a", "2": "b"}}, "id2label"),
        ("modernbert sequence", {"id2label": []}, "id2label"),
        ("modernbert sequence", {"id2label": ..., "num_labels": -1}, "num_labels"),
        ("modernbert span", {"id2label": {"0": "a", "1": "b", "2": "c"}}, "id2label"),
        ("bert", {"is_decoder": True}, "is_decoder"),
        ("bert", {"add_cross_attention": True}, "add_cross_attention"),
        ("bert", {"position_embedding_type": "relative_key"}, "relative_key"),
        ("bert", {"architectures": ["BertForNextSentencePrediction"]}, "BertForNextSentencePrediction"),
        ("roberta", {"max_position_embeddings": 2}, "max_position_embeddings"),
        ("roberta", {"pad_token_id": -3}, "pad_token_id"),
        ("roberta", {"hidden_act": "relu"}, "hidden_act"),
        ("roberta", {"vocab_size": 2**40}, "vocab_size"),
    ],
)
def test_unsupported_values_are_refused_by_key(name, changes, word):
    with pytest.raises(InputError) as caught:
        config_from_huggingface(facts(name, **changes))
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@each_config
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_value_anywhere_is_read_or_refused(name, data):
    written = facts(name)
    anything = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers(), max_size=2),
        st.dictionaries(st.text(), st.integers(), max_size=2),
        st.dictionaries(st.sampled_from(["full_attention", "sliding_attention", "0"]), st.none() | st.text()),
    )  # fmt: skip
    for key in data.draw(st.lists(st.sampled_from(sorted(written)), min_size=1, max_size=3)):
        written[key] = data.draw(anything)
    try:
        config = config_from_huggingface(written)
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        again = config_from_huggingface(config_to_huggingface(config, IDS, "float32"))
        assert again == config


def test_a_shape_that_no_family_holds_is_refused():
    for config in (
        replace(MODERN, gated=False),
        replace(MODERN, norm_place="after"),
        replace(MODERN, token_types=2),
        replace(MODERN, head=HeadConfig("pooler")),
        replace(BERT, bias="none"),
        replace(BERT, token_types=0),
        replace(BERT, head=HeadConfig("sequence", LABELS, "mean")),
        replace(ROBERTA, activation="silu"),
    ):
        with pytest.raises(InputError, match="no family on disk"):
            config_to_huggingface(config, IDS, "float32")
