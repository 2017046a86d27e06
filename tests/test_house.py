"""The rules of the house: floors, cycles, sizes, names, docstrings, declared dependencies, the tree in the README."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "glasshouse"
FILES = sorted(PACKAGE.rglob("*.py"))
EVERYONE = {"errors", "files"}
"""Modules that everyone may import: how to refuse, and how to write whole files."""
PEERS = {"litgpt", "llama_cpp", "ctranslate2"}
"""What benchmarks compare with, where somebody installed it in an environment of its own."""
IMPORTERS = {"import_module", "require_library", "importorskip"}
"""Functions that import what their first argument names."""
STAGES = {
    "text.prepare",
    "training.pretrain",
    "training.finetune",
    "training.sequences",
    "evaluation.evaluate",
} | {
    "training.session"  # what the stages that train share
}
FLOORS = {
    "errors": set(),
    "files": set(),
    "config": set(),
    "device": set(),
    "run": {"config"},
    "stage": {"run", "config"},
    "models": set(),
    "corpus": set(),
    "text": {"corpus", "config", "run", "device"},
    "artifact": {"models", "text", "config"},
    "adapter": {"models"},
    "tasks": {"text"},
    "inference": {"models", "artifact", "text", "device"},
    "training": {
        "corpus",
        "text",
        "models",
        "artifact",
        "adapter",
        "tasks",
        "inference",
        "run",
        "device",
        "config",
    },
    "evaluation": {"inference", "tasks", "text", "artifact", "run", "device", "config"},
    "interpret": {"inference", "artifact", "models", "text", "device"},
    "export": {"inference", "artifact", "models", "text", "device"},
    "serve": {"inference", "interpret", "tasks", "artifact", "models", "text", "device"},
    "card": set(),
    "report": {"run", "card"},
    "forecast": {"training", "corpus", "text", "device"},
    "demo": {"run", "artifact", "inference", "evaluation", "text", "device"},
    "cli": {
        "config",
        "run",
        "stage",
        "device",
        "artifact",
        "text",
        "models",
        "inference",
        "training",
        "evaluation",
        "interpret",
        "export",
        "serve",
        "tasks",
    }
    | {"report", "demo", "forecast"},
    "__main__": {"cli"},
}
"""Folder or top-level module -> what of ours it may import, besides itself and what everyone may."""


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module named in an import, dotted."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the floor they come from"
            yield node.module or ""
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in IMPORTERS:
            yield from (item.value for item in node.args[:1] if isinstance(item, ast.Constant))


def own_imports(path: Path) -> set[str]:
    """The modules of ours that a file imports, without the package's name."""
    names = {module_name(other) for other in FILES}
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "glasshouse":
            base = node.module.removeprefix("glasshouse").lstrip(".")
            for alias in node.names:
                longer = f"{base}.{alias.name}".lstrip(".")
                found.add(longer if longer in names else base)
        elif isinstance(node, ast.Import):
            found |= {
                a.name.removeprefix("glasshouse.") for a in node.names if a.name.startswith("glasshouse.")
            }
    return found


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def public_functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Public functions of a module and public methods of its public classes."""
    for node in tree.body:
        scope = node.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_") else [node]
        for item in scope:
            if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef) and not item.name.startswith("_"):
                yield item


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    spec = function.args
    stars = [star for star in (spec.vararg, spec.kwarg) if star]
    names = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, *stars]
    return [name for name in names if name.arg not in ("self", "cls")]


each_file = pytest.mark.parametrize("path", FILES, ids=[module_name(path) for path in FILES])


@each_file
def test_imports_point_down(path: Path):
    name = module_name(path)
    floor = name.split(".")[0]
    if path.name == "__init__.py":
        return
    assert floor in FLOORS, f"{floor} is a new floor; the design must know it first"
    allowed = FLOORS[floor] | EVERYONE | {floor}
    for other in own_imports(path):
        assert other.split(".")[0] in allowed, f"{name} may not import {other}"
        if other.split(".")[0] in ("config", "run") and "." in name:
            assert name in STAGES, f"{name} is no stage: it may not import {other}"


def test_no_import_cycles():
    graph = {module_name(path): own_imports(path) for path in FILES}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import cycle: {' -> '.join((*trail, name))}"
        if name not in done:
            for other in graph.get(name, set()):
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@each_file
def test_no_imports_of_ours_inside_functions(path: Path):
    if path == PACKAGE / "cli.py":
        return
    for function in functions(tree_of(path)):
        for name in imported(function):
            assert not name.startswith("glasshouse"), f"{function.name} imports {name}"


@each_file
def test_sizes(path: Path):
    tree = tree_of(path)
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= 500, f"{lines} lines"
    for function in functions(tree):
        length = function.end_lineno - function.lineno + 1
        assert length <= 60, f"{function.name} has {length} lines"
        assert len(parameters(function)) <= 8, f"{function.name} has {len(parameters(function))} parameters"


def test_folders():
    folders = [
        folder
        for folder in (PACKAGE, *PACKAGE.rglob("*"))
        if folder.is_dir() and folder.name != "__pycache__"
    ]
    for folder in folders:
        modules = [path for path in folder.glob("*.py") if not path.name.startswith("__")]
        assert len(modules) <= 12, f"{folder.name} has {len(modules)} modules"
        if modules:
            assert len(folder.relative_to(PACKAGE).parts) <= 1, f"{folder} is a third level"
            assert (folder / "__init__.py").is_file()
    for path in FILES:
        assert path.stem not in ("utils", "util", "common", "helpers", "misc", "base", "core"), path


def test_init_files_are_empty():
    for path in PACKAGE.rglob("__init__.py"):
        if path.parent != PACKAGE:
            assert path.read_text() == "", path
    tops = [
        ast.unparse(node) for node in tree_of(PACKAGE / "__init__.py").body if not isinstance(node, ast.Expr)
    ]
    assert len(tops) <= 6, "the top __init__ exports a handful of names"


@each_file
def test_habits_this_house_does_without(path: Path):
    tree = tree_of(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "hasattr", f"line {node.lineno}: hasattr"
        if isinstance(node, ast.ClassDef):
            assert not re.search(r"Trainer|Registry|Callback|BaseConfig", node.name), node.name
    for function in functions(tree):
        kwarg = (
            None if function.args.vararg else function.args.kwarg
        )  # a wrapper of any function passes all on
        for call in (node for node in ast.walk(function) if isinstance(node, ast.Call) and kwarg):
            passed = [
                word.value.id
                for word in call.keywords
                if word.arg is None and isinstance(word.value, ast.Name)
            ]
            assert kwarg.arg not in passed, f"{function.name} passes **{kwarg.arg} through"


@each_file
def test_docstrings_and_types(path: Path):
    tree = tree_of(path)
    if path.name == "__init__.py":
        return
    assert ast.get_docstring(tree), "no module docstring"
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"class {node.name} has no docstring"
    for function in public_functions(tree):
        decorators = {ast.unparse(item) for item in function.decorator_list}
        if "overload" not in decorators:
            assert ast.get_docstring(function), f"{function.name} has no docstring"
        assert function.returns is not None, f"{function.name} does not say what it returns"
        bare = [item.arg for item in parameters(function) if item.annotation is None]
        assert not bare, f"{function.name}: no types for {bare}"


def declared() -> dict[str, set[str]]:
    """Distribution names in pyproject.toml: "core" and one set per extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {"core": project["dependencies"], **project["optional-dependencies"]}
    return {name: {normal(re.match(r"[\w.-]+", line)[0]) for line in lines} for name, lines in groups.items()}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def third_party(files: list[Path], local: set[str] = frozenset()) -> set[str]:
    """The distributions that some files import."""
    dotted = {name for path in files for name in imported(tree_of(path))}
    names = {name.split(".")[0] for name in dotted}
    names |= {"tensorboard"} if "torch.utils.tensorboard" in dotted else set()
    names -= set(sys.stdlib_module_names) | {"glasshouse", ""} | local
    installed = packages_distributions()
    missing = {name for name in names if name not in installed}
    assert not missing, f"imported but not installed: {missing}"
    return {normal(installed[name][0]) for name in names}


def test_declared_dependencies_are_the_imported_ones():
    groups = declared()
    usable = set().union(*(names for extra, names in groups.items() if extra != "dev"))
    assert third_party(FILES) == usable


def test_dev_dependencies_are_used():
    files = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    local = {path.stem for path in files} | {"tests", "benchmarks"} | PEERS
    groups = declared()
    used = third_party(files, local) | {"ruff", "pyright", "pytest-xdist"}  # the Makefile calls them
    assert groups["dev"] <= used, f"declared for dev but not used: {groups['dev'] - used}"
    everything = set().union(*groups.values())
    assert used <= everything, f"used by tests but not declared: {used - everything}"


def test_constraints_pin_every_declared_dependency():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {normal(line.split("==")[0]): line for line in lines if line and not line.startswith("#")}
    groups = declared()
    for extra in ("core", "corpus", "export", "hub", "report", "dev"):
        assert groups[extra] <= set(pins), f"{extra}: not pinned: {groups[extra] - set(pins)}"
    assert all(re.fullmatch(r"[\w.-]+==[\w.!]+", line) for line in pins.values()), (
        "a pin has no local version (+cpu)"
    )


@pytest.mark.parametrize("readme", ["README.md", "README.zh.md"])
def test_readme_tree_is_the_real_one(readme: str):
    """The fenced block that begins with `src/glasshouse/`: `folder/` or `module.py` at two spaces, with a remark; under
    a folder, at more, its modules by name, with or without an asterisk."""
    blocks = re.findall(r"```\w*\n(src/glasshouse/.*?)```", (ROOT / readme).read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 1, f"{readme} has {len(blocks)} trees"
    shown, folder = set(), ""
    for line in blocks[0].splitlines()[1:]:
        depth, words = len(line) - len(line.lstrip()), line.split()
        if depth == 0:
            break
        if depth == 2:
            folder = words[0]
            shown |= {folder.removesuffix(".py")} if folder.endswith(".py") else set()
        else:
            shown |= {folder.rstrip("/") + "." + word.rstrip("*") for word in words}
    real = {module_name(path) for path in FILES if not path.name.startswith("__")}
    assert shown == real, f"only in {readme}: {sorted(shown - real)}; only in src: {sorted(real - shown)}"


def test_no_private_paths_or_names():
    forbidden = [
        "/" + "work/",
        "/opt/" + "pypi",
        "/opt/" + "wheels",
        "/" + "root/",
        "sk-" + "ant",
        "BRIEF" + ".md",
    ]
    texts = [
        path
        for pattern in ("*.md", "*.py", "*.toml", "*.yaml", "*.txt", "Makefile")
        for path in ROOT.rglob(pattern)
    ]
    for path in texts:
        if {".venv", "runs", "build", ".git"} & set(path.relative_to(ROOT).parts):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        found = [word for word in forbidden if word in text]
        assert not found, f"{path.relative_to(ROOT)} names {found}"
