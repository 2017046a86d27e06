"""config.json both ways: what is written is read back, and what is not understood is refused by the name of its key."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glasshouse.errors import InputError
from glasshouse.models.decoder import DecoderConfig
from glasshouse.models.huggingface import config_from_huggingface, config_to_huggingface, family_for

SIZES = {"vocab_size": 400, "embedding_dim": 48, "num_layers": 3, "num_heads": 4, "head_dim": 12,
         "feed_forward_dim": 96, "context_length": 128}  # fmt: skip
IDS = {"bos_token_id": 7, "eos_token_id": [7, 9], "pad_token_id": None}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip


def native(**changes) -> DecoderConfig:
    return DecoderConfig(**{**SIZES, "num_key_value_heads": 2, **changes})


GPT2 = native(num_key_value_heads=4, query_key_norm=False, bias="all", position="learned", norm="layer", gated=False,
              activation="gelu_tanh", norm_epsilon=1e-5)  # fmt: skip
CONFIGS = {
    "qwen3": native(),
    "qwen3 sliding": native(sliding_window=16, tie_embeddings=False),
    "qwen3 wide heads": native(head_dim=32, dropout=0.2, norm_epsilon=1e-5, rope_theta=1e6),
    "llama": native(query_key_norm=False, rope_scaling=LLAMA3),
    "llama linear": native(query_key_norm=False, rope_scaling={"rope_type": "linear", "factor": 2.0}),
    "llama biased": native(query_key_norm=False, bias="all", activation="gelu"),
    "mistral": native(query_key_norm=False, sliding_window=16),
    "qwen2": native(query_key_norm=False, bias="query_key_value"),
    "qwen2 sliding": native(
        query_key_norm=False, bias="query_key_value", sliding_window=16, activation="gelu_tanh"
    ),
    "gpt2": GPT2,
}


def facts(name: str = "qwen3", **changes) -> dict:
    written = config_to_huggingface(CONFIGS[name], IDS, "float32") | changes
    return {key: value for key, value in written.items() if value is not ...}


def assert_refused(value, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        config_from_huggingface(value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_through_json(name):
    written = json.loads(json.dumps(config_to_huggingface(CONFIGS[name], IDS, "bfloat16"), allow_nan=False))
    assert config_from_huggingface(written) == CONFIGS[name]
    assert written["model_type"] == family_for(CONFIGS[name]) == name.split()[0]
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"
    assert (written["bos_token_id"], written["eos_token_id"], written["pad_token_id"]) == (7, [7, 9], None)


def test_both_spellings_of_the_rotary_base():
    written = facts("llama")
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 10000.0
    assert written["rope_scaling"] == LLAMA3
    assert written["rope_parameters"]["rope_type"] == "llama3"
    old = facts("llama", rope_parameters=..., rope_theta=5000.0)
    assert config_from_huggingface(old).rope_theta == 5000.0
    new = facts("llama", rope_theta=..., rope_scaling=...)
    assert config_from_huggingface(new) == CONFIGS["llama"]
    assert config_from_huggingface(facts("qwen3", rope_theta=..., rope_parameters=...)).rope_theta == 10000.0
    older = facts("llama linear", rope_parameters=..., rope_scaling={"type": "linear", "factor": 2})
    assert config_from_huggingface(older) == CONFIGS["llama linear"]


def test_what_absent_keys_mean():
    bare = {"model_type": "llama", "vocab_size": 400, "hidden_size": 48, "num_hidden_layers": 1,
            "num_attention_heads": 4, "intermediate_size": 96, "max_position_embeddings": 64}  # fmt: skip
    config = config_from_huggingface(bare)
    assert (config.num_key_value_heads, config.head_dim, config.tie_embeddings) == (4, 12, False)
    assert (config.rope_theta, config.norm_epsilon, config.activation) == (10000.0, 1e-6, "silu")
    assert config_from_huggingface(bare | {"model_type": "qwen3"}).head_dim == 128
    assert config_from_huggingface(bare | {"model_type": "mistral"}).sliding_window == 4096
    assert (
        config_from_huggingface(bare | {"model_type": "mistral", "sliding_window": None}).sliding_window
        is None
    )
    assert config_from_huggingface({"model_type": "gpt2"}) == DecoderConfig(
        50257, 768, 12, 12, 12, 64, 3072, 1024, position="learned", norm="layer", norm_epsilon=1e-5, bias="all",
        activation="gelu_tanh", gated=False, query_key_norm=False, dropout=0.1,
    )  # fmt: skip


def test_qwen_windows():
    window = {"use_sliding_window": True, "sliding_window": 16, "layer_types": ...}
    assert config_from_huggingface(facts(**window, max_window_layers=0)).sliding_window == 16
    assert config_from_huggingface(facts(**window, max_window_layers=3)).sliding_window is None
    assert config_from_huggingface(facts(**window | {"use_sliding_window": False})).sliding_window is None
    assert_refused(facts(**window, max_window_layers=1), "layer_types")
    mixed = ["full_attention", "sliding_attention", "full_attention"]
    assert_refused(facts(**window | {"layer_types": mixed}), "layer_types")
    assert_refused(facts(**window | {"layer_types": ["sliding_attention"]}), "layer_types")
    assert_refused(facts(**window | {"layer_types": "sliding_attention"}), "layer_types")


@pytest.mark.parametrize("name", ["rwkv", "mamba", "Qwen3", "", None, 3, ["llama"], {"a": 1}])
def test_unknown_family_is_named_beside_the_known(name):
    assert_refused(facts(model_type=name), "model_type", "qwen3, llama, mistral, qwen2, gpt2")


def test_unknown_family_says_which():
    assert_refused(facts(model_type="deepseek_v3"), "'deepseek_v3'")
    assert_refused(facts(model_type="x" * 10**6), "unknown model family")


@pytest.mark.parametrize("value", [None, [], "text", 3])
def test_not_an_object(value):
    assert_refused(value, "JSON object")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"auto_map": {"AutoModel": "code.Model"}}, "never run"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "Qwen3ForSequenceClassification"),
        ({"architectures": "Qwen3ForCausalLM"}, "architectures"),
        ({"architectures": [["deep"]]}, "architectures"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "quick_gelu"}, "quick_gelu"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_parameters": ...}, "yarn"),
        ({"rope_scaling": {"rope_type": ["yarn"]}, "rope_parameters": ...}, "rope_type"),
        ({"rope_scaling": {"rope_type": "linear"}, "rope_parameters": ...}, "'factor'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "disagree"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}, "rope_parameters": ...}, "low_freq_factor"),
        ({"rope_scaling": {**LLAMA3, "factor": -1}, "rope_parameters": ...}, "factor"),
        ({"rope_scaling": [1], "rope_parameters": ...}, "rope_scaling"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_theta": 5.0}, "twice"),
        ({"rope_theta": "10000"}, "rope_theta"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"head_dim": 13}, "even"),
        ({"num_attention_heads": 5, "head_dim": 12}, "5 query heads cannot share 2"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": ..., "model_type": "llama",
          "architectures": ...}, "cannot be divided"),
        ({"num_key_value_heads": 8}, "cannot share"),
        ({"hidden_size": ...}, "lacks 'hidden_size'"),
    ],
)  # fmt: skip
def test_unsupported_values_are_refused_by_key(changes, word):
    assert_refused(facts(**changes), word)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"scale_attn_weights": False}, "scale_attn_weights"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"n_head": 7}, "cannot be divided"),
        ({"n_embd": 2**40}, "n_embd"),
        ({"activation_function": "tanh"}, "tanh"),
    ],
)
def test_unsupported_gpt2(changes, word):
    assert_refused(facts("gpt2", **changes), word)


def test_llama_with_half_its_biases():
    assert_refused(facts("llama", attention_bias=True), "mlp_bias")


SIZE_KEYS = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "intermediate_size", "max_position_embeddings", "head_dim"]  # fmt: skip


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("key", SIZE_KEYS)
@pytest.mark.parametrize(
    "value", [2**40, 10**30, 0, -1, -(2**63), 1.5, math.inf, "48", True, [48], {"n": 48}, nested(950)]
)
def test_absurd_sizes_are_refused_before_anything_is_allocated(key, value):
    assert_refused(facts(**{key: value}), key)


@pytest.mark.parametrize("name", ["qwen3", "llama", "mistral", "qwen2", "gpt2"])
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_value_anywhere_is_read_or_refused(name, data):
    written = facts(name)
    anything = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.just(nested(900)),
        st.lists(st.integers(), max_size=2), st.dictionaries(st.text(), st.integers(), max_size=2),
        st.dictionaries(st.sampled_from(["rope_type", "type", "factor", "rope_theta"]), st.floats() | st.text()),
    )  # fmt: skip
    keys = data.draw(
        st.lists(st.sampled_from([*sorted(written), "rope_scaling", "auto_map"]), min_size=1, max_size=3)
    )
    written |= {key: data.draw(anything) for key in keys}
    try:
        config = config_from_huggingface(written)
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert config_from_huggingface(config_to_huggingface(config, IDS, "float32")) == config


def test_a_shape_that_no_family_holds_is_refused():
    for config in (
        native(bias="all"),
        native(position="learned"),
        native(norm="layer"),
        native(gated=False),
        native(query_key_norm=False, bias="all", sliding_window=4),
        DecoderConfig(**{**SIZES, "head_dim": 16}, num_key_value_heads=4, query_key_norm=False, bias="all",
                      position="learned", norm="layer", gated=False),
    ):  # fmt: skip
        with pytest.raises(InputError, match="no family on disk"):
            config_to_huggingface(config, IDS, "float32")
