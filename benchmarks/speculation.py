"""Guessing ahead against plain decoding, side by side: how many times as fast an answer is, and how many guesses were right.

    python benchmarks/speculation.py                        # a 110M Llama shape with random weights, guesses of known quality
    python benchmarks/speculation.py MODEL [--draft MODEL] [--text FILE]      # a trained model that goes on from passages

Without a model the guesses are the text itself, each token right with a given chance: what a guesser of that quality is
worth on this machine. With one, passages of the text are shown twice and the model goes on from the second time, as
when it quotes; prompt look-up and the draft model guess. Every candidate writes the same text (this is checked), in turn,
round after round; printed is the ratio to plain decoding round by round (median, min, max). "while it pays" is the same
guesser under the rule that switches it off; below 1 it is what trying costs.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from glasshouse.artifact import open_artifact, require_decoder
from glasshouse.inference.engine import Engine
from glasshouse.inference.request import EngineSettings, Propose, Request
from glasshouse.inference.sampling import GenerationConfig
from glasshouse.inference.speculative import DraftModel, PromptLookup, Worth, while_it_pays
from glasshouse.models.decoder import Decoder, DecoderConfig, initialize
from glasshouse.text.tokenizer import train_tokenizer

SHAPE = DecoderConfig(32000, 768, 12, 12, 12, 64, 2048, 2048, query_key_norm=False)
CHANCES = (0.0, 0.3, 0.6, 0.8, 1.0)
Guesser = Callable[[int], Propose | None]
"""Makes the guesser of an answer, by the number of its prompt."""


def oracle(texts: Sequence[Sequence[int]], chance: float, seed: int) -> Guesser:
    """Guessers that know the texts and get each token right with a given chance."""

    def make(number: int) -> Propose:
        text, coin = texts[number], random.Random(f"{seed}/{number}")

        def propose(tokens: Sequence[int]) -> list[int]:
            ahead = text[len(tokens) : len(tokens) + 8]
            return [token if coin.random() < chance else (token + 1) % 1000 for token in ahead]

        return propose

    return make


def paying(guesser: Guesser, worth: Worth) -> Guesser:
    """The same guessers, asked only while it pays."""

    def make(number: int) -> Propose:
        propose = guesser(number)
        assert propose is not None
        return while_it_pays(propose, worth)

    return make


def write(
    engine: Engine, prompts: Sequence[Sequence[int]], config: GenerationConfig, guesser: Guesser
) -> list[list[int]]:
    """The answers to all prompts, one after another."""
    requests = [
        Request(tuple(prompt), config, propose=guesser(number)) for number, prompt in enumerate(prompts)
    ]
    return [[token.id for token in engine.stream(request)] for request in requests]


def compare(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    candidates: dict[str, Guesser],
    rounds: int,
) -> None:
    """Run plain decoding and the candidates in turn, and print a table."""
    everyone: dict[str, Guesser] = {"plain": lambda number: None, **candidates}
    expected = write(engine, prompts, config, everyone["plain"])
    seconds: dict[str, list[float]] = {name: [] for name in everyone}
    accepted = dict.fromkeys(everyone, 0)
    for _ in range(rounds):
        for name, guesser in everyone.items():
            before, started = engine.statistics.accepted_tokens, time.perf_counter()
            found = write(engine, prompts, config, guesser)
            seconds[name].append(time.perf_counter() - started)
            accepted[name] += engine.statistics.accepted_tokens - before
            if found != expected:
                raise SystemExit(f"{name}: the text is another one")
    tokens = sum(map(len, expected))
    for name, taken in seconds.items():
        ratios = [plain / other for plain, other in zip(seconds["plain"], taken, strict=True)]
        share = accepted[name] / (rounds * tokens)
        print(
            f"  {name:<34} {share:6.1%} of the tokens guessed   {statistics.median(ratios):5.2f} "
            f"[{min(ratios):.2f}, {max(ratios):.2f}] times as fast as plain"
        )


def of_known_quality(arguments: argparse.Namespace) -> None:
    """A large random model, and guesses that are right with a given chance."""
    model = Decoder(SHAPE).to(torch.bfloat16).eval()
    initialize(model, 0)
    with torch.no_grad():  # fresh weights leave the stream as it is; these write something to it
        for parameter in model.parameters():
            if parameter.dim() == 2 and not bool(parameter.any()):
                parameter.normal_(0, 0.02)
    tokenizer = train_tokenizer(iter(["The cat sat on the mat. "] * 99), 300, exact=False)
    engine = Engine(model, tokenizer, EngineSettings(cache_tokens=4096, max_batch=8, reuse=False))
    coin = random.Random(0)
    prompts = [[coin.randrange(256) for _ in range(64)] for _ in range(2)]
    config = GenerationConfig(1.0, max_new_tokens=arguments.tokens)
    answers = write(engine, prompts, config, lambda number: None)
    texts = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    candidates: dict[str, Guesser] = {}
    for chance in CHANCES:
        guesser = oracle(texts, chance, 0)
        candidates[f"each right by {chance:.0%}"] = guesser
        candidates[f"each right by {chance:.0%}, while it pays"] = paying(guesser, Worth())
    print(f"110M Llama shape, bfloat16, {torch.get_num_threads()} threads, {arguments.tokens} tokens:")
    compare(engine, prompts, config, candidates, arguments.rounds)


def of_a_model(arguments: argparse.Namespace) -> None:
    """A trained model that goes on from passages it has just been shown."""
    artifact = open_artifact(arguments.model)
    model, tokenizer = require_decoder(artifact), artifact.tokenizer
    draft = require_decoder(open_artifact(arguments.draft)) if arguments.draft else None
    shown = min(model.config.context_length - arguments.tokens, 4 * arguments.tokens) // 2
    ids = tokenizer.encode(Path(arguments.text).read_text(encoding="utf-8"))
    passages = [ids[start : start + shown] for start in range(0, 4 * shown, shown)]
    prompts = [[*passage, *passage[: shown // 4]] for passage in passages if len(passage) == shown]
    engine = Engine(model, tokenizer, EngineSettings(max_batch=8, reuse=False))
    candidates: dict[str, Guesser] = {"prompt look-up": lambda number: PromptLookup()}
    if draft is not None:
        candidates["draft model"] = lambda number: DraftModel(draft, tokenizer.vocab_size)
    candidates |= {f"{name}, while it pays": paying(one, Worth()) for name, one in list(candidates.items())}
    for temperature in (0.0, 1.0):
        print(f"{arguments.model}, temperature {temperature:g}, {len(prompts)} passages:")
        config = GenerationConfig(temperature, max_new_tokens=arguments.tokens)
        compare(engine, prompts, config, candidates, arguments.rounds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="a run or a model folder")
    parser.add_argument("--draft", help="a smaller model with the same tokenizer")
    parser.add_argument("--text", default="README.md", help="what the passages are from")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    (of_a_model if arguments.model else of_known_quality)(arguments)


if __name__ == "__main__":
    main()
