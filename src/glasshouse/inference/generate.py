"""The verb `generate`: a model and a prompt in, text on a stream as it is written.

Knows streams and model folders; how a token comes about is the engine's business.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from glasshouse.artifact import Artifact, open_artifact, require_decoder
from glasshouse.device import Device
from glasshouse.inference.engine import Token, generate
from glasshouse.inference.sampling import GenerationConfig

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
