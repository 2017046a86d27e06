"""A tokenizer as the fields of a GGUF file: byte-level BPE, and the lower-casing WordPiece of BERT.

llama.cpp cannot read a tokenizer's split pattern: it knows a list of them by name, and its own converter recognises one
by the ids of a probe text, which no freshly trained tokenizer matches. So the name is found here from the pattern
itself, and a tokenizer whose rules have no name there is refused. Knows nothing of weights.
Source: llama.cpp, src/llama-vocab.cpp.
"""

from collections.abc import Mapping
from typing import Any

import tokenizers

from glasshouse.errors import InputError
from glasshouse.text.tokenizer import END_OF_TURN, SPLIT_PATTERN, Tokenizer

GPT2_PATTERN = "gpt-2"
PATTERNS = {
    SPLIT_PATTERN: "llama-bpe",
    SPLIT_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2",
    GPT2_PATTERN: "gpt-2",
}
MERGES_ONLY = {"llama-bpe": "dbrx"}
"""The name of the same pattern where a word that is a token is still made from merges, not looked up whole."""
LOOKED_UP = {"llama-bpe"}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
WORD_START, WORD_INSIDE = "\u2581", "##"
"""How llama.cpp marks a piece that begins a word, and BERT one that does not."""
WORDPIECE = {
    "normalizer": {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": True,
        "lowercase": True,
    },
    "pre_tokenizer": {"type": "BertPreTokenizer"},
    "model": {"type": "WordPiece", "continuing_subword_prefix": WORD_INSIDE},
}
"""The only WordPiece that llama.cpp computes: accents are taken off, too."""
WHERE = "tokenizer.json"
ELSEWHERE = "serve this model with glasshouse, or convert it with llama.cpp's own converter"


def tokenizer_fields(parts: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """The fields that hold a tokenizer.

    Args:
        parts: the contents of its tokenizer.json.
        tokenizer: the same, opened.

    Raises:
        InputError: llama.cpp would split or join text in another way.
    """
    if parts["model"].get("type") == "WordPiece":
        return _wordpiece_fields(parts, tokenizer)
    pattern = _pattern_name(parts)
    tokens, kinds = _vocabulary(parts)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in parts["model"]["merges"]]
    fields: dict[str, Any] = {
        "model": "gpt2",
        "pre": _lookup_name(pattern, parts),
        "tokens": tokens,
        "token_type": kinds,
        "merges": merges,
        **_special_fields(tokenizer),
    }
    fields = {f"tokenizer.ggml.{name}": value for name, value in fields.items() if value != []}
    if tokenizer.chat_template:
        fields["tokenizer.chat_template"] = tokenizer.chat_template
    return fields


def _wordpiece_fields(parts: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    for name, wanted in WORDPIECE.items():
        given = parts.get(name) or {}
        if any(given.get(key) != value for key, value in wanted.items()):
            raise _refuse(f"its {name} is not that of BERT's lower-casing WordPiece")
    around = tokenizer.prompt("")
    unknown = parts["model"]["vocab"].get(parts["model"].get("unk_token"))
    if len(around) != 2 or unknown is None or (parts["normalizer"].get("strip_accents") is False):
        raise _refuse("it keeps accents, or puts other tokens around a text than one before and one after")
    tokens, kinds = _vocabulary(parts)
    kinds[unknown] = UNKNOWN
    marked = [
        token
        if kind != NORMAL
        else token.removeprefix(WORD_INSIDE)
        if token.startswith(WORD_INSIDE)
        else WORD_START + token
        for token, kind in zip(tokens, kinds, strict=True)
    ]
    fields: dict[str, Any] = {
        "model": "bert",
        "pre": "default",
        "tokens": marked,
        "token_type": kinds,
        "bos_token_id": around[0],
        "eos_token_id": around[1],
        "seperator_token_id": around[1],  # so spelled in GGUF
        "unknown_token_id": unknown,
        "padding_token_id": tokenizer.pad,
    }
    if tokenizer.mask is not None:
        fields["mask_token_id"] = tokenizer.mask
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()}


def composes_only(parts: Mapping[str, Any]) -> bool:
    """Whether all that the tokenizer changes in a text is to compose its characters (NFC), as Qwen's do.

    llama.cpp does not, and so reads the rare text that is not composed already in another way.
    """
    return (parts.get("normalizer") or {}).get("type") == "NFC"


def tokenizer_remarks(parts: Mapping[str, Any]) -> list[str]:
    """In what rare text llama.cpp reads otherwise, although it knows the tokenizer's rules by name."""
    if composes_only(parts):
        return [
            "llama.cpp does not compose characters (NFC) as this tokenizer does: compose a text beforehand"
        ]
    if parts["model"].get("type") == "WordPiece":
        return [
            "llama.cpp reads some combining marks (of Devanagari, for one) otherwise than BERT's WordPiece"
        ]
    return []


def _special_fields(tokenizer: Tokenizer) -> dict[str, Any]:
    begin = tokenizer.prompt("")
    if len(begin) > 1:
        raise InputError(
            f"the tokenizer begins a text with {len(begin)} tokens, llama.cpp with at most one",
            WHERE,
            ELSEWHERE,
        )
    fields: dict[str, Any] = {
        "bos_token_id": begin[0] if begin else tokenizer.end_of_document,
        "eos_token_id": tokenizer.end_of_document,
        "padding_token_id": tokenizer.pad,
        "add_bos_token": bool(begin),
        "add_space_prefix": False,
    }
    if END_OF_TURN in tokenizer.special:
        fields["eot_token_id"] = tokenizer.special[END_OF_TURN]
    return fields


def _refuse(what: str) -> InputError:
    return InputError(f"llama.cpp would read text differently: {what}", WHERE, ELSEWHERE)


def _pattern_name(parts: Mapping[str, Any]) -> str:
    """llama.cpp's name of the split pattern, after everything beside the pattern was found to be plain."""
    model = parts["model"]
    special = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    if model.get("type") != "BPE" or any(model.get(key) for key in special):
        raise _refuse(f"the tokenizer is no plain byte-level BPE ({model.get('type')})")
    if not composes_only(parts) and parts.get("normalizer"):
        raise _refuse("the tokenizer changes text before it reads it, which llama.cpp does not")
    first = parts.get("pre_tokenizer") or {}
    steps = first["pretokenizers"] if first.get("type") == "Sequence" else [first]
    level = steps[-1] if steps else {}
    plain = level.get("type") == "ByteLevel" and not level.get("add_prefix_space")
    if plain and len(steps) == 1 and level.get("use_regex", True):
        return PATTERNS[GPT2_PATTERN]
    split = steps[0] if len(steps) == 2 else {}
    cuts = split.get("type") == "Split" and split.get("behavior") == "Isolated" and not split.get("invert")
    name = PATTERNS.get((split.get("pattern") or {}).get("Regex", ""))
    if not (plain and cuts and name) or level.get("use_regex", True):
        raise _refuse("it has no name for this split pattern")
    return name


def _lookup_name(name: str, parts: Mapping[str, Any]) -> str:
    """The name under which words are joined as this tokenizer joins them.

    With some patterns llama.cpp takes a word that is a token as that token (`ignore_merges`). Merges nearly always end
    there too; where one token's do not, the pattern's other name is used.
    """
    model = parts["model"]
    if bool(model.get("ignore_merges")) == (name in LOOKED_UP):
        return name
    if model.get("ignore_merges"):
        raise _refuse(f"it never looks up whole words with the pattern {name}")
    merger = tokenizers.models.BPE(
        vocab=model["vocab"],
        merges=[
            tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]
        ],
    )
    made = all(
        [piece.id for piece in merger.tokenize(token)] == [number] for token, number in model["vocab"].items()
    )
    return name if made else MERGES_ONLY[name]


def _vocabulary(parts: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """The spelling and the kind of every token, in order: bytes in the byte-level alphabet, added tokens as they are."""
    spelled = {number: (token, NORMAL) for token, number in parts["model"]["vocab"].items()}
    for token in parts["added_tokens"]:
        spelled[token["id"]] = (token["content"], CONTROL if token["special"] else USER_DEFINED)
    ordered = [spelled[number] for number in range(len(spelled))]
    return [token for token, _ in ordered], [kind for _, kind in ordered]
