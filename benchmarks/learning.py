"""Learning per second: tiny Shakespeare by `recipes/shakespeare.yaml` beside a plain GPT, on the same two cores.

    python benchmarks/learning.py tinyshakespeare.txt --seeds 3

The plain GPT is nanoGPT's CPU recipe: characters, 4 layers of width 128, AdamW, 2,000 steps of 12 rows of 64. Its
training time is the clock: ours trains for a third of it, and for all of it, in turn with it, seed by seed. Both are
scored on the last tenth of the text in bits per byte; ours on every token once. `--ablate` takes our choices back one
at a time, each for the full time, paired over the same seeds.
"""

import argparse
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional

from glasshouse.files import read_json

WIDTH, HEADS, LAYERS, CONTEXT, ROWS, STEPS = 128, 4, 4, 64, 12, 2000
RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "shakespeare.yaml"
ABLATIONS = {
    "AdamW for every weight": ["--optimizer", "adamw"],
    "4 times the batch": ["--batch_tokens", "16384"],
    "twice as wide": ["--width", "256", "--heads", "4"],
    "constant rate, short decay": ["--decay", "0.05"],
    "norms on queries and keys": ["--layout", "qwen3"],
    "float32": ["--dtype", "float32"],
}


class PlainBlock(nn.Module):
    """A GPT block: norm, attention, norm, GELU network."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
        self.mix, self.output = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, T, WIDTH] to the same."""
        parts = self.mix(self.first(hidden)).unflatten(-1, (3 * HEADS, -1)).transpose(1, 2)
        read = functional.scaled_dot_product_attention(*parts.split(HEADS, dim=1), is_causal=True)
        hidden = hidden + self.output(read.transpose(1, 2).flatten(2))
        return hidden + self.down(functional.gelu(self.up(self.second(hidden))))


class PlainGPT(nn.Module):
    """The plain model: learned positions, tied head."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.embedding, self.position = nn.Embedding(vocab_size, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks, self.norm = (
            nn.ModuleList(PlainBlock() for _ in range(LAYERS)),
            nn.LayerNorm(WIDTH, bias=False),
        )
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                written = name.endswith(("output.weight", "down.weight"))
                nn.init.normal_(parameter, 0.0, 0.02 / math.sqrt(2 * LAYERS) if written else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Ids [B, T] to logits [B, T, vocab_size]."""
        hidden = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        return self.norm(hidden) @ self.embedding.weight.T


def train_plain(text: str, seed: int) -> tuple[float, float]:
    """Train the plain GPT: (seconds of its 2,000 steps, bits per byte on the last tenth)."""
    torch.manual_seed(seed)
    ids = {character: number for number, character in enumerate(sorted(set(text)))}
    data = torch.tensor([ids[character] for character in text])
    cut = int(0.9 * len(data))
    train, held_out = data[:cut], data[cut:]
    model = PlainGPT(len(ids))
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    rest = [parameter for parameter in model.parameters() if parameter.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
    started = time.perf_counter()
    for step in range(STEPS):
        cosine = 1e-4 + 0.5 * (1 + math.cos(math.pi * (step - 100) / (STEPS - 100))) * 9e-4
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (step + 1) / 100 if step < 100 else cosine
        places = torch.randint(len(train) - CONTEXT - 1, (ROWS, 1)) + torch.arange(CONTEXT + 1)
        rows = train[places]
        loss = functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    seconds = time.perf_counter() - started
    rows = held_out[: (len(held_out) - 1) // CONTEXT * CONTEXT + 1].unfold(0, CONTEXT + 1, CONTEXT)
    with torch.no_grad():
        nats = functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()).item()
    return seconds, nats / math.log(2)


def train_ours(corpus: Path, out: Path, seconds: float, seed: int, options: list[str]) -> tuple[float, float]:
    """Train by the recipe for so long, and evaluate: (seconds trained, bits per byte)."""
    command = [sys.executable, "-m", "glasshouse"]
    settings = ["--config", str(RECIPE), "--corpus", str(corpus), "--out", str(out), "--seed", str(seed)]
    settings += [
        "--minutes",
        str(seconds / 60 / 0.93),
        "--validations",
        "1",
        "--threads",
        str(torch.get_num_threads()),
    ]
    subprocess.run([*command, "pretrain", *settings, *options], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([*command, "evaluate", str(out)], check=True, stdout=subprocess.DEVNULL)
    report = read_json(out / "reports" / "evaluation.json")
    return read_json(out / "run.json")["seconds"], report["bits_per_byte"]["value"]


def show(name: str, seconds: list[float], scores: list[float]) -> None:
    """One line: seconds and bits per byte of every seed, and their mean."""
    each = ", ".join(f"{score:.3f}" for score in scores)
    print(
        f"{name:32} {statistics.mean(seconds):6.1f} s   {statistics.mean(scores):.3f} bits/byte   ({each})",
        flush=True,
    )


def main() -> None:
    """Prepare the corpus once, then train in turn."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ablate", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    text = options.text.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
        recipe["prepare"]["documents"] = [str(options.text)]
        (place / "prepare.yaml").write_text(yaml.safe_dump({"prepare": recipe["prepare"]}))
        prepare = [sys.executable, "-m", "glasshouse", "prepare", "--config", str(place / "prepare.yaml")]
        subprocess.run([*prepare, "--out", str(place / "corpus")], check=True, stdout=subprocess.DEVNULL)
        runs: dict[str, list[tuple[float, float]]] = {}
        for seed in range(options.seeds):
            clock, score = train_plain(text, seed)
            runs.setdefault("plain GPT, AdamW", []).append((clock, score))
            cases = {"ours, a third of its time": (clock / 3, []), "ours, its full time": (clock, [])}
            if options.ablate:
                cases |= {f"  {name}": (clock, extra) for name, extra in ABLATIONS.items()}
            for number, (name, (seconds, extra)) in enumerate(cases.items()):
                out = place / f"{seed}-{number}"
                runs.setdefault(name, []).append(train_ours(place / "corpus", out, seconds, seed, extra))
    for name, results in runs.items():
        show(name, [seconds for seconds, _ in results], [score for _, score in results])


if __name__ == "__main__":
    main()
