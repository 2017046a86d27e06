"""Training speed beside the peers: tokens per second of whole optimizer steps, all candidates in turn.

    python benchmarks/training.py --shape S --rounds 10

Candidates that are not installed are left out and named: `pip install transformers litgpt`. Every candidate trains a
Llama of the same shape on the same tokens with fused AdamW; each at its eager and its compiled setting. Prints the
median of each, the ratio of ours to the best peer round by round (median, min, max), and the share of the machine's
measured matrix rate.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from glasshouse.device import Device, open_device, peak_memory
from glasshouse.models.decoder import Decoder, DecoderConfig, initialize
from glasshouse.training.objectives import TokenBatch, next_token
from glasshouse.training.optimization import MasterOptimizer, OptimizationConfig
from glasshouse.training.plan import compile_layers, flops_per_token, matmul_rate


@dataclass(frozen=True)
class Case:
    """A shape and the rows of a step."""

    model: DecoderConfig
    rows: int
    context: int


def llama(
    vocab_size: int, width: int, layers: int, heads: int, feed_forward: int, context: int
) -> DecoderConfig:
    """A Llama without grouped queries."""
    return DecoderConfig(
        vocab_size, width, layers, heads, heads, width // heads, feed_forward, context, query_key_norm=False
    )


SHAPES = {
    "S": Case(llama(4096, 384, 6, 6, 1024, 256), 16, 256),
    "M": Case(llama(32000, 768, 12, 12, 2048, 512), 4, 512),
    "124M": Case(llama(50304, 768, 12, 12, 2048, 1024), 32, 1024),
    "1B": Case(llama(32000, 2048, 22, 16, 5632, 2048), 8, 2048),
}

Step = Callable[[], None]


def ours(case: Case, device: Device, compiled: bool) -> Step:
    """Glasshouse: bfloat16 weights and activations, float32 masters."""
    model = Decoder(case.model)
    initialize(model, 0)
    model = model.to(device.torch_device, device.compute_dtype)
    if compiled:
        compile_layers(model)
    optimizer = MasterOptimizer(model, OptimizationConfig("adamw", learning_rate=1e-4))
    tokens = torch.randint(case.model.vocab_size, (case.rows, case.context + 1), device=device.torch_device)
    positions = torch.arange(case.context, device=tokens.device).expand(case.rows, -1)
    batch = TokenBatch(tokens[:, :-1], tokens[:, 1:], positions, None)

    def step() -> None:
        loss, weight = next_token(model, batch)
        loss.backward()
        optimizer.accumulate()
        optimizer.step(1.0, weight)

    return step


def peer_step(
    model: torch.nn.Module,
    logits: Callable[[torch.Tensor], torch.Tensor],
    case: Case,
    device: Device,
    autocast: bool,
) -> Step:
    """A plain training step around somebody else's model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(case.model.vocab_size, (case.rows, case.context + 1), device=device.torch_device)

    def step() -> None:
        with torch.autocast(device.kind, torch.bfloat16, enabled=autocast):
            scores = logits(tokens[:, :-1])
            loss = functional.cross_entropy(scores.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def transformers_llama(case: Case, device: Device, compiled: bool) -> Step:
    """Hugging Face transformers' LlamaForCausalLM under bfloat16 autocast."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = case.model
    config = LlamaConfig(
        vocab_size=shape.vocab_size, hidden_size=shape.embedding_dim, num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads, intermediate_size=shape.feed_forward_dim, tie_word_embeddings=True,
        max_position_embeddings=shape.context_length, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device.torch_device)
    if compiled:
        model.compile()
    return peer_step(model, lambda tokens: model(tokens).logits, case, device, True)


def litgpt_llama(case: Case, device: Device, compiled: bool) -> Step:
    """litgpt's GPT in the Llama layout under bfloat16 autocast."""
    from litgpt import GPT, Config

    shape = case.model
    config = Config(
        n_layer=shape.num_layers, n_head=shape.num_heads, n_embd=shape.embedding_dim, vocab_size=shape.vocab_size,
        padded_vocab_size=shape.vocab_size, block_size=shape.context_length, rotary_percentage=1.0, parallel_residual=False,
        bias=False, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", intermediate_size=shape.feed_forward_dim,
    )  # fmt: skip
    model = GPT(config)
    model.lm_head.weight = model.transformer.wte.weight
    model = model.to(device.torch_device)
    forward = torch.compile(model) if compiled else model
    return peer_step(model, forward, case, device, True)


CANDIDATES = {"ours": ours, "transformers": transformers_llama, "litgpt": litgpt_llama}


class Worker:
    """One candidate in a process of its own, so that none profits from another's settings; it makes a step when told.

    Args:
        label: the candidate's name and setting, like "ours compiled".
        options: the command line.
    """

    def __init__(self, label: str, options: argparse.Namespace):
        command = [sys.executable, __file__, "--worker", label, "--shape", options.shape]
        command += ["--threads", str(options.threads), "--device", options.device]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ready = self.answer()

    def answer(self) -> str:
        """The next line of the worker; empty when it has ended."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def step(self) -> float:
        """Seconds of one step."""
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return float(self.answer().split()[0])

    def end(self) -> float:
        """Let the worker end; returns the most gigabytes it held."""
        assert self.process.stdin is not None
        self.process.stdin.write("end\n")
        self.process.stdin.flush()
        held = float(self.answer())
        self.process.communicate()
        return held


def work(label: str, options: argparse.Namespace) -> None:
    """The worker's side: build the candidate, then a step for every line that comes in."""
    name, setting = label.split()
    if name == "ours":
        device = open_device(options.device, "bfloat16", 0, options.threads)
    else:
        device = Device("cuda" if options.device == "cuda" else "cpu", "bfloat16", 0, options.threads)
        torch.set_num_threads(options.threads or torch.get_num_threads())
    started = time.perf_counter()
    try:
        step = CANDIDATES[name](SHAPES[options.shape], device, setting == "compiled")
    except ImportError as error:
        print(f"missing {error}", flush=True)
        return
    for _ in range(3):
        step()
    print(f"ready in {time.perf_counter() - started:.0f} s", flush=True)
    for line in sys.stdin:
        if line.strip() == "end":
            print(peak_memory(device) / 1e9, flush=True)
            return
        started = time.perf_counter()
        step()
        if device.kind == "cuda":
            torch.cuda.synchronize()
        print(time.perf_counter() - started, flush=True)


def start_workers(options: argparse.Namespace) -> dict[str, Worker]:
    """A worker for every candidate that is installed."""
    workers: dict[str, Worker] = {}
    for name in CANDIDATES:
        for setting in ("eager",) if options.eager else ("eager", "compiled"):
            label = f"{name} {setting}"
            worker = Worker(label, options)
            print(f"{label}: {worker.ready}", flush=True)
            if worker.ready.startswith("ready"):
                workers[label] = worker
    return workers


def ratio(label: str, other: str, seconds: dict[str, list[float]]) -> str:
    """How many times as fast `label` is as `other`: median, min and max over the rounds."""
    ratios = [slow / fast for fast, slow in zip(seconds[label], seconds[other], strict=True)]
    return f"{statistics.median(ratios):.2f} [{min(ratios):.2f} to {max(ratios):.2f}]"


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="S")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    parser.add_argument("--eager", action="store_true", help="leave out compilation")
    options = parser.parse_args()
    if options.worker:
        return work(options.worker, options)
    device = open_device(options.device, "bfloat16", 0, options.threads)
    case, workers = SHAPES[options.shape], start_workers(options)
    seconds: dict[str, list[float]] = {label: [] for label in workers}
    peaks = []
    for _ in range(options.rounds):
        peaks.append(matmul_rate(device))
        for label, worker in workers.items():
            seconds[label].append(worker.step())
    peak, tokens = max(peaks), case.rows * case.context
    flops = flops_per_token(case.model, case.context)
    print(f"\nshape {options.shape} on {device.kind}, {device.threads} threads of {os.cpu_count()}; "
          f"matrix rate {statistics.median(peaks) / 1e9:,.0f} GFLOP/s, best {peak / 1e9:,.0f}")  # fmt: skip
    for label, times in seconds.items():
        rate = tokens / statistics.median(times)
        shares = [tokens * flops / time / rate_then for time, rate_then in zip(times, peaks, strict=True)]
        print(
            f"{label:24} {rate:10,.0f} tokens/s {statistics.median(shares):6.0%} of the matrix rate {workers[label].end():8.2f} GB"
        )
    best = min(
        (label for label in seconds if label.startswith("ours")),
        key=lambda name: statistics.median(seconds[name]),
    )
    for other in (label for label in seconds if not label.startswith("ours")):
        print(f"{best} / {other:24} {ratio(best, other, seconds)}")
    return None


if __name__ == "__main__":
    main()
