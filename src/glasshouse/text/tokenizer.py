"""Tokenizers: train byte-level BPE; open any tokenizer.json; encode, decode, save in Hugging Face layout.

Ours are trained with the split pattern of Llama 3, so that llama.cpp and Ollama recognise them, and end with the four
ChatML tokens. Text that merely spells a special token is encoded as text unless the caller asks otherwise, so
nobody can end a turn from inside a message. Knows nothing of corpora, models or runs.
"""

import codecs
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from glasshouse.errors import InputError
from glasshouse.files import read_json, write_atomic, write_json
from glasshouse.text.byte_pair import (
    FastEncoder,
    bytes_of,
    cut_texts,
    fast_encoder,
    piece_bytes,
    surrogate_bytes,
)
from glasshouse.text.chat import CHATML_TEMPLATE, Message, Segment, render_segments

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END_OF_DOCUMENT, START_OF_TURN, END_OF_TURN, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
SPECIAL_TOKENS = (END_OF_DOCUMENT, START_OF_TURN, END_OF_TURN, PAD)
ROLES = ("bos_token", "eos_token", "pad_token")
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)
LARGEST_VOCABULARY = 2**21
UNSPACED_COST = 6
LONG_STRETCH = 16  # bytes between two gaps: Russian and Hindi words have 12 to 15
FILE_BYTES_LIMIT = 256 * 2**20
TOKENIZER_FILE, SETTINGS_FILE, TEMPLATE_FILE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
# Bytes that are not UTF-8 come through Python strings as these code points ("surrogateescape").
_INVALID_RUN = re.compile("([\ud800-\udfff]+)")


class DecodeStream(Protocol):
    """Turns ids into text one at a time and never returns half a character."""

    def step(self, token: int) -> str:
        """The text that became certain with this token; often empty inside a character."""
        ...

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never finished."""
        ...


class Tokenizer:
    """A vocabulary with its rules; make one with `train_tokenizer` or `open_tokenizer`.

    Args:
        backend: the `tokenizers` object; its added tokens are the special tokens.
        settings: contents of tokenizer_config.json, naming at least "eos_token", or "sep_token" as BERT does.
        chat_template: Jinja template of the chat format; empty for none.
    """

    def __init__(self, backend: tokenizers.Tokenizer, settings: dict[str, Any], chat_template: str):
        self.chat_template = chat_template
        self._settings = settings
        self._parsing = backend
        self._plain = tokenizers.Tokenizer.from_str(backend.to_str())
        self._plain.encode_special_tokens = True
        self._parts: dict[str, Any] = json.loads(backend.to_str())
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.special: dict[str, int] = {
            token["content"]: token["id"] for token in self._parts["added_tokens"] if token["special"]
        }
        self._special_ids = frozenset(self.special.values())
        end = "eos_token" if settings.get("eos_token") or not settings.get("sep_token") else "sep_token"
        self.end_of_document: int = self._named(end)
        self.pad: int = self._named("pad_token") if settings.get("pad_token") else self.end_of_document
        self.mask: int | None = self._named("mask_token") if settings.get("mask_token") else None

    @property
    def plain(self) -> tokenizers.Tokenizer:
        """The library's tokenizer, to which the spelling of a special token is text."""
        return self._plain

    @property
    def settings(self) -> dict[str, Any]:
        """A copy of what tokenizer_config.json says."""
        return dict(self._settings)

    @property
    def start(self) -> int:
        """What begins a text: BERT's [CLS]; where nothing does, what ends the one before it."""
        roles = [role for role in ("cls_token", "bos_token") if self._settings.get(role)]
        return self._named(roles[0]) if roles else self.end_of_document

    def _named(self, role: str) -> int:
        named = self._settings.get(role)
        content = named.get("content") if isinstance(named, dict) else named
        number = self._parsing.token_to_id(content) if isinstance(content, str) else None
        if number is None:
            raise InputError(
                f"the tokenizer names no {role}", SETTINGS_FILE, f'add "{role}": "<the token>" to it'
            )
        return number

    @property
    def byte_level(self) -> bool:
        """Whether tokens stand for bytes (GPT-2, Llama 3, Qwen, ours) rather than for pieces of text."""
        decoder = self._parts["decoder"] or {}
        return decoder.get("type") == "ByteLevel"

    @cached_property
    def _bytes(self) -> list[bytes]:
        added = {token["id"] for token in self._parts["added_tokens"]}
        tokens = [self._parsing.id_to_token(number) or "" for number in range(self.vocab_size)]
        if (self._parts["decoder"] or {}).get("type") == "WordPiece":
            return [(t[2:] if t.startswith("##") else t).encode() for t in tokens]
        if self.byte_level:
            return [t.encode() if number in added else bytes_of(t) for number, t in enumerate(tokens)]
        return [piece_bytes(token) for token in tokens]

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one token stands for; a special token's are its spelling."""
        return self._bytes[token]

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """The ids of a text; no begin or end token is added.

        Args:
            text: any string, lone surrogates included.
            allow_special: whether text that spells a special token becomes that token. Only for text that the
                program itself wrote (a rendered chat template), never for a user's.
        """
        backend = self._parsing if allow_special else self._plain
        try:
            return backend.encode(text, add_special_tokens=False).ids
        except TypeError:
            return self._encode_invalid(text)

    def prompt(self, text: str) -> list[int]:
        """The ids of a text as a model reads it from its start: with the begin token that the tokenizer's file asks for.

        Ours begin with end_of_document, Llama's with their own token, GPT-2's with none.
        """
        return [*self._plain.encode("", add_special_tokens=True).ids, *self.encode(text)]

    def encode_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """The ids of a conversation in the model's own chat template.

        Special tokens come from the template alone: a message that spells one stays text.

        Args:
            messages: {"role", "content", ...}, oldest first.
            tools: JSON schemas of functions the model may call.
            add_generation_prompt: end with the beginning of an assistant's turn.

        Raises:
            InputError: there is no template, or it refuses the messages.
        """
        segments = self.chat_segments(messages, tools, add_generation_prompt)
        return [number for segment in segments for number in self.encode_segment(segment)]

    def chat_segments(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[Segment]:
        """The pieces of a conversation in the model's own chat template: see `encode_chat`."""
        if not self.chat_template:
            raise InputError(
                "this model has no chat template", TEMPLATE_FILE, "use a model trained on conversations"
            )
        names = {
            role: self._parsing.id_to_token(self._named(role)) for role in ROLES if self._settings.get(role)
        }
        return render_segments(
            self.chat_template, messages, self.special, tools, add_generation_prompt, names
        )

    def encode_segment(self, segment: Segment) -> list[int]:
        """The ids of one piece of a rendered conversation."""
        return [self.special[segment.text]] if segment.special else self.encode(segment.text)

    def encode_bytes(self, data: bytes) -> list[int]:
        """The ids of any bytes: what is valid UTF-8 as text, each other byte as its own token.

        `decode_bytes` gives the same bytes back (byte-level tokenizers only).
        """
        return self.encode(data.decode("utf-8", "surrogateescape"))

    def _encode_invalid(self, text: str) -> list[int]:
        ids: list[int] = []
        for number, part in enumerate(_INVALID_RUN.split(text)):
            if number % 2 == 0:
                ids += self.encode(part) if part else []
            else:
                ids += [self._byte_ids[byte] for byte in surrogate_bytes(part)]
        return ids

    @cached_property
    def _byte_ids(self) -> list[int]:
        numbers = {token: number for number, token in enumerate(self._bytes) if len(token) == 1}
        if not all(bytes([byte]) in numbers for byte in range(256)):
            raise InputError("this tokenizer has no token for some bytes, and the text is not valid UTF-8")
        return [numbers[bytes([byte])] for byte in range(256)]

    def encode_batch_arrays(self, texts: Sequence[str], threads: int = 2) -> list[np.ndarray]:
        """The ids of many texts as uint32 arrays: the same as `encode`'s, several times faster."""
        if self.fast is None:
            return self.encode_batch_slowly(texts)
        arrays = self.fast.encode_batch(texts, threads)
        return [
            np.array(self.encode(text), dtype=np.uint32) if array is None else array
            for text, array in zip(texts, arrays, strict=True)
        ]

    def encode_batch_slowly(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode_batch_arrays` by the rules of tokenizer.json itself: what the fast way is checked against."""
        try:
            encoded = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:
            return [np.array(self.encode(text), dtype=np.uint32) for text in texts]
        return [np.array(one.ids, dtype=np.uint32) for one in encoded]

    @cached_property
    def fast(self) -> FastEncoder | None:
        """The faster encoder, where it is proved to give the same ids; None otherwise."""
        only_special = all(token["special"] for token in self._parts["added_tokens"])
        if (
            self._parts["pre_tokenizer"] != _pre_tokenizer_json()
            or self._parts["normalizer"]
            or not only_special
        ):
            return None
        return fast_encoder(self._parts["model"], SPLIT_PATTERN)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes that ids stand for, special tokens spelled out."""
        table = self._bytes
        return b"".join([table[number] for number in ids])

    def decode(self, ids: Sequence[int], keep_special: bool = False) -> str:
        """The text that ids stand for; bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: token ids.
            keep_special: spell special tokens out instead of leaving them out.
        """
        if not self.byte_level:
            return self._parsing.decode(list(ids), skip_special_tokens=not keep_special)
        shown = ids if keep_special else [number for number in ids if number not in self._special_ids]
        return self.decode_bytes(shown).decode("utf-8", "replace")

    def decode_stream(self, keep_special: bool = False) -> DecodeStream:
        """A decoder for ids that arrive one at a time; its pieces joined are what `decode` gives for all of them."""
        return _ByteStream(self, keep_special) if self.byte_level else _PieceStream(self, keep_special)

    def is_special(self, token: int) -> bool:
        """Whether an id is a special token."""
        return token in self._special_ids

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja, as transformers expects them."""
        folder = Path(folder)
        settings = dict(self._settings)
        if self.chat_template:
            settings["chat_template"] = self.chat_template
            write_atomic(folder / TEMPLATE_FILE, self.chat_template)
        write_atomic(folder / TOKENIZER_FILE, self._parsing.to_str(pretty=True))
        write_json(folder / SETTINGS_FILE, settings)


class _ByteStream:
    def __init__(self, tokenizer: Tokenizer, keep_special: bool):
        self._tokenizer, self._keep_special = tokenizer, keep_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def step(self, token: int) -> str:
        if self._tokenizer.is_special(token) and not self._keep_special:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _PieceStream:
    """Tokens that are pieces of text: their spaces depend on their neighbours, so the library decides."""

    def __init__(self, tokenizer: Tokenizer, keep_special: bool):
        self._tokenizer, self._keep_special = tokenizer, keep_special
        self._stream = decoders.DecodeStream(skip_special_tokens=not keep_special)
        self._ids: list[int] = []
        self._given = 0

    def step(self, token: int) -> str:
        self._ids.append(token)
        text = self._stream.step(self._tokenizer._parsing, token) or ""
        self._given += len(text)
        return text

    def flush(self) -> str:
        return self._tokenizer.decode(self._ids, self._keep_special)[self._given :]


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _pre_tokenizer_json() -> Any:
    probe = tokenizers.Tokenizer(models.BPE())
    probe.pre_tokenizer = _pre_tokenizer()
    return json.loads(probe.to_str())["pre_tokenizer"]


def training_cost(text: str) -> int:
    """What a text costs the trainer, in bytes of ordinary text.

    The trainer keeps every different stretch between two gaps, which takes about 100 bytes of memory for one byte
    of text. Where words are parted by spaces most stretches have been seen before; elsewhere (Chinese, Thai) hardly
    any has, and such a text counts six times.
    """
    size = len(text.encode("utf-8", "replace"))
    return size if (text.count(" ") + text.count("\n")) * LONG_STRETCH >= size else UNSPACED_COST * size


def train_tokenizer(texts: Iterator[str], vocab_size: int, exact: bool = True) -> Tokenizer:
    """Train a byte-level BPE tokenizer (Sennrich et al. 2016; bytes as in GPT-2) on texts; deterministic.

    Args:
        texts: the training text, in pieces of any length.
        vocab_size: number of tokens, the 256 bytes and the 4 special tokens included.
        exact: whether a text that supports fewer tokens is refused; otherwise the vocabulary is as large as it gets.

    Raises:
        InputError: `vocab_size` is out of range, or larger than the text supports.
    """
    if not SMALLEST_VOCABULARY < vocab_size <= LARGEST_VOCABULARY:
        raise InputError(
            f"vocab_size {vocab_size} is out of range",
            "vocab_size",
            f"pass a number from {SMALLEST_VOCABULARY + 1} to {LARGEST_VOCABULARY}",
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = _pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(cut_texts(texts), trainer)
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    start = (END_OF_DOCUMENT, backend.token_to_id(END_OF_DOCUMENT))
    backend.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_DOCUMENT} $A",
        pair=f"{END_OF_DOCUMENT} $A {END_OF_DOCUMENT} $B",
        special_tokens=[start],
    )
    reached = backend.get_vocab_size(with_added_tokens=True)
    if exact and reached != vocab_size:
        raise InputError(
            f"vocab_size {vocab_size:,} is larger than the text supports: {reached:,} tokens occur at least twice",
            "vocab_size",
            f"pass {reached} or less, or give more text",
        )
    return Tokenizer(backend, _our_settings(), CHATML_TEMPLATE)


def _our_settings() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_DOCUMENT,
        "eos_token": END_OF_DOCUMENT,
        "pad_token": PAD,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2**31 - 1,
    }


def open_tokenizer(folder: Path) -> Tokenizer:
    """Open the tokenizer of a model or corpus folder, ours or any other in Hugging Face layout.

    Args:
        folder: holds tokenizer.json, and tokenizer_config.json naming the end-of-text token.

    Raises:
        InputError: a file is missing, too large or not a tokenizer, or ids leave gaps or occur twice.
    """
    folder = Path(folder)
    path = folder / TOKENIZER_FILE
    if path.is_file() and path.stat().st_size > FILE_BYTES_LIMIT:
        raise InputError(
            f"larger than {FILE_BYTES_LIMIT / 2**20:.0f} MB", str(path), "this is not a tokenizer"
        )
    parts = read_json(path)
    _check_ids(parts, path)
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(parts | {"truncation": None, "padding": None}))
    except Exception as error:  # the library raises bare Exception for everything it cannot read
        raise InputError(
            f"not a tokenizer: {error}", str(path), "save it again with a current transformers"
        ) from None
    settings = read_json(folder / SETTINGS_FILE) if (folder / SETTINGS_FILE).is_file() else {}
    if not isinstance(settings, dict):
        raise InputError("not a table of settings", str(folder / SETTINGS_FILE), "copy the file again")
    settings.pop(
        "auto_map", None
    )  # names Python code to run; nothing here runs it, nothing should pass it on
    inline = settings.pop("chat_template", None)
    template = folder / TEMPLATE_FILE
    text = template.read_text("utf-8") if template.is_file() else inline if isinstance(inline, str) else ""
    if not settings.get("eos_token") and backend.token_to_id(END_OF_DOCUMENT) is not None:
        settings["eos_token"] = END_OF_DOCUMENT
    return Tokenizer(backend, settings, text)


def _check_ids(parts: Any, path: Path) -> None:
    """Refuse ids that leave gaps, occur twice or are absurd, before the library builds tables from them."""
    mend = "the file is damaged or not a tokenizer; copy it again from where it came"
    model = parts.get("model") if isinstance(parts, dict) else None
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):  # Unigram: the position is the id
        ids = {position: str(position) for position in range(len(vocabulary))}
    elif isinstance(vocabulary, dict) and all(type(number) is int for number in vocabulary.values()):
        ids = {number: token for token, number in vocabulary.items()}
    else:
        raise InputError("no vocabulary in it", str(path), mend)
    if len(ids) != len(vocabulary):
        raise InputError("two tokens share an id", str(path), mend)
    for token in parts.get("added_tokens") or []:
        number, content = (token.get("id"), token.get("content")) if isinstance(token, dict) else (None, None)
        known = ids.get(number) if isinstance(number, int) else None
        if not isinstance(number, int) or (isinstance(vocabulary, dict) and known not in (None, content)):
            raise InputError(
                f"added token {content!r} has id {number!r}, which is taken or no id", str(path), mend
            )
        ids[number] = str(content)
    if len(ids) > LARGEST_VOCABULARY:
        raise InputError(f"{len(ids):,} tokens are more than {LARGEST_VOCABULARY:,}", str(path), mend)
    if min(ids, default=0) != 0 or max(ids, default=-1) != len(ids) - 1:
        raise InputError("token ids leave gaps: they must run from 0 without a hole", str(path), mend)
