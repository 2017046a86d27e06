"""The verbs `generate` and `translate`: a model and text in; text that goes on, as it is written, or its counterpart, out.

Knows streams and model folders; how a token comes about is the engine's business, how the likeliest text is found the
search's.
"""

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch

from glasshouse.artifact import Artifact, open_artifact, require_decoder
from glasshouse.device import Device
from glasshouse.errors import InputError
from glasshouse.inference.engine import Token, generate
from glasshouse.inference.sampling import GenerationConfig
from glasshouse.inference.search import BeamConfig, search_translations
from glasshouse.models.encoder_decoder import EncoderDecoder
from glasshouse.text.pairs import encode_sources, pad_rows

# Control characters that would move the cursor or change the terminal, shown as pictures instead.
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
CONTROLS |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def continue_text(artifact: Artifact, prompt: str, config: GenerationConfig) -> Iterator[Token]:
    """Tokens that continue a text.

    Args:
        artifact: the model.
        prompt: the text; empty for the start of a document. What spells a special token is read as plain text.
        config: how tokens are drawn, and when to stop.

    Raises:
        InputError: the prompt leaves no room in the model's context.
    """
    prompt_tokens = artifact.tokenizer.prompt(prompt)
    return generate(
        require_decoder(artifact), artifact.tokenizer, prompt_tokens, config, end_tokens=end_tokens(artifact)
    )


def end_tokens(artifact: Artifact) -> tuple[int, ...]:
    """The ids that generation_config.json names as ends, one or several."""
    named = artifact.generation.get("eos_token_id")
    return tuple(token for token in (named if isinstance(named, list) else [named]) if isinstance(token, int))


def write_stream(tokens: Iterable[Token], prompt: str, output: TextIO) -> str:
    """Write a prompt and, as they come, the texts of tokens; the line is ended however this ends.

    On a terminal, control characters are shown instead of obeyed.

    Args:
        tokens: what is generated.
        prompt: written first.
        output: where to.

    Returns:
        The generated text, without the prompt.

    Raises:
        KeyboardInterrupt: the reader pressed Ctrl-C; what was written stays.
        BrokenPipeError: nobody reads any more.
    """
    terminal = output.isatty()
    written: list[str] = []

    def show(text: str) -> None:
        output.write(text.translate(CONTROLS) if terminal else text)
        output.flush()

    show(prompt)
    try:
        for token in tokens:
            if token.text:
                written.append(token.text)
                show(token.text)
    except KeyboardInterrupt:
        with suppress(BrokenPipeError):
            show("\n")
        raise
    show("\n")
    return "".join(written)


def generate_text(
    path: Path | str, prompt: str, config: GenerationConfig, device: Device, output: TextIO | None = None
) -> str:
    """Open a model, continue a prompt and write both as they come.

    Args:
        path: a run, a model folder, or a folder in Hugging Face layout.
        prompt: the text to continue; empty for the start of a document.
        config: how tokens are drawn, and when to stop.
        device: where and in what number format.
        output: where to write; standard output by default.

    Returns:
        The generated text, without the prompt.

    Raises:
        InputError: the model cannot be opened, or the prompt leaves no room in its context.
    """
    artifact = open_artifact(path, dtype=device.compute_dtype, device=device.torch_device)
    return write_stream(continue_text(artifact, prompt, config), prompt, output or sys.stdout)


@dataclass(frozen=True)
class TranslationConfig:
    """How a text is searched for.

    Args:
        beams: texts kept at a time; 1 takes the likeliest token each time.
        length_penalty: a text's score is its log-probability / length ** length_penalty: above 0 longer texts gain.
        max_new_tokens: most tokens of an answer.
        rows: texts that are searched together; more need more memory.
    """

    beams: int = 4
    length_penalty: float = 1.0
    max_new_tokens: int = 200
    rows: int = 64


def translate_texts(
    artifact: Artifact, texts: Sequence[str], config: TranslationConfig | None = None
) -> list[str]:
    """The likeliest counterpart of each text, in order.

    Args:
        artifact: an encoder-decoder.
        texts: one or many; an empty one stays empty.
        config: how to search.

    Raises:
        InputError: the model is no encoder-decoder, or a text is longer than it reads.
    """
    config, model = config or TranslationConfig(), artifact.model
    if not isinstance(model, EncoderDecoder):
        raise InputError(
            "the model is no encoder-decoder", str(artifact.path), "give one that was trained on pairs"
        )
    sources = encode_sources(artifact.tokenizer, [text.strip() for text in texts])
    room = model.config.context_length
    for number, (text, ids) in enumerate(zip(texts, sources, strict=True), 1):
        if len(ids) > room:
            what = f"text {number} has {len(ids):,} tokens and the model reads at most {room:,}: {text[:40]!r}..."
            raise InputError(what, "text", "cut it into sentences")
    order = sorted((row for row, text in enumerate(texts) if text.strip()), key=lambda row: len(sources[row]))
    answers = [""] * len(texts)
    limited = BeamConfig(config.beams, 1, config.length_penalty, False, min(config.max_new_tokens, room))
    for start in range(0, len(order), config.rows):
        chosen = order[start : start + config.rows]
        padded = torch.from_numpy(pad_rows([sources[row] for row in chosen], artifact.tokenizer.pad))
        lengths = torch.tensor([len(sources[row]) for row in chosen])
        for row, answer in zip(chosen, _search(artifact, model, padded, lengths, limited), strict=True):
            answers[row] = answer
    return answers


def _search(
    artifact: Artifact,
    model: EncoderDecoder,
    sources: torch.Tensor,
    lengths: torch.Tensor,
    config: BeamConfig,
) -> Iterable[str]:
    """The answers to padded sources [B, S] of given lengths [B]."""
    device = model.output_weight.device
    seen = torch.arange(sources.shape[1])[None] < lengths[:, None]
    mask = None if bool(seen.all()) else seen.to(device)
    found = search_translations(
        model, sources.to(device), mask, config, start_token=start_token(artifact), end_tokens=(*end_tokens(artifact), artifact.tokenizer.end_of_document),
        vocab_size=artifact.tokenizer.vocab_size,
    )  # fmt: skip
    return [artifact.tokenizer.decode(best.tokens).strip() for best, *_ in found]


def start_token(artifact: Artifact) -> int:
    """What the decoder begins with: as generation_config.json says, else the padding token, as T5 and Marian do."""
    named = artifact.generation.get("decoder_start_token_id")
    return named if isinstance(named, int) else artifact.tokenizer.pad


def settings_of(artifact: Artifact) -> TranslationConfig:
    """The search that the model's own generation_config.json asks for, where it does."""
    beams, penalty = artifact.generation.get("num_beams"), artifact.generation.get("length_penalty")
    usual = TranslationConfig()
    return TranslationConfig(
        beams if isinstance(beams, int) and 1 <= beams <= 64 else usual.beams,
        float(penalty)
        if isinstance(penalty, int | float) and math.isfinite(penalty)
        else usual.length_penalty,
    )
