"""The encoder families on disk: ModernBERT, BERT (MiniLM is one) and RoBERTa; their config.json and tensor names.

Pure: dicts and names; knows no files and no tensors.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from glasshouse.errors import InputError
from glasshouse.models.encoder import EncoderConfig, HeadConfig
from glasshouse.models.huggingface_config import (
    LIMITS,
    NEVER,
    TRAINED,
    WHOLE,
    Layout,
    head_width,
    read_activation,
    read_flag,
    read_integer,
    read_number,
    refuse_unless,
    say_value,
)

KINDS = {  # what transformers calls a head, to ours; BERT's model for pretraining has a second one, which is left out
    "ForMaskedLM": "masked",
    "ForSequenceClassification": "sequence",
    "ForTokenClassification": "token",
    "ForQuestionAnswering": "span",
    "Model": "none",
    "ForPreTraining": "masked",
}
CLASSES = {"modernbert": "ModernBert", "bert": "Bert", "roberta": "Roberta"}
ARCHITECTURES = {
    family: tuple(start + end for end in KINDS if family == "bert" or end != "ForPreTraining")
    for family, start in CLASSES.items()
}
LABELS_LIMIT = 2**20
MODERNBERT_MODULES = {  # query, key and value are stored as one, and so are gate and up
    "embedding": "embeddings.tok_embeddings",
    "embedding_norm": "embeddings.norm",
    "layers.N.attention_norm": "layers.N.attn_norm",
    "layers.N.attention.query": "layers.N.attn.Wqkv",
    "layers.N.attention.key": "layers.N.attn.Wqkv",
    "layers.N.attention.value": "layers.N.attn.Wqkv",
    "layers.N.attention.output": "layers.N.attn.Wo",
    "layers.N.feed_forward_norm": "layers.N.mlp_norm",
    "layers.N.feed_forward.gate": "layers.N.mlp.Wi",
    "layers.N.feed_forward.up": "layers.N.mlp.Wi",
    "layers.N.feed_forward.down": "layers.N.mlp.Wo",
    "norm": "final_norm",
}
BERT_MODULES = {
    "embedding": "embeddings.word_embeddings",
    "position_embedding": "embeddings.position_embeddings",
    "token_type_embedding": "embeddings.token_type_embeddings",
    "embedding_norm": "embeddings.LayerNorm",
    "layers.N.attention.query": "encoder.layer.N.attention.self.query",
    "layers.N.attention.key": "encoder.layer.N.attention.self.key",
    "layers.N.attention.value": "encoder.layer.N.attention.self.value",
    "layers.N.attention.output": "encoder.layer.N.attention.output.dense",
    "layers.N.attention_norm": "encoder.layer.N.attention.output.LayerNorm",
    "layers.N.feed_forward.up": "encoder.layer.N.intermediate.dense",
    "layers.N.feed_forward.down": "encoder.layer.N.output.dense",
    "layers.N.feed_forward_norm": "encoder.layer.N.output.LayerNorm",
}
MODERN_HEAD = {
    "head.dense": "head.dense",
    "head.norm": "head.norm",
    "head.output": "classifier",
    "head": "decoder",
}
HEAD_MODULES: Mapping[str, Mapping[str, Mapping[str, str]]] = {  # family: kind: ours to theirs
    "modernbert": dict.fromkeys(("masked", "sequence", "token", "span"), MODERN_HEAD),
    "bert": {
        "masked": {
            "head.dense": "cls.predictions.transform.dense",
            "head.norm": "cls.predictions.transform.LayerNorm",
            "head": "cls.predictions",
        },
        "sequence": {"head.dense": "bert.pooler.dense", "head.output": "classifier"},
        "token": {"head.output": "classifier"},
        "span": {"head.output": "qa_outputs"},
        "pooler": {"head.dense": "pooler.dense"},
    },
    "roberta": {
        "masked": {"head.dense": "lm_head.dense", "head.norm": "lm_head.layer_norm", "head": "lm_head"},
        "sequence": {"head.dense": "classifier.dense", "head.output": "classifier.out_proj"},
        "token": {"head.output": "classifier"},
        "span": {"head.output": "qa_outputs"},
        "pooler": {"head.dense": "pooler.dense"},
    },
}
PREFIXES = {"modernbert": "model.", "bert": "bert.", "roberta": "roberta."}
OUTSIDE = ("head.", "decoder.", "classifier.", "cls.", "lm_head.", "qa_outputs.")
TIED = {"modernbert": "decoder", "bert": "cls.predictions.decoder", "roberta": "lm_head.decoder"}
UNUSED = r"(^|\.)embeddings\.position_ids$|^cls\.seq_relationship\."
OLDER = ((r"\bLayerNorm\.gamma$", "LayerNorm.weight"), (r"\bLayerNorm\.beta$", "LayerNorm.bias"))
"""As the first releases of BERT spelled it."""


# ---- tensors


def encoder_layout(config: EncoderConfig) -> Layout:
    """The names and layout of an encoder's tensors on disk. Without a head for scores, names have no prefix."""
    family, kind = encoder_family(config), config.head.kind
    bare = kind in ("none", "pooler")
    prefix = "" if bare else PREFIXES[family]
    body = MODERNBERT_MODULES if family == "modernbert" else BERT_MODULES
    modules = {ours: prefix + theirs for ours, theirs in body.items()}
    modules |= HEAD_MODULES[family].get(kind, {})
    copies: dict[str, str] = {}
    if kind == "masked":
        copies[f"{TIED[family]}.weight"] = modules["embedding"] + ".weight"
        if family != "modernbert":
            copies[f"{TIED[family]}.bias"] = modules["head"] + ".bias"
    older = OLDER if family != "modernbert" else ()
    if bare:
        older = (*older, (f"^{PREFIXES[family]}".replace(".", r"\."), ""))
    return Layout(
        modules, prefix, () if bare else OUTSIDE, constant=_unused(family, kind), copies=copies, older=older
    )


def _unused(family: str, kind: str) -> str:
    """A pattern for the tensors that a file may hold for heads other than this one."""
    if family == "modernbert":
        return r"^(head|decoder|classifier)\." if kind == "none" else NEVER
    pooler = r"|(^|\.)pooler\." if (family, kind) != ("bert", "sequence") and kind != "pooler" else ""
    others = r"|^(cls|lm_head|classifier|qa_outputs)\." if kind in ("none", "pooler") else ""
    return UNUSED + pooler + others


def without_pooler(config: EncoderConfig, names: Iterable[str]) -> EncoderConfig:
    """The shape as the tensors of a file say it: BERT's config.json does not tell whether there is a pooler."""
    if config.head.kind != "pooler" or any("pooler.dense" in name for name in names):
        return config
    return replace(config, head=HeadConfig("none"))


# ---- config: theirs to ours


def read_encoder(facts: Mapping[str, Any], family: str, architecture: str) -> EncoderConfig:
    """The shape of the encoder that a `config.json` of a family describes; absent keys mean what transformers takes.

    Args:
        facts: the parsed file.
        family: its model_type.
        architecture: the class that it names.

    Raises:
        InputError: a value of the wrong kind or size, or a feature that is not supported. `where` is the key.
    """
    refuse_unless(read_flag(facts, "tie_word_embeddings", True), "tie_word_embeddings", False)
    kind = KINDS[architecture.removeprefix(CLASSES[family])]
    if kind == "none" and family != "modernbert":
        kind = "pooler"
    head = _head(facts, kind, family)
    return _modernbert_config(facts, head) if family == "modernbert" else _bert_config(facts, head, family)


def _head(facts: Mapping[str, Any], kind: str, family: str) -> HeadConfig:
    labels = _labels(facts)
    if kind == "span":
        refuse_unless(len(labels) == 2, "id2label", facts.get("id2label"))
    pooling = facts.get("classifier_pooling") or "cls"
    if kind != "sequence" or family != "modernbert":
        return HeadConfig(kind, labels if kind in ("sequence", "token") else ())
    if pooling not in ("cls", "mean"):
        raise InputError(f"unknown pooling {say_value(pooling)}", "classifier_pooling", "known: cls, mean")
    return HeadConfig(kind, labels, "first" if pooling == "cls" else "mean")


def _labels(facts: Mapping[str, Any]) -> tuple[str, ...]:
    named = facts.get("id2label")
    if named is None:
        count = facts.get("num_labels")
        count = 2 if count is None else count
        if type(count) is not int or not 1 <= count <= LABELS_LIMIT:
            raise InputError(f"{say_value(count)} is no number of labels", "num_labels", TRAINED)
        return tuple(f"LABEL_{number}" for number in range(count))
    if not isinstance(named, dict) or not 1 <= len(named) <= LABELS_LIMIT:
        raise InputError(f"{say_value(named)} is no table of labels", "id2label", WHOLE)
    labels = [named.get(str(number), named.get(number)) for number in range(len(named))]
    if not all(isinstance(label, str) for label in labels):
        raise InputError("the labels are not numbered 0, 1, ... or have no names", "id2label", WHOLE)
    return tuple(str(label) for label in labels)


def _modernbert_config(facts: Mapping[str, Any], head: HeadConfig) -> EncoderConfig:
    usual = {"vocab_size": 50368, "hidden_size": 768, "intermediate_size": 1152, "num_hidden_layers": 22,
             "num_attention_heads": 12, "max_position_embeddings": 8192}  # fmt: skip
    sizes = {key: read_integer(facts, key, value) for key, value in usual.items()}
    head_width(sizes["hidden_size"], sizes["num_attention_heads"])
    biases = {
        key: read_flag(facts, key, False)
        for key in ("attention_bias", "mlp_bias", "norm_bias", "classifier_bias")
    }
    for key, value in biases.items():
        refuse_unless(value == biases["attention_bias"], key, value)
    refuse_unless(read_flag(facts, "decoder_bias", True), "decoder_bias", False)
    activation = read_activation(facts, "hidden_activation", "gelu")
    other = read_activation(facts, "classifier_activation", "gelu")
    refuse_unless(head.kind == "none" or other == activation, "classifier_activation", other)
    every = _global_every(facts, sizes["num_hidden_layers"])
    theta, local_theta = _thetas(facts)
    window = read_integer(facts, "sliding_window", 128, "local_attention")
    return EncoderConfig(
        *_sizes(sizes),
        rope_theta=theta,
        local_rope_theta=local_theta,
        local_window=None if every == 1 else max(1, window // 2),
        global_every=every,
        norm_epsilon=read_number(facts, "norm_eps", 1e-5, 0.0, 1.0),
        activation=activation,
        bias="all" if biases["attention_bias"] else "none",
        dropout=read_number(facts, "mlp_dropout", 0.0, 0.0, 0.99),
        head=head,
    )


def _sizes(sizes: Mapping[str, int]) -> tuple[int, int, int, int, int, int]:
    """In the order of `EncoderConfig`."""
    return (
        sizes["vocab_size"],
        sizes["hidden_size"],
        sizes["num_hidden_layers"],
        sizes["num_attention_heads"],
        sizes["intermediate_size"],
        sizes["max_position_embeddings"],
    )


def _kinds(layers: int, every: int) -> list[str]:
    return ["sliding_attention" if layer % every else "full_attention" for layer in range(layers)]


def _global_every(facts: Mapping[str, Any], layers: int) -> int:
    """Each so manieth layer is global; 1 where all are."""
    every = read_integer(facts, "num_hidden_layers", 3, "global_attn_every_n_layers")
    kinds = facts.get("layer_types")
    if kinds is None:
        kinds = _kinds(layers, every)
    if not isinstance(kinds, list) or kinds != _kinds(layers, every):
        found = [other for other in range(1, layers + 1) if kinds == _kinds(layers, other)]
        refuse_unless(bool(found), "layer_types", kinds)
        every = found[0]
    return 1 if kinds == ["full_attention"] * layers else every


def _thetas(facts: Mapping[str, Any]) -> tuple[float, float]:
    """The bases of the global and of the local rotary frequencies, in either spelling."""
    tables = facts.get("rope_parameters")
    if not isinstance(tables, dict | None):
        raise InputError(f"{say_value(tables)} is not an object", "rope_parameters", WHOLE)
    refuse_unless(not facts.get("rope_scaling"), "rope_scaling", facts.get("rope_scaling"))
    found = []
    for kind, key, usual in (
        ("full_attention", "global_rope_theta", 160_000.0),
        ("sliding_attention", "local_rope_theta", 10_000.0),
    ):
        table = (tables or {}).get(kind)
        if not isinstance(table, dict | None):
            raise InputError(f"{say_value(table)} is not an object", "rope_parameters", WHOLE)
        table = table or {}
        rope_type = table.get("rope_type", table.get("type", "default"))
        refuse_unless(rope_type in (None, "default"), "rope_parameters", rope_type)
        old = read_number(facts, key, usual, 1.0, 1e12)
        found.append(read_number(table, "rope_theta", old, 1.0, 1e12))
    return found[0], found[1]


def _bert_config(facts: Mapping[str, Any], head: HeadConfig, family: str) -> EncoderConfig:
    for key in ("is_decoder", "add_cross_attention"):
        refuse_unless(not read_flag(facts, key, False), key, True)
    kind = facts.get("position_embedding_type")
    refuse_unless(kind in (None, "absolute"), "position_embedding_type", kind)
    roberta = family == "roberta"
    usual = {"vocab_size": 50265 if roberta else 30522, "hidden_size": 768, "intermediate_size": 3072,
             "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 512}  # fmt: skip
    sizes = {key: read_integer(facts, key, value) for key, value in usual.items()}
    head_width(sizes["hidden_size"], sizes["num_attention_heads"])
    offset = 0
    if roberta:
        offset = 1 + int(read_number(facts, "pad_token_id", 1, 0, LIMITS["vocab_size"]))
        sizes["max_position_embeddings"] -= offset
        if sizes["max_position_embeddings"] < 1:
            raise InputError("the positions end before they begin", "max_position_embeddings", TRAINED)
    activation = read_activation(facts, "hidden_act", "gelu")
    refuse_unless(not roberta or head.kind != "masked" or activation == "gelu", "hidden_act", activation)
    return EncoderConfig(
        *_sizes(sizes),
        position="learned",
        position_offset=offset,
        local_window=None,
        global_every=1,
        token_types=int(read_number(facts, "type_vocab_size", 2, 1, 2**10)),
        norm_place="after",
        norm_epsilon=read_number(facts, "layer_norm_eps", 1e-12, 0.0, 1.0),
        activation=activation,
        gated=False,
        bias="all",
        dropout=read_number(facts, "hidden_dropout_prob", 0.1, 0.0, 0.99),
        head=head,
    )


# ---- config: ours to theirs


def encoder_family(config: EncoderConfig) -> str:
    """The family (`model_type`) that holds this encoder on disk.

    Raises:
        InputError: none of them can say what the config says.
    """
    whole = config.num_heads * config.head_dim == config.embedding_dim
    kind = config.head.kind
    modern = (config.position, config.norm_place, config.gated, config.token_types, config.position_offset)
    if whole and modern == ("rotary", "before", True, 0, 0) and kind != "pooler":
        return "modernbert"
    bert = (config.position, config.norm_place, config.gated, config.bias, config.local_window)
    if whole and bert == ("learned", "after", False, "all", None) and config.token_types:
        if config.position_offset == 0 and config.head.pooling == "first":
            return "bert"
        if config.head.pooling == "first" and (kind != "masked" or config.activation == "gelu"):
            return "roberta"
    raise InputError(
        "no family on disk holds this combination of position, norm_place, gated, bias, token_types and head",
        "model config",
        "use the values of one of " + ", ".join(ARCHITECTURES),
    )


def encoder_architecture(config: EncoderConfig) -> str:
    """The class that transformers opens this encoder with."""
    kind = "none" if config.head.kind == "pooler" else config.head.kind
    ending = next(ending for ending, known in KINDS.items() if known == kind)
    return CLASSES[encoder_family(config)] + ending


def write_encoder(config: EncoderConfig, token_ids: Mapping[str, int | list[int] | None]) -> dict[str, Any]:
    """What `config.json` says of an encoder beside what it says of every model.

    Args:
        config: the encoder's shape.
        token_ids: "bos_token_id" and "eos_token_id", which begin and end a text.

    Raises:
        InputError: no family holds this shape.
    """
    facts: dict[str, Any] = {
        "hidden_size": config.embedding_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.feed_forward_dim,
        "max_position_embeddings": config.context_length + config.position_offset,
        "tie_word_embeddings": True,
    }
    if config.head.labels:
        facts["id2label"] = {str(number): label for number, label in enumerate(config.head.labels)}
        facts["label2id"] = {label: number for number, label in enumerate(config.head.labels)}
    activation = "gelu_pytorch_tanh" if config.activation == "gelu_tanh" else config.activation
    if encoder_family(config) == "modernbert":
        return facts | _modernbert_facts(config, activation, token_ids)
    facts |= {
        "type_vocab_size": config.token_types,
        "hidden_act": activation,
        "layer_norm_eps": config.norm_epsilon,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": 0.0,
        "position_embedding_type": "absolute",
    }
    if config.position_offset:
        facts["pad_token_id"] = config.position_offset - 1
    return facts


def _modernbert_facts(
    config: EncoderConfig, activation: str, token_ids: Mapping[str, int | list[int] | None]
) -> dict[str, Any]:
    biased = config.bias == "all"
    return {
        "hidden_activation": activation,
        "classifier_activation": activation,
        "norm_eps": config.norm_epsilon,
        "attention_bias": biased,
        "mlp_bias": biased,
        "norm_bias": biased,
        "classifier_bias": biased,
        "decoder_bias": True,
        "global_attn_every_n_layers": config.global_every,
        "layer_types": _kinds(config.num_layers, config.global_every),
        "local_attention": 2 * (config.local_window or 64),
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": config.rope_theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": config.local_rope_theta},
        },
        "global_rope_theta": config.rope_theta,
        "local_rope_theta": config.local_rope_theta,
        "classifier_pooling": "cls" if config.head.pooling == "first" else "mean",
        "mlp_dropout": config.dropout,
        "embedding_dropout": 0.0,
        "attention_dropout": 0.0,
        "cls_token_id": token_ids.get("bos_token_id"),
        "sep_token_id": token_ids.get("eos_token_id"),
    }
