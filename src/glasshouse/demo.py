"""What `glasshouse demo` prints when a model's life is over: what happened, how it writes, how good it is, what next.

Reads finished runs; makes, measures and changes nothing. The samples are the first ones drawn, shown as they came.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from glasshouse.artifact import open_artifact
from glasshouse.device import open_device
from glasshouse.evaluation.baselines import train_ngram
from glasshouse.inference.generate import CONTROLS, continue_text
from glasshouse.inference.sampling import GenerationConfig
from glasshouse.run import Run, open_run
from glasshouse.text.packing import Corpus, open_corpus
from glasshouse.text.tokenizer import open_tokenizer

PROMPT = "Describe a cat.\n"
SAMPLING = GenerationConfig(temperature=0.8, max_new_tokens=90, seed=1)
ORDER = 5
SHORTEST_COPY = 4
"""Words: shorter runs are shared by any two texts about one thing."""


def show_demo(folder: Path, console: Console | None = None) -> None:
    """Print the outcome of the demo recipe.

    Args:
        folder: where its runs are: prepare/ and pretrain/.
        console: where to print; standard output by default.

    Raises:
        InputError: a run is missing or altered.
    """
    console = console or Console(highlight=False)
    prepared, trained = open_run(folder / "prepare"), open_run(folder / "pretrain")
    corpus = open_corpus(prepared.corpus_path)
    texts = [corpus.split("train").text(number) for number in range(corpus.split("train").documents)]
    samples = {
        "the model": model_sample(trained),
        f"the {ORDER}-gram baseline": ngram_sample(corpus, prepared.corpus_path),
    }
    console.print()
    console.print(
        Panel(_happened(corpus, prepared.read(), trained.read()), title="what happened", title_align="left")
    )
    console.print(_side_by_side(samples, texts))
    if "evaluation" in trained.reports():
        measured = _measured(trained.reports()["evaluation"])
        console.print(Panel(measured, title="how good it is", title_align="left"))
    for about, command in _next(trained.path).items():
        console.print(Text(f"\n{about}:", "bold"))
        console.print(f"  {command}", soft_wrap=True, markup=False)  # in one line, to be copied


def model_sample(run: Run) -> str:
    """What the model writes after the demo's prompt: its first sample, uncorrected."""
    device = open_device(seed=SAMPLING.seed)
    artifact = open_artifact(run.path, dtype=device.compute_dtype, device=device.torch_device)
    return "".join(token.text for token in continue_text(artifact, PROMPT, SAMPLING))


def ngram_sample(corpus: Corpus, folder: Path) -> str:
    """The same of an n-gram model counted on the same training text, under the same rules."""
    split, tokenizer = corpus.split("train"), open_tokenizer(folder)
    documents = (split.document(number)[0] for number in range(split.documents))
    baseline = train_ngram(documents, corpus.vocab_size, tokenizer.end_of_document, ORDER)
    tokens = list(baseline.sample(tokenizer.encode(PROMPT), SAMPLING))
    return tokenizer.decode([token for token in tokens if token != tokenizer.end_of_document])


def longest_copy(sample: str, texts: list[str]) -> str:
    """The longest run of words of a sample that stands in the training texts, word for word."""
    words, longest = sample.split(), ""
    together = "\0".join(f" {' '.join(text.split())} " for text in texts)
    for start in range(len(words)):
        count = max(1, len(longest.split()) + 1)
        while start + count <= len(words) and f" {' '.join(words[start : start + count])} " in together:
            longest = " ".join(words[start : start + count])
            count += 1
    return longest


def _happened(corpus: Corpus, prepared: dict[str, Any], trained: dict[str, Any]) -> Group:
    train = corpus.split("train")
    read = (
        f"{train.documents:,} documents, {train.bytes / 1e6:.1f} MB, became {train.tokens:,} tokens of a vocabulary of "
        f"{corpus.vocab_size:,} ({_seconds(prepared)})."
    )
    grown = (
        f"A model of {trained['parameters'] / 1e6:.1f} million weights read {trained['tokens']:,} tokens in "
        f"{trained['steps']:,} steps ({_seconds(trained)})."
    )
    return Group(Text(read), Text(grown))


def _seconds(facts: dict[str, Any]) -> str:
    minutes, seconds = divmod(round(facts["seconds"]), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _side_by_side(samples: dict[str, str], texts: list[str]) -> Table:
    table = Table(box=box.ROUNDED, expand=True, title_justify="left", title_style="", padding=(0, 1))
    table.title = f'asked to "{PROMPT.strip()}", first answer, as it came'
    cells, notes = [], []
    for name, sample in samples.items():
        table.add_column(name, ratio=1, header_style="bold")
        cells.append(Text(sample.strip().translate(CONTROLS) or "(nothing)"))
        copy = longest_copy(sample, texts)
        count = len(copy.split())
        copied = f'longest run copied from the training text: {count} words, "{copy}"'
        notes.append(
            Text(copied if count >= SHORTEST_COPY else "copies nothing of note from the training text", "dim")
        )
    table.add_row(*cells, end_section=True)
    table.add_row(*notes)
    return table


def _measured(report: dict[str, Any]) -> Group:
    held_out, difference = report["held_out"], report["difference"]
    table = Table.grid(padding=(0, 3))
    for name, figures in (
        ("the model", report["bits_per_byte"]),
        (report["baseline"]["name"], report["baseline"]),
    ):
        table.add_row(name, f"{_interval(figures)} bits per byte")
    table.add_row("difference", f"{_interval(difference)}: {difference['verdict']}")
    table.add_row(
        "on its own training text", f"{report['train']['value']:.3f}: gap {report['train']['gap']:+.3f}"
    )
    about = (
        f"Bits needed to tell each byte of {held_out['documents']:,} documents it never saw, with 95 % intervals; "
        "fewer is better, and 8 is knowing nothing."
    )
    return Group(table, Text(about, "dim"))


def _interval(figures: dict[str, Any]) -> str:
    if figures.get("low") is None:
        return f"{figures['value']:.3f}"
    return f"{figures['value']:.3f} [{figures['low']:.3f}, {figures['high']:.3f}]"


def _next(path: Path) -> dict[str, str]:
    program = (
        "glasshouse"
        if shutil.which("glasshouse")
        else os.path.relpath(Path(sys.executable).parent / "glasshouse")
    )
    return {
        "Read its card": f"{path / 'README.md'}   {path / 'report.html'}",
        "Talk to it": f'{program} generate {path} "Describe a dog." --seed 1',
        "Make one of your own text": f"{program} prepare --documents my_folder/ --out runs/corpus\n"
        f"  {program} pretrain --corpus runs/corpus --size tiny --out runs/base",
    }
