"""How good a translation is: the verb `translate` over a file, scored where the right answers are known.

Knows model folders, files of lines and the task's scores; how a text is translated is the inference's business.
"""

import sys
from pathlib import Path
from typing import TextIO

from glasshouse.artifact import open_artifact
from glasshouse.device import Device
from glasshouse.errors import InputError
from glasshouse.inference.generate import TranslationConfig, translate_texts
from glasshouse.tasks.task import TaskExample
from glasshouse.tasks.translation import score_translations
from glasshouse.text.pairs import read_lines


def translate_lines(
    path: Path | str,
    text: str,
    config: TranslationConfig,
    device: Device,
    file: Path | None = None,
    references: Path | None = None,
    output: TextIO | None = None,
) -> list[str]:
    """Translate lines and write them; with references, say on standard error how good they are.

    Args:
        path: a run, a model folder, or a folder in Hugging Face layout.
        text: lines to translate, where no file is given.
        config: how to search.
        device: where and in what number format.
        file: lines to translate.
        references: the right answers, line by line.
        output: where the answers are written; standard output by default.

    Returns:
        The answers.

    Raises:
        InputError: nothing to translate, the model is of another kind, or the files do not fit together.
    """
    lines = list(read_lines(file)) if file is not None else text.splitlines()
    right = list(read_lines(references)) if references is not None else []
    if not any(line.strip() for line in lines):
        raise InputError("nothing to translate", str(file or "TEXT"), "give a text in quotes, or --file")
    if references is not None and len(right) != len(lines):
        what = f"{len(lines):,} lines and {len(right):,} references"
        raise InputError(what, str(references), "give one right answer for each line")
    artifact = open_artifact(path, dtype=device.compute_dtype, device=device.torch_device)
    answers = translate_texts(artifact, lines, config)
    print("\n".join(answers), file=output or sys.stdout, flush=True)
    if references is not None:
        examples = [TaskExample(line, (answer,)) for line, answer in zip(lines, right, strict=True)]
        print("; ".join(map(str, score_translations(answers, examples))), file=sys.stderr)
    return answers
