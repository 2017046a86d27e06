"""The verbs: reads options and recipes, opens a run, calls one stage. Knows no mechanism of any stage.

Every verb imports what it needs inside its own function: this table is the one place where that is allowed, so that
`glasshouse --help` answers at once and `glasshouse report` never loads PyTorch.
"""

import os
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glasshouse.errors import InputError

if TYPE_CHECKING:
    from glasshouse.run import Run

RECIPE_WORD = "a YAML file, or the name of a recipe that ships"
FOLDER_HELP = {"out FOLDER": "where its runs go; runs/NAME by default"}
OUT_HELP = {"out RUN": "the run folder to make"}
COMPARE_HELP = {
    "RUN": "an evaluated run, or several that differ in their seed: runs/a,runs/b",
    "corpus RUN": "measure both on the held-out text of this corpus instead",
    "device DEVICE": "auto, cpu, cuda or mps",
}
GENERATE_HELP = {
    "MODEL": "a run, a model folder, or a folder in Hugging Face layout",
    "PROMPT": "the text to continue, in quotes; - reads it from standard input; without one, a document is begun",
    "device DEVICE": "auto, cpu, cuda or mps",
    "dtype FORMAT": "auto, float32 or bfloat16",
    "form FORM": "what the answer must be: json, schema:FILE, regex:PATTERN, choice:A|B|C or grammar:FILE",
    "draft GUESSER": "guess ahead while that is faster: lookup, or a smaller model; changes no text",
    "beams N": "search for the likeliest text, so many at a time, instead of drawing",
    "quantize KIND": "int8 or int4: weights of 8 or 4 bits; what they cost is measured and said",
}
CHAT_HELP = {
    name: GENERATE_HELP[name] for name in ("MODEL", "device DEVICE", "dtype FORMAT", "quantize KIND")
}
CHAT_HELP["system TEXT"] = "what the model is told before everything"
EXPORT_HELP = {
    "MODEL": "a run, a model folder, or a folder in Hugging Face layout",
    "to FORMAT": "gguf (llama.cpp, Ollama), onnx, or int8 or int4: a model folder of smaller weights",
    "type TYPE": "of a GGUF file's weights: f16 (the default), q8_0, q4_0, bf16 or f32",
    "out FOLDER": "the folder to make; exports/NAME-FORMAT by default",
    "limit SHARE": "how far logits may typically move, as a share of their spread; each type has its own",
}
SERVE_HELP = {
    "MODEL": "a run, a model folder, or a folder in Hugging Face layout; several may follow, each as NAME=PATH"
}
PAIRS_HELP = {
    "pairs FILES": "train an encoder-decoder on pairs instead; pretrain --pairs --help lists its settings"
}
TRANSLATE_HELP = {
    "MODEL": "a run of pretrain --pairs, a model folder, or a folder in Hugging Face layout",
    "TEXT": "what to translate, in quotes; - reads lines from standard input",
    "file FILE": "translate a file line by line instead",
    "references FILE": "also measure: the right answers, line by line (needs sacrebleu)",
    "threads N": "CPU threads; all by default",
    "device DEVICE": "auto, cpu, cuda or mps",
    "dtype FORMAT": "auto, float32 or bfloat16",
}
RESUME_HELP = {"resume": "go on with the unfinished run in --out, exactly where it stopped"}


def main(arguments: list[str] | None = None) -> int:
    """Run one command line.

    Args:
        arguments: the words after `glasshouse`; those of the process by default.

    Returns:
        The exit code: 0 done, 2 something the user can mend, 130 stopped by Ctrl-C, 1 anything else.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        return _dispatch(words)
    except InputError as error:
        if debug:
            raise
        return _complain(str(error), 2)
    except KeyboardInterrupt:
        return _complain("stopped", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if debug:
            raise
        return _complain(f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else ""), 2)
    except Exception as error:
        if debug:
            raise
        return _complain(
            f"unexpected {type(error).__name__}: {error}: add --debug to see where, and report it", 1
        )


def _complain(line: str, code: int) -> int:
    with suppress(OSError):
        sys.stdout.flush()
    print(f"glasshouse: {' '.join(line.split())}", file=sys.stderr)
    return code


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"glasshouse {version('glasshouse')}")
        return 0
    if words[0] not in VERBS:
        from glasshouse.config import suggest

        raise InputError(f"unknown command {words[0]!r}", "", suggest(words[0], VERBS, "command"))
    return VERBS[words[0]][1](words[1:]) or 0


def _usage() -> str:
    lines = ["Grow a language model you can see through.", "", "usage: glasshouse VERB ... [--debug]", ""]
    lines += [f"  {verb:<10} {text}" for verb, (text, _) in VERBS.items()]
    return "\n".join([*lines, "", "glasshouse VERB --help lists the settings of one; glasshouse --version"])


def _stage(name: str, given: Collection[str] = ()) -> tuple[type, Callable[[Any, "Run"], object]]:
    """The config class and the function of one stage, given the names of its settings: `pretrain` learns from a corpus,
    or, with `pairs`, an encoder-decoder from pairs."""
    if name == "prepare":
        from glasshouse.text.prepare import PrepareConfig, prepare

        return PrepareConfig, prepare
    if name == "pretrain" and "pairs" in given:
        from glasshouse.training.sequences import PairsConfig, pretrain_pairs

        return PairsConfig, pretrain_pairs
    if name == "pretrain":
        from glasshouse.training.pretrain import PretrainConfig, pretrain

        return PretrainConfig, pretrain
    if name == "finetune":
        from glasshouse.training.finetune import FinetuneConfig, finetune

        return FinetuneConfig, finetune
    from glasshouse.evaluation.evaluate import EvaluateConfig, evaluate

    return EvaluateConfig, evaluate


def _take_value(words: list[str], name: str) -> str | None:
    """Remove `--name VALUE` or `--name=VALUE` from the words and return the value, or None when it is not there."""
    for place, word in enumerate(words):
        if word.startswith(f"--{name}="):
            return words.pop(place).partition("=")[2]
        if word == f"--{name}":
            value = words[place + 1] if place + 1 < len(words) else "--"
            if value.startswith("--"):
                raise InputError(f"--{name} needs a value", "", f"write --{name} followed by a path")
            del words[place : place + 2]
            return value
    return None


def _take_switch(words: list[str], name: str) -> bool:
    found = f"--{name}" in words
    words[:] = [word for word in words if word != f"--{name}"]
    return found


def _take_positionals(verb: str, words: list[str], names: str) -> list[str]:
    """Remove the leading words that are no options; `names` like "MODEL [PROMPT]" says how many there may be."""
    expected = names.split()
    count = next(
        (place for place, word in enumerate(words) if word.startswith("--") or word == "-h"), len(words)
    )
    if {"--help", "-h"} & set(words):
        return [""] * len(expected)
    if count > len(expected):
        raise InputError(
            f"unexpected {words[len(expected)]!r}",
            "",
            f"write glasshouse {verb} {names}, with text in quotes",
        )
    if count < len(expected) and not expected[count].startswith("["):
        raise InputError(f"{expected[count]} is missing", "", f"write glasshouse {verb} {names}")
    taken = words[:count]
    del words[:count]
    return taken + [""] * (len(expected) - count)


def _make(stage: str, words: list[str]) -> Path:
    """A verb that makes a run: prepare, pretrain or finetune. Returns its folder."""
    from glasshouse.config import parse_config
    from glasshouse.stage import RESUMABLE, recorded_settings, run_stage

    if words and not words[0].startswith("-"):
        name = {"prepare": "documents", "pretrain": "corpus", "finetune": "model"}[stage]
        raise InputError(f"unexpected {words[0]!r}", "", f"write --{name} {words[0]}")
    out, resume = _take_value(words, "out"), _take_switch(words, "resume") if stage in RESUMABLE else False
    given = {}
    if resume and out is not None:
        given = recorded_settings(Path(out), stage)
    named = {word.removeprefix("--").partition("=")[0] for word in words if word.startswith("--")}
    config_class, function = _stage(stage, named | set(given))
    options = OUT_HELP | (RESUME_HELP if stage in RESUMABLE else {})
    options |= PAIRS_HELP if stage == "pretrain" and "pairs" not in named else {}
    config = parse_config(config_class, words, stage, given=given, options=options)
    if out is None:
        raise InputError("--out is missing", "", "add --out and the run folder to make, like --out runs/name")
    run_stage(stage, function, config, Path(out), resume)
    return Path(out)


def _prepare(words: list[str]) -> int:
    _make("prepare", words)
    return 0


def _pretrain(words: list[str]) -> int:
    _make("pretrain", words)
    return 0


def _finetune(words: list[str]) -> int:
    _report_forgetting(_make("finetune", words))
    return 0


def _report_forgetting(path: Path) -> None:
    """Measure what a finished fine-tune forgot, attach it, and write the card."""
    from glasshouse.device import open_device
    from glasshouse.evaluation.forgetting import corpus_behind, measure_forgetting
    from glasshouse.run import open_run

    run = open_run(path)
    facts = run.read()
    if facts.get("status") != "finished":
        return
    corpus = corpus_behind(path)
    if corpus is None:
        print("forgetting: not measured, because the corpus of the base model is not known here")
    else:
        report = measure_forgetting(path, Path(facts["base"]), corpus, open_device(facts["device"]["kind"]))
        run.attach("forgetting", report)
        print(f"forgetting: {report['verdict']}")
    _write_card(path)


def _evaluate(words: list[str]) -> int:
    from glasshouse.config import parse_config
    from glasshouse.run import open_run

    config_class, function = _stage("evaluate")
    [path] = _take_positionals("evaluate", words, "RUN")
    config = parse_config(
        config_class, words, "evaluate", options={"RUN": "the run to measure, before the options"}
    )
    function(config, open_run(Path(path)))
    _write_card(Path(path))
    return 0


def _generate(words: list[str]) -> int:
    from glasshouse.config import parse_config
    from glasshouse.inference.sampling import GenerationConfig

    path, prompt = _take_positionals("generate", words, "MODEL [PROMPT]")
    where, number_format = _take_value(words, "device") or "auto", _take_value(words, "dtype") or "auto"
    names = ("form", "draft", "beams", "quantize")
    form, draft, beams, quantize = (_take_value(words, name) or "" for name in names)
    config = parse_config(GenerationConfig, words, "generate", options=GENERATE_HELP)
    from glasshouse.device import open_device
    from glasshouse.inference.generate import AnswerOptions, generate_text

    prompt = sys.stdin.read() if prompt == "-" else prompt
    if beams and not beams.isdigit():
        raise InputError(
            f"{beams!r} is not a whole number", "--beams", "give the number of texts kept at a time"
        )
    options = AnswerOptions(form, draft, int(beams or 0), quantize)
    generate_text(path, prompt, config, open_device(where, number_format, config.seed), options=options)
    return 0


def _chat(words: list[str]) -> int:
    from glasshouse.config import parse_config
    from glasshouse.inference.sampling import GenerationConfig

    [path] = _take_positionals("chat", words, "MODEL")
    where, number_format = _take_value(words, "device") or "auto", _take_value(words, "dtype") or "auto"
    system, quantize = (_take_value(words, name) or "" for name in ("system", "quantize"))
    config = parse_config(GenerationConfig, words, "chat", options=CHAT_HELP)
    from glasshouse.device import open_device
    from glasshouse.inference.generate import chat_with

    chat_with(path, config, open_device(where, number_format, config.seed), system, quantize)
    return 0


def _serve(words: list[str]) -> int:
    from glasshouse.config import parse_config

    count = next((place for place, word in enumerate(words) if word.startswith("-")), len(words))
    paths, rest = words[:count], words[count:]
    if not paths and not {"--help", "-h"} & set(rest):
        raise InputError("MODEL is missing", "", "write glasshouse serve MODEL [MODEL ...]")
    try:
        from glasshouse.serve.server import ServeConfig, serve
    except ModuleNotFoundError as error:
        raise InputError(
            f"{error.name} is not installed", "", 'in the project folder, pip install ".[serve]"'
        ) from None
    return serve(paths, parse_config(ServeConfig, rest, "serve", options=SERVE_HELP))


def _translate(words: list[str]) -> int:
    from glasshouse.config import parse_config
    from glasshouse.inference.generate import TranslationConfig

    path, text = _take_positionals("translate", words, "MODEL [TEXT]")
    where, number_format = _take_value(words, "device") or "auto", _take_value(words, "dtype") or "auto"
    file, references = _take_value(words, "file"), _take_value(words, "references")
    threads = _take_value(words, "threads") or "0"
    if not threads.isdigit():
        raise InputError(f"{threads!r} is not a whole number", "--threads", "give the number of CPU threads")
    config = parse_config(TranslationConfig, words, "translate", options=TRANSLATE_HELP)
    from glasshouse.device import open_device
    from glasshouse.evaluation.translation import translate_lines

    if text == "-":
        text = sys.stdin.read()
    device = open_device(where, number_format, threads=int(threads))
    known = Path(references) if references else None
    translate_lines(path, text, config, device, Path(file) if file else None, known)
    return 0


def _report(words: list[str]) -> int:
    [path] = _take_positionals("report", words, "RUN")
    _refuse_rest("report RUN", words, {"RUN": "the run whose card is written"})
    _write_card(Path(path))
    print(f"wrote {Path(path) / 'README.md'} and {Path(path) / 'report.html'}")
    return 0


def _write_card(path: Path) -> None:
    from glasshouse.report import write_report
    from glasshouse.run import open_run

    write_report(open_run(path))


def _plan(words: list[str]) -> int:
    from glasshouse.config import build_config, find_recipe, read_recipe

    [recipe] = _take_positionals("plan", words, "RECIPE")
    gpus = _take_value(words, "gpus")
    _refuse_rest(
        "plan RECIPE", words, {"RECIPE": RECIPE_WORD, "gpus N": "for so many of this machine's GPUs"}
    )
    if gpus is not None and not gpus.isdigit():
        raise InputError(f"{gpus!r} is not a whole number", "--gpus", "give the number of GPUs")
    path = find_recipe(Path(recipe))
    stages = read_recipe(path)
    if "pretrain" not in stages:
        raise InputError("there is nothing to plan", str(path), "add a pretrain part")
    if "pairs" in stages["pretrain"]:
        fix = "run it: it times its own steps and says what it will take before the first"
        raise InputError("training on pairs cannot be planned ahead", f"{path}: pretrain.pairs", fix)
    configs = {}
    for stage in (stage for stage in ("prepare", "pretrain") if stage in stages):
        values = ({"corpus": "."} if "prepare" in stages and stage == "pretrain" else {}) | stages[stage]
        origins = {name: f"{path}: {stage}.{name}" for name in values}
        configs[stage] = build_config(_stage(stage)[0], values, origins)
    from glasshouse.forecast import print_forecast

    print_forecast(configs["pretrain"], configs.get("prepare"), int(gpus or 0))
    return 0


def _run(words: list[str]) -> int:
    [recipe] = _take_positionals("run", words, "RECIPE")
    out = _take_value(words, "out")
    _refuse_rest(
        "run RECIPE", words, {"RECIPE": "a YAML file, or the name of a recipe that ships", **FOLDER_HELP}
    )
    _run_recipe(recipe, out)
    return 0


def _run_recipe(word: str, out: str | None) -> Path:
    """Run every unfinished stage of a recipe; returns the folder that holds their runs."""
    from glasshouse.config import STAGES, build_config, find_recipe, read_recipe, recipe_name
    from glasshouse.stage import finish_stage

    path = find_recipe(Path(word))
    recipe, folder = read_recipe(path), Path(out) if out else Path("runs") / recipe_name(path)
    if "evaluate" in recipe and "pretrain" not in recipe:
        raise InputError("there is nothing to evaluate", f"{path}: evaluate", "add a pretrain part")
    work = []
    for stage in (stage for stage in STAGES if stage in recipe):
        config_class, function = _stage(stage, recipe[stage])
        values = dict(recipe[stage])
        if stage == "pretrain" and "prepare" in recipe:
            values.setdefault("corpus", str(folder / "prepare"))
        origins = {name: f"{path}: {stage}.{name}" for name in values}
        work.append((stage, function, build_config(config_class, values, origins)))
    for stage, function, config in work:
        print(f"\n== {stage} ==", flush=True)
        finish_stage(stage, function, config, folder / ("pretrain" if stage == "evaluate" else stage))
    if "pretrain" in recipe:
        _write_card(folder / "pretrain")
    return folder


def _compare(words: list[str]) -> int:
    left, right = _take_positionals("compare", words, "RUN RUN")
    corpus, where = _take_value(words, "corpus"), _take_value(words, "device") or "auto"
    _refuse_rest("compare RUN RUN", words, COMPARE_HELP)
    from glasshouse.device import open_device
    from glasshouse.evaluation.compare import compare_runs, describe

    sides = [[Path(run) for run in side.split(",")] for side in (left, right)]
    measured_on = Path(corpus) if corpus else None
    print(describe(compare_runs(sides[0], sides[1], corpus=measured_on, device=open_device(where))))
    return 0


def _export(words: list[str]) -> int:
    [model] = _take_positionals("export", words, "MODEL")
    to, number_format = _take_value(words, "to"), _take_value(words, "type") or ""
    out, limit = _take_value(words, "out"), _take_value(words, "limit")
    _refuse_rest("export MODEL --to FORMAT", words, EXPORT_HELP)
    try:
        share = float(limit) if limit else None
    except ValueError:
        raise InputError(f"{limit!r} is not a number", "--limit", "give one, like 0.1") from None
    from glasshouse.export.export import ExportSettings, export_model

    export_model(ExportSettings(model, to or "", number_format, Path(out) if out else None, share))
    return 0


def _demo(words: list[str]) -> int:
    out, recipe = _take_value(words, "out"), _take_value(words, "config") or "demo"
    _refuse_rest("demo", words, FOLDER_HELP | {"config RECIPE": "another recipe than the one that ships"})
    folder = _run_recipe(recipe, out)
    from glasshouse.demo import show_demo

    show_demo(folder)
    return 0


def _refuse_rest(usage: str, words: list[str], options: dict[str, str]) -> None:
    """Print the help of a verb without settings when it is asked for; refuse whatever else is left."""
    if {"--help", "-h"} & set(words):
        print(f"usage: glasshouse {usage} [--option value ...]\n")
        print(
            "\n".join(
                f"  {name if name.isupper() else '--' + name:<14} {text}" for name, text in options.items()
            )
        )
        sys.exit(0)
    if words:
        from glasshouse.config import suggest

        names = [name.split()[0] for name in options if not name.isupper()]
        name = words[0].removeprefix("--").partition("=")[0]
        fix = (
            suggest(name, [*names, "help"], "option")
            if words[0].startswith("--")
            else f"write glasshouse {usage}"
        )
        raise InputError(f"unexpected {words[0]!r}", "", fix)


VERBS: dict[str, tuple[str, Callable[[list[str]], int]]] = {
    "demo": ("the whole life of a small model, offline, in minutes", _demo),
    "run": ("every stage of a recipe, in order; finished stages are skipped", _run),
    "prepare": ("text in any form -> a cleaned, tokenized corpus", _prepare),
    "pretrain": ("a corpus -> a language model", _pretrain),
    "finetune": ("a model and examples -> a model that answers like them", _finetune),
    "generate": ("a model and a prompt -> text", _generate),
    "chat": ("talk with a model in this terminal", _chat),
    "translate": (
        "a model trained on pairs and text -> its counterpart; with --references, how good",
        _translate,
    ),
    "evaluate": ("how well a model predicts held-out text, beside a 5-gram baseline", _evaluate),
    "compare": ("two runs, paired, with intervals", _compare),
    "report": ("a run -> its model card", _report),
    "export": ("a model -> GGUF for llama.cpp and Ollama, or ONNX, proved by replaying prompts", _export),
    "serve": ("models over HTTP, by OpenAI's interface, with a page to see through them", _serve),
    "plan": ("predicted memory, time and energy of a recipe, before anything runs", _plan),
}
