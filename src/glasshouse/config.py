"""YAML and command-line options -> one frozen, strict, typed config per stage. Knows no stage and no verb.

A recipe is one YAML file with a `name` and one key per stage; a stage's config is a frozen dataclass whose docstring
documents each field. jsonargparse checks the types and writes the help; this module says what is wrong in one line,
where it came from (an option, or a key of a file), and what was probably meant.
"""

import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import SUPPRESS, ArgumentError, ArgumentParser

from glasshouse.errors import InputError

STAGES = ("prepare", "pretrain", "finetune", "evaluate")
RECIPE_BYTES_LIMIT = 2**20
TRUTHS = ("true", "false", "yes", "no")

Config = TypeVar("Config")


def parse_config(
    config_class: type[Config],
    arguments: list[str],
    stage: str,
    *,
    given: Mapping[str, Any] | None = None,
    options: Mapping[str, str] | None = None,
) -> Config:
    """Build the config of one stage from `--field value` options, over a `--config` file, over the defaults.

    Args:
        config_class: a frozen dataclass; its docstring's Args section is the help.
        arguments: the words of the command line that belong to the stage: `--field value`, `--list a b c`,
            `--switch`, `--config FILE`, `--print_config`, `--help`.
        stage: the verb, which is also the stage's key in a recipe.
        given: values set by the caller, below the file and the options.
        options: other options of the verb, like "out RUN", and its positional words, like "MODEL", with one line of
            help each; only shown, never parsed here.

    Raises:
        InputError: an unknown or repeated option, an unknown key, or a value of the wrong type.
        SystemExit: after `--help` or `--print_config`, with code 0.
    """
    hints = field_types(config_class)
    words = split_options(arguments, hints)
    if "help" in words:
        print(_help(config_class, stage, options or {}), end="")
        sys.exit(0)
    print_config = words.pop("print_config", None) is not None
    values, origins = dict(given or {}), {}
    for file in words.pop("config", []):
        for name, value in _read_stage(find_recipe(Path(file)), stage).items():
            values[name], origins[name] = value, f"{file}: {stage}.{name}"
    for name, value in words.items():
        values[name], origins[name] = value, f"--{name}"
    config = build_config(config_class, values, origins, [*hints, *_option_names(options or {})])
    if print_config:
        print(yaml.safe_dump({stage: config_to_dict(config)}, sort_keys=False, allow_unicode=True), end="")
        sys.exit(0)
    return config


def build_config(
    config_class: type[Config],
    values: Mapping[str, Any],
    origins: Mapping[str, str] | None = None,
    known: Iterable[str] = (),
) -> Config:
    """Build one config from plain values, strictly.

    Args:
        config_class: a frozen dataclass.
        values: field name -> value as YAML gives it, or as the text typed on the command line.
        origins: field name -> where the value was written, for the error message.
        known: further names to suggest for an unknown one.

    Raises:
        InputError: an unknown field, a wrong type, or a required field that is missing.
    """
    hints, origins = field_types(config_class), origins or {}
    for name in values:
        if name not in hints:
            where = origins.get(name, name)
            kind = "option" if where.startswith("--") else "key"
            shown = f"--{name}" if kind == "option" else repr(name)
            raise InputError(
                f"unknown {kind} {shown}",
                "" if kind == "option" else where,
                suggest(name, known or hints, kind),
            )
    checked = {
        name: _check(hints[name], value, origins.get(name, name), name, config_class)
        for name, value in values.items()
    }
    for item in dataclasses.fields(typing.cast(Any, config_class)):
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and item.name not in checked:
            raise InputError(
                f"--{item.name} is missing", "", f"add --{item.name} {_describe(hints[item.name])}"
            )
    return config_class(**checked)


def config_to_dict(config: Any) -> dict[str, Any]:
    """The fields of a config as plain YAML values: paths as text, tuples as lists."""
    return {item.name: _plain(getattr(config, item.name)) for item in dataclasses.fields(config)}


def read_recipe(path: Path) -> dict[str, dict[str, Any]]:
    """Read a recipe: stage name -> its values, in the order written.

    Raises:
        InputError: no such file, not YAML (with the line), or a key that is neither `name` nor a stage.
    """
    content = _read_yaml(Path(path))
    for key, value in content.items():
        if key == "name":
            if not isinstance(value, str):
                raise InputError("a recipe's name must be text", f"{path}: name", "write name: my_model")
        elif key not in STAGES:
            raise InputError(
                f"unknown stage {key!r}", f"{path}: {key}", suggest(str(key), ["name", *STAGES], "stage")
            )
        elif value is not None and not isinstance(value, dict):
            raise InputError(
                f"{value!r} is not a table of settings", f"{path}: {key}", "write one `field: value` per line"
            )
    stages = {key: value or {} for key, value in content.items() if key != "name"}
    if not stages:
        raise InputError("the recipe has no stages", str(path), f"add at least one of {', '.join(STAGES)}")
    return stages


def find_recipe(path: Path) -> Path:
    """The file at a path, or else the recipe of that name that ships: "demo" and "recipes/demo.yaml" both find it.

    Raises:
        InputError: there is neither.
    """
    if path.exists():
        return path
    here = Path(__file__).resolve().parent
    folders = [folder for folder in (here / "recipes", here.parents[1] / "recipes") if folder.is_dir()]
    shipped = {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}
    if path.parent in (Path(), Path("recipes")) and path.suffix in ("", ".yaml") and path.stem in shipped:
        return shipped[path.stem]
    raise InputError(
        "no such file", str(path), f"check the path; the recipes that ship are {', '.join(shipped)}"
    )


def recipe_name(path: Path) -> str:
    """The `name` of a recipe, or its file's name without the ending."""
    return str(_read_yaml(Path(path)).get("name") or Path(path).stem)


def suggest(word: str, known: Iterable[str], kind: str) -> str:
    """What was probably meant by an unknown word: "did you mean ...?", or the list of what there is."""
    names = list(dict.fromkeys(known))
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    dashes = "--" if kind == "option" else ""
    if close:
        return f"did you mean {dashes}{close[0]}?"
    return f"known: {', '.join(dashes + name for name in names)}"


def field_types(config_class: type) -> dict[str, Any]:
    """Field name -> type of a dataclass, in order."""
    hints = typing.get_type_hints(config_class)
    return {item.name: hints[item.name] for item in dataclasses.fields(config_class)}


def split_options(arguments: list[str], hints: Mapping[str, Any]) -> dict[str, Any]:
    """Split command-line words into option -> text, or a list of texts for a field that takes several.

    Args:
        arguments: the words.
        hints: field name -> type: says which options take one word, several, or none.

    Raises:
        InputError: a stray word, a missing value or an option given twice.
    """
    options: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "-h":
            word = "--help"
        if not word.startswith("--") or word == "--":
            raise InputError(
                f"unexpected {word!r}", "", "options are written --name value; --help lists them"
            )
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        values = [value] if equals else []
        several = name == "config" or _takes_several(hints.get(name))
        while rest and not rest[0].startswith("--") and not equals and (several or not values):
            if not several and (
                name in ("help", "print_config") or (_is_switch(hints.get(name)) and not _is_truth(rest[0]))
            ):
                break
            values.append(rest.pop(0))
        if name in options:
            raise InputError(f"--{name} is given twice", "", "give it once, with all its values after it")
        if not values and _is_switch(hints.get(name)):
            values = ["true"]
        if not values and name in (*hints, "config"):
            raise InputError(f"--{name} needs a value", "", f"give {_describe(hints.get(name, Path))}")
        options[name] = values if several else (values or [""])[0]
    return options


def _read_stage(path: Path, stage: str) -> dict[str, Any]:
    """The values of one stage from a recipe, or from a flat file that holds nothing but them."""
    content = _read_yaml(path)
    if not any(
        key == "name" or (key in STAGES and isinstance(value, dict | None)) for key, value in content.items()
    ):
        return content
    stages = read_recipe(path)
    if stage not in stages:
        raise InputError(
            f"the recipe has no {stage!r} part", str(path), f"it has {', '.join(stages)}; add a {stage!r} key"
        )
    return stages[stage]


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a key written twice is an error, not a silent choice of the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is written twice", key_node.start_mark
                )
            seen.add(key if isinstance(key, str) else None)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > RECIPE_BYTES_LIMIT:
            raise InputError("too large for a recipe", str(path), "give a YAML file of settings")
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except OSError as error:
        raise InputError(f"cannot read the recipe: {error.strerror}", str(path), "check the path") from None
    except UnicodeDecodeError:
        raise InputError("not a text file in UTF-8", str(path), "give a YAML file of settings") from None
    except RecursionError:
        raise InputError("nested too deeply", str(path), "give a YAML file of settings") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"{path}, line {mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error)
        raise InputError(f"not valid YAML: {problem}", line, "mend that line") from None
    if not isinstance(content, dict):
        raise InputError("no settings in it", str(path), "write one `key: value` per line")
    return {str(key): value for key, value in content.items()}


def _check(hint: Any, value: Any, where: str, name: str, config_class: type) -> Any:
    """The value in the field's type, or an InputError that says what was expected."""
    if _takes_several(hint) and isinstance(value, str):
        value = [value]
    wrong = InputError(f"{value!r} is not {_describe(hint)}", where, _mend(hint, value))
    if value is None and type(None) not in typing.get_args(hint) and hint is not Any:
        raise wrong
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    try:
        return parser.parse_object({"value": value})["value"]
    except ArgumentError:
        raise wrong from None


def _help(config_class: type, stage: str, options: Mapping[str, str]) -> str:
    positional = [name for name in options if name.isupper()]
    usage = " ".join(["glasshouse", stage, *positional, "[--field value ...]"])
    parser = ArgumentParser(prog=f"glasshouse {stage}", add_help=False, usage=usage)
    group = parser.add_argument_group("options of the command")
    for name, text in {
        **options,
        "config FILE": "a recipe, or a file of these fields; options override it",
        "print_config": "print the resolved settings as a recipe and stop",
        "help": "this text",
    }.items():
        option, _, value = name.partition(" ")
        if name in positional:
            group.add_argument(name, nargs="?", default=SUPPRESS, help=text)
        elif value:
            group.add_argument(f"--{option}", metavar=value, default=SUPPRESS, help=text)
        else:
            group.add_argument(f"--{option}", action="store_true", default=SUPPRESS, help=text)
    parser.add_class_arguments(config_class, None)
    return parser.format_help()


def _option_names(options: Mapping[str, str]) -> list[str]:
    names = [name.split()[0] for name in options if not name.isupper()]
    return [*names, "config", "print_config", "help"]


def _takes_several(hint: Any) -> bool:
    return any(typing.get_origin(part) in (list, tuple) for part in (hint, *typing.get_args(hint)))


def _is_switch(hint: Any) -> bool:
    return hint is bool or (bool in typing.get_args(hint) and not _takes_several(hint))


def _is_truth(word: str) -> bool:
    return word.lower() in TRUTHS


NAMES = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    Path: "a path",
    type(None): "null",
}


def _describe(hint: Any) -> str:
    """A type in words: "a whole number", "one of nano, tiny", "a list of paths"."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint in NAMES:
        return NAMES[hint]
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(part) for part in parts)
    if origin in (list, tuple):
        return f"a list, each {_describe(parts[0])}" if parts else "a list"
    if origin is dict or hint is dict:
        return "a table of `key: value`"
    return f"a {getattr(hint, '__name__', hint)}"


def _mend(hint: Any, value: Any) -> str:
    choices = [
        str(part)
        for kind in (hint, *typing.get_args(hint))
        if typing.get_origin(kind) is typing.Literal
        for part in typing.get_args(kind)
    ]
    close = difflib.get_close_matches(str(value), choices, n=1)
    if close:
        return f"did you mean {close[0]}?"
    if hint is str and not isinstance(value, str):
        return "put it in quotes"
    return "give another value"


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value
