"""What the engine gains by answering many at once, and what it costs those who come with little.

    chrt -r 10 taskset -c 2,3 python benchmarks/serving.py [--shape tiny|110m] [--threads 2] [--streams 64] [--tokens 32]

Three measurements on a model with random weights, in bfloat16, each a ratio within one run:

- tokens per second of many streams at once over those of the same requests one after another, round by round;
- time to the first token of a short request beside a long prompt that is being read, over its time alone;
- resident memory after each of ten rounds of many streams, half of which are left, over that after the second.
"""

import argparse
import os
import random
import statistics
import time
from dataclasses import replace

import torch

from glasshouse.inference.engine import Engine
from glasshouse.inference.request import EngineSettings, Request
from glasshouse.inference.sampling import GenerationConfig
from glasshouse.models.decoder import Decoder, DecoderConfig
from glasshouse.text.tokenizer import Tokenizer, train_tokenizer

SHAPES = {
    "tiny": DecoderConfig(4096, 256, 4, 4, 4, 64, 704, 4096, query_key_norm=False),
    "110m": DecoderConfig(32000, 768, 12, 12, 12, 64, 2048, 4096, query_key_norm=False),
}
MEGABYTE = 2**20


def random_model(shape: str) -> Decoder:
    """A Llama layout with weights of about the usual size."""
    torch.manual_seed(0)
    model = Decoder(SHAPES[shape])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    return model.to(torch.bfloat16).eval()


def make_tokenizer(vocab_size: int) -> Tokenizer:
    """One whose words mean nothing; only their number matters."""
    tokenizer = train_tokenizer(iter(["The cat sat on the mat."] * 4), 270)
    spell, tokenizer.vocab_size = tokenizer.token_bytes, vocab_size
    tokenizer.token_bytes = lambda token: spell(token % 256)
    return tokenizer


def make_requests(
    model: Decoder, count: int, prompt: int, tokens: int, temperature: float, seed: int
) -> list[Request]:
    """Random prompts; the answers have equal lengths, since nothing is an end token of so random a model for long."""
    draw = random.Random(seed)
    return [
        Request(
            tuple(draw.randrange(300, model.config.vocab_size) for _ in range(prompt)),
            GenerationConfig(temperature, seed=seed + number, max_new_tokens=tokens),
        )
        for number in range(count)
    ]


def tokens_per_second(engine: Engine, groups: list[list[Request]]) -> float:
    """Answer groups of requests, one group after another."""
    started, count = time.perf_counter(), 0
    for group in groups:
        count += sum(map(len, engine.complete(group)))
    return count / (time.perf_counter() - started)


def compare_streams(engine: Engine, streams: int, tokens: int, rounds: int, temperature: float) -> None:
    """Many at once against one after another; of the latter an eighth is enough to know the rate."""
    together, alone = [], []
    for number in range(rounds):
        requests = make_requests(engine.model, streams, 32, tokens, temperature, 1000 * number)
        alone.append(tokens_per_second(engine, [[request] for request in requests[: max(streams // 8, 1)]]))
        together.append(tokens_per_second(engine, [requests]))
    ratios = [many / one for many, one in zip(together, alone, strict=True)]
    print(
        f"{streams} streams, temperature {temperature:g}: {statistics.median(together):.0f} tokens/s at once, "
        f"{statistics.median(alone):.0f} one after another: "
        f"{statistics.median(ratios):.1f} times [{min(ratios):.1f}, {max(ratios):.1f}]"
    )


def first_token(engine: Engine, request: Request) -> float:
    """Seconds from submission to the first token, whatever else runs."""
    started = time.perf_counter()
    ticket = engine.submit(request)
    while not any(event.ticket == ticket for event in engine.step()):
        pass
    return time.perf_counter() - started


def compare_first_token(engine: Engine, prompt: int, rounds: int) -> None:
    """A short request alone, and in the middle of the reading of a prompt that nearly fills the context."""
    alone, beside, context = [], [], engine.model.config.context_length
    for number in range(rounds):
        short, other = make_requests(engine.model, 2, prompt, 1, 0, 77 + 10 * number)
        [long] = make_requests(engine.model, 1, context - 8, 1, 0, 78 + 10 * number)
        alone.append(first_token(engine, short))
        ticket = engine.submit(long)
        for _ in range(8 + number):
            engine.step()
        # It arrives while a step is under way: on the average it waits for half of it.
        started = time.perf_counter()
        engine.step()
        beside.append((time.perf_counter() - started) / 2 + first_token(engine, other))
        engine.cancel(ticket)
        engine.step()
    ratio = statistics.median(beside) / statistics.median(alone)
    print(
        f"first token of {prompt} tokens beside {context:,}: {1000 * statistics.median(beside):.0f} ms, "
        f"alone {1000 * statistics.median(alone):.0f} ms: {ratio:.2f} times"
    )


def resident_memory() -> float:
    """Megabytes of this process that are in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MEGABYTE


def watch_memory(engine: Engine, streams: int, tokens: int) -> None:
    """Ten rounds in which every second request is cancelled on its way."""
    sizes = []
    for number in range(10):
        requests = make_requests(engine.model, streams, 32, tokens, 1.0, 10_000 + number)
        tickets = [engine.submit(replace(request, prompt=request.prompt[:16])) for request in requests]
        left = tickets[::2]
        while not engine.is_idle:
            engine.step()
            if left:
                engine.cancel(left.pop())
        sizes.append(resident_memory())
        assert engine.statistics.cache_blocks_used == 0
    growth = " ".join(f"{size - sizes[1]:+.1f}" for size in sizes)
    print(f"memory after ten rounds: {sizes[-1]:.0f} MB; MB against the second round: {growth}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="110m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chunk", type=int, default=EngineSettings().chunk)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = random_model(options.shape)
    tokenizer = make_tokenizer(model.config.vocab_size)
    settings = EngineSettings(max_batch=options.streams, cache_tokens=32768, chunk=options.chunk)
    engine = Engine(model, tokenizer, settings)
    print(f"{options.shape}, bfloat16, {options.threads} threads, chunk {options.chunk}")
    tokens_per_second(engine, [make_requests(model, 2, 32, 4, 0, 5)])
    for temperature in (0.0, 0.8):
        compare_streams(engine, options.streams, options.tokens, options.rounds, temperature)
    for prompt in (16, 64):
        compare_first_token(engine, prompt, 3 * options.rounds)
    # A cache that the first round fills: a larger one would go on taking memory, up to its size, for beginnings it keeps.
    small = Engine(model, tokenizer, replace(settings, cache_tokens=48 * options.streams))
    watch_memory(small, options.streams, max(options.tokens // 4, 1))


if __name__ == "__main__":
    main()
