"""The verbs `generate`, `chat` and `translate`: a model and text in; text that goes on, as it is written, or its counterpart, out.

Knows streams and model folders; how a token comes about is the engine's business, how the likeliest text is found the
search's.
"""

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

import torch

from glasshouse.artifact import RUN_FILE, Artifact, open_artifact, require_decoder
from glasshouse.device import Device
from glasshouse.errors import InputError
from glasshouse.files import read_json
from glasshouse.inference.constrain import Constraint, compile_constraint
from glasshouse.inference.engine import Engine, generate
from glasshouse.inference.paged import PagedCache, Reader
from glasshouse.inference.quantization import quantize_artifact
from glasshouse.inference.request import EngineSettings, Propose, Request, StopFilter, Token
from glasshouse.inference.sampling import GenerationConfig, expand, rank_answers
from glasshouse.inference.search import MOST_BEAMS, BeamConfig, search_continuation, search_translations
from glasshouse.inference.speculative import DraftModel, PromptLookup, Worth, while_it_pays
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


@dataclass(frozen=True)
class AnswerOptions:
    """What is asked of answers besides how their tokens are drawn.

    Args:
        form: "json" (any object), "schema:FILE", "regex:PATTERN", "choice:A|B|C" or "grammar:FILE"; empty for any text.
        draft: what guesses ahead, as long as that is faster: "lookup" (in the text so far), or a smaller model with the
            same tokenizer; empty for nothing. Changes no text.
        beams: search for the likeliest text, so many at a time, instead of drawing; 0 to draw.
        quantize: "int8" or "int4" for weights of so few bits; what they cost is measured and said. Empty for none.
    """

    form: str = ""
    draft: str = ""
    beams: int = 0
    quantize: str = ""

    def __post_init__(self) -> None:
        if self.beams and (self.form or self.draft):
            raise InputError("a search takes neither a form nor guesses", "--beams", "leave out one of them")


def generate_text(
    path: Path | str,
    prompt: str,
    config: GenerationConfig,
    device: Device,
    output: TextIO | None = None,
    options: AnswerOptions | None = None,
) -> str:
    """Open a model, continue a prompt and write both as they come; several answers one after another, best first.

    Args:
        path: a run, a model folder, or a folder in Hugging Face layout.
        prompt: the text to continue; empty for the start of a document.
        config: how tokens are drawn, and when to stop.
        device: where and in what number format.
        output: where to write; standard output by default.
        options: a form the answer must have, guesses, or a search.

    Returns:
        The generated text, without the prompt; several joined by newlines.

    Raises:
        InputError: the model cannot be opened, the prompt leaves no room in its context, or an option cannot be met.
    """
    options, stream = options or AnswerOptions(), output or sys.stdout
    artifact = open_quantized(path, device, options.quantize)
    if options.beams:
        texts = search_texts(artifact, prompt, config, options.beams)
        return "\n".join(
            write_stream([Token(0, text, 0.0, 0, 0.0)], _headed(prompt, number, len(texts)), stream)
            for number, text in enumerate(texts, 1)
        )
    if max(config.n, config.best_of or 1) > 1:
        found = answer_several(artifact, prompt, config, options)
        return "\n".join(
            write_stream(tokens, _headed(prompt, number, len(found)), stream)
            for number, tokens in enumerate(found, 1)
        )
    [request] = _requests(artifact, prompt, config, options)
    engine = Engine(require_decoder(artifact), artifact.tokenizer, EngineSettings(max_batch=1))
    return write_stream(engine.stream(request), prompt, stream)


def open_quantized(path: Path | str, device: Device, kind: str) -> Artifact:
    """Open a model, its weights in 8 or 4 bits where that is asked for; what it costs goes to standard error."""
    artifact = open_artifact(path, dtype=device.compute_dtype, device=device.torch_device)
    if not kind:
        return artifact
    artifact, price = quantize_artifact(artifact, kind)
    print(price, file=sys.stderr, flush=True)
    return artifact


def _headed(prompt: str, number: int, count: int) -> str:
    return prompt if count == 1 else f"-- {number} of {count} --\n{prompt}"


def answer_several(
    artifact: Artifact, prompt: str, config: GenerationConfig, options: AnswerOptions | None = None
) -> list[list[Token]]:
    """`n` answers to a prompt, written together; with `best_of` the best so many of that many, best first.

    Raises:
        InputError: the prompt leaves no room in the model's context, or an option cannot be met.
    """
    requests = _requests(artifact, prompt, config, options or AnswerOptions())
    settings = EngineSettings(max_batch=len(requests))
    answers = Engine(require_decoder(artifact), artifact.tokenizer, settings).complete(requests)
    if len(answers) == config.n:
        return answers
    best = rank_answers([[token.probability for token in answer] for answer in answers], config.n)
    return [answers[number] for number in best]


def _requests(
    artifact: Artifact, prompt: str, config: GenerationConfig, options: AnswerOptions
) -> list[Request]:
    """One request per answer that has to be written."""
    ends = frozenset(end_tokens(artifact))
    constraint = open_form(options.form, artifact, ends) if options.form else None
    draft = _open_draft(options.draft, artifact) if options.draft not in ("", "lookup") else None
    worth, tokens = Worth(), tuple(artifact.tokenizer.prompt(prompt))
    return [
        Request(
            tokens,
            one,
            0,
            ends,
            constraint and constraint.fork(),
            propose=while_it_pays(_guesser(draft, artifact), worth) if options.draft else None,
        )
        for one in expand(config)
    ]


def _guesser(draft: Artifact | None, artifact: Artifact) -> Propose:
    if draft is None:
        return PromptLookup()
    return DraftModel(require_decoder(draft), artifact.tokenizer.vocab_size)


def _open_draft(path: str, artifact: Artifact) -> Artifact:
    weight = require_decoder(artifact).output_weight
    draft = open_artifact(path, dtype=weight.dtype, device=weight.device)
    if _spellings(artifact) != _spellings(draft):
        raise InputError(
            "the draft model has another tokenizer", "--draft", "use one that was trained with the same"
        )
    return draft


def _spellings(artifact: Artifact) -> list[bytes]:
    return [artifact.tokenizer.token_bytes(token) for token in range(artifact.tokenizer.vocab_size)]


def open_form(form: str, artifact: Artifact, ends: Iterable[int]) -> Constraint:
    """The constraint that a form asks for, written as in `AnswerOptions`.

    Raises:
        InputError: there is no such form or file, or it cannot be compiled.
    """
    name, _, value = form.partition(":")
    kinds = {
        "json": "json_object", "schema": "json_schema", "regex": "regex", "choice": "choice", "grammar": "grammar",
    }  # fmt: skip
    if name not in kinds or (name == "json") == bool(value):
        raise InputError(
            f"{form[:60]!r} is no form", "--form",
            "write json, schema:FILE, regex:PATTERN, choice:A|B|C or grammar:FILE",
        )  # fmt: skip
    if name in ("schema", "grammar"):
        try:
            value = Path(value).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot be read: {error}", value, "give a text file") from None
    given = value.split("|") if name == "choice" else value or None
    return compile_constraint(kinds[name], given, artifact.tokenizer, list(ends), "--form")


def search_texts(artifact: Artifact, prompt: str, config: GenerationConfig, beams: int) -> list[str]:
    """The `n` likeliest continuations of a prompt that a beam search finds, best first.

    Args:
        artifact: a decoder.
        prompt: the text; empty for the start of a document.
        config: its `n`, `max_new_tokens` and `stop` are heeded; nothing is drawn.
        beams: texts kept at a time.

    Raises:
        InputError: the prompt leaves no room in the model's context, or there are more answers than beams.
    """
    model, tokenizer = require_decoder(artifact), artifact.tokenizer
    tokens = tokenizer.prompt(prompt) or [tokenizer.end_of_document]
    if config.n > beams:
        raise InputError(f"{config.n} answers of {beams} beams", "--n", "search with as many beams, or more")
    search = BeamConfig(beams, config.n, max_new_tokens=config.max_new_tokens)
    longest = min(len(tokens) + config.max_new_tokens, model.config.context_length)
    size = EngineSettings.block_size
    cache = PagedCache(model, (beams + 1) * (-(-longest // size) + 1), size)
    reader = Reader(model, cache, beams, EngineSettings.chunk)
    ends = {tokenizer.end_of_document, *end_tokens(artifact)}
    found = search_continuation(reader, tokens, search, ends, tokenizer.vocab_size)
    return [_cut(tokenizer.decode(answer.tokens), config.stop) for answer in found]


def _cut(text: str, stops: Sequence[str]) -> str:
    held = StopFilter(stops)
    return held.push(text) + held.flush()


@dataclass(frozen=True)
class TranslationConfig:
    """How a text is searched for.

    Args:
        beams: texts kept at a time; 1 takes the likeliest token each time. As the model's own generation_config.json
            says, else 4, where not given.
        length_penalty: a text's score is its log-probability / length ** length_penalty: above 0 longer texts gain. As
            the model says, else 1, where not given.
        max_new_tokens: most tokens of an answer.
        rows: texts that are searched together; more need more memory.
    """

    beams: int | None = None
    length_penalty: float | None = None
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
    limited = _search_config(artifact, config, room)
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
    ends = (*end_tokens(artifact), artifact.tokenizer.end_of_document)
    found = search_translations(
        model, sources.to(device), mask, config, start_token=start_token(artifact), end_tokens=ends,
        vocab_size=artifact.tokenizer.vocab_size,
    )  # fmt: skip
    return [artifact.tokenizer.decode(best.tokens).strip() for best, *_ in found]


def start_token(artifact: Artifact) -> int:
    """What the decoder begins with: as generation_config.json says, else the padding token, as T5 and Marian do."""
    named = artifact.generation.get("decoder_start_token_id")
    return named if isinstance(named, int) else artifact.tokenizer.pad


def _search_config(artifact: Artifact, config: TranslationConfig, room: int) -> BeamConfig:
    """The search: what was asked for, and for the rest what the model's own generation_config.json says."""
    beams, penalty = artifact.generation.get("num_beams"), artifact.generation.get("length_penalty")
    beams = beams if isinstance(beams, int) and 1 <= beams <= MOST_BEAMS else 4
    penalty = float(penalty) if isinstance(penalty, int | float) and math.isfinite(penalty) else 1.0
    return BeamConfig(
        config.beams or beams, 1, penalty if config.length_penalty is None else config.length_penalty, False,
        min(config.max_new_tokens, room),
    )  # fmt: skip


# ---- conversations


def chat(
    artifact: Artifact, config: GenerationConfig, source: TextIO, output: TextIO, system: str = ""
) -> None:
    """Talk in a terminal: a line is what a person says, the answer comes as it is written.

    Ctrl-C ends an answer, which stays in the conversation as far as it came; the end of the input ends the talk; /reset
    begins anew. The tokens are those of the model's own chat template, as in training and in serving.

    Args:
        artifact: the model.
        config: how tokens are drawn; the seed is that of the first answer and grows by one with each.
        source: what the person says.
        output: where the answers go.
        system: what the model is told before everything.

    Raises:
        InputError: the model has no chat template, or the conversation no longer fits its context.
    """
    beginning = [{"role": "system", "content": system}] if system else []
    messages, answers = list(beginning), 0
    engine = Engine(require_decoder(artifact), artifact.tokenizer, EngineSettings(max_batch=1))
    ends = frozenset(end_tokens(artifact))
    while True:
        line = _ask(source, output)
        if line is None:
            output.write("\n")
            return
        if line == "/reset":
            messages = list(beginning)
            continue
        if not line:
            continue
        messages.append({"role": "user", "content": line})
        prompt = artifact.tokenizer.encode_chat(messages)
        drawn = replace(config, seed=(config.seed + answers) % 2**63)
        written = _answer(engine.stream(Request(tuple(prompt), drawn, end_tokens=ends)), output)
        messages.append({"role": "assistant", "content": written})
        answers += 1


def _ask(source: TextIO, output: TextIO) -> str | None:
    """The next line, or None at the end of the input or a Ctrl-C."""
    if output.isatty():
        output.write("> ")
        output.flush()
    try:
        line = source.readline()
    except KeyboardInterrupt:
        return None
    return line.strip() if line else None


def _answer(tokens: Iterator[Token], output: TextIO) -> str:
    """Write an answer as it comes; what was written when it ended or was ended."""
    written: list[str] = []

    def kept() -> Iterator[Token]:
        for token in tokens:
            written.append(token.text)
            yield token

    with suppress(KeyboardInterrupt):
        write_stream(kept(), "", output)
    return "".join(written)


def chat_with(path: Path | str, config: GenerationConfig, device: Device, system: str, quantize: str) -> None:
    """Open a model and talk in this terminal: see `chat`."""
    artifact = open_quantized(path, device, quantize)
    facts = artifact.path.parent / RUN_FILE
    if facts.is_file() and read_json(facts).get("stage") == "pretrain":
        print(
            "this model continues text: it was not taught to answer; glasshouse finetune does",
            file=sys.stderr,
        )
    print("/reset begins anew, Ctrl-C ends an answer, Ctrl-D the talk", file=sys.stderr, flush=True)
    chat(artifact, config, sys.stdin, sys.stdout, system)
