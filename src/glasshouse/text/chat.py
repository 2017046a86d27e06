"""Chat templates: how messages become the one text that the model reads.

A template comes with a model, so it is a program that a stranger wrote. It runs in Jinja's sandbox, which keeps it
from the machine but not from its time and memory; so loops, calls, joins and repetitions are counted here, what can
grow a text without end is taken away, and the output has a limit. Knows nothing of tokens but how special ones are
spelled.
"""

import hashlib
import json
import re
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache, wraps
from itertools import pairwise
from typing import Any, NamedTuple, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from glasshouse.errors import InputError

Message = Mapping[str, Any]

CHATML_TEMPLATE = """\
{%- set first = 0 %}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages and messages[0]['role'] == 'system' %}
        {%- set first = 1 %}
        {{- (messages[0]['content'] or '') + '\\n\\n' }}
    {%- endif %}
    {{- '# Tools\\n\\nYou may call one or more of these functions, given as JSON schemas:\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '\\n</tools>\\n\\nWrite each call as a JSON object with its name and arguments:\\n' }}
    {{- '<tool_call>\\n{"name": <name>, "arguments": <arguments>}\\n</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages[first:] %}
    {%- if message['role'] == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + (message['content'] or '') + '\\n</tool_response>' }}
    {%- else %}
        {{- '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') }}
        {%- for call in message['tool_calls'] or [] %}
            {%- set call = call['function'] or call %}
            {{- ('\\n' if message['content'] or not loop.first else '') + '<tool_call>\\n{"name": ' }}
            {{- (call['name'] | tojson) + ', "arguments": ' }}
            {{- call['arguments'] if call['arguments'] is string else call['arguments'] | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

FILTERS = (
    "abs capitalize d default dictsort first float int items last length count list lower map reject rejectattr "
    "reverse round safe select selectattr sort string title trim unique upper"
)
TEXT_METHODS = (
    "capitalize count endswith find index isalnum isalpha isdigit isspace join lower lstrip replace rfind rsplit "
    "rstrip split splitlines startswith strip swapcase title upper removeprefix removesuffix"
)
WHERE = "chat_template"
BORDERED_MESSAGES = 200
"""Longer conversations are not cut where answers begin: each cut costs two more renderings."""

TOTAL_FACTOR = 32
"""How many times the longest text all texts together may be long that a template makes on its way."""


@dataclass(frozen=True)
class RenderLimits:
    """What a template may cost.

    Args:
        template_characters: length of the template.
        output_characters: length of the rendered text, and of any text made on the way.
        operations: loop rounds, calls and joins.
        seconds: time.
    """

    template_characters: int = 256 * 2**10
    output_characters: int = 16 * 2**20
    operations: int = 1_000_000
    seconds: float = 5.0


class _BudgetError(Exception):
    """A template went over a limit."""


class _Generation(Extension):
    """The block in which some templates mark what the assistant wrote: shown as it is."""

    tags = {"generation"}  # noqa: RUF012  (Jinja declares it so)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with a budget for each rendering."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, limits: RenderLimits):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.finalize = self._measure_output
        self._limits = limits
        self.begin()
        self.filters = {name: self._spending(self.filters[name]) for name in FILTERS.split()}
        self.filters["tojson"] = self._spending(_to_json)
        self.filters |= {"join": self._join, "indent": self._indent, "replace": self._replace}
        kept = {name: self.globals[name] for name in ("range", "dict", "namespace")}
        self.globals = kept | {"raise_exception": _refuse, "strftime_now": _now}
        self.globals |= {"__count": self._count, "__join": self._join_texts}

    def begin(self) -> None:
        """A rendering begins, with the whole budget."""
        self._operations = self._characters = 0
        self._deadline = time.monotonic() + self._limits.seconds

    def spend(self, characters: int = 0) -> None:
        """One operation that makes a text of some length.

        Raises:
            _BudgetError: over a limit.
        """
        self._operations += 1
        if self._operations > self._limits.operations or time.monotonic() > self._deadline:
            raise _BudgetError("it takes too long")
        self._characters += characters
        longest = self._limits.output_characters
        if characters > longest or self._characters > TOTAL_FACTOR * longest:
            raise _BudgetError("it makes a text too long")

    def bounded(self, source: str) -> Any:
        """Compile a template whose loops and joins are counted."""
        tree = self.parse(source)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = self._call("__count", [loop.iter], loop.lineno)
        _replace_joins(tree, lambda join: self._call("__join", list(join.nodes), join.lineno))
        return self.from_string(tree)

    def _call(self, name: str, arguments: list[Any], line: int) -> nodes.Expr:
        call = nodes.Call(nodes.Name(name, "load"), arguments, [], None, None)
        call.set_lineno(line)
        call.set_environment(self)
        return call

    def _count(self, values: Iterable[Any]) -> Iterable[Any]:
        if isinstance(values, list | tuple | dict | str | range):
            self._operations += len(
                values
            )  # the loop keeps the sequence itself: loop.length and loop.last need it
            self.spend()
            return values
        return self._count_each(values)

    def _count_each(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.spend()
            yield value

    def _join_texts(self, *values: Any) -> str:
        texts = [str(value) for value in values]
        self.spend(sum(map(len, texts)))
        return "".join(texts)

    def _spending(self, filter: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(filter)  # also carries the mark by which Jinja passes the environment
        def spend_and_filter(*values: Any, **options: Any) -> Any:
            self.spend()
            return filter(*values, **options)

        return spend_and_filter

    def _measure_output(self, value: Any) -> Any:
        """Called on everything the template writes, also into a macro or a block: `{% set x %}{{ x }}{{ x }}...`."""
        self.spend(len(value) if isinstance(value, str) else 0)
        return value

    def _join(self, values: Iterable[Any], d: str = "", attribute: Any = None) -> str:
        items = values if attribute is None else [self.getitem(item, attribute) for item in values]
        texts = [str(item) for item in items]
        self.spend(sum(map(len, texts)) + len(str(d)) * len(texts))
        return str(d).join(texts)

    def _indent(self, text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        lines = str(text).split("\n")
        margin = width if isinstance(width, str) else " " * min(max(width, 0), 1000)
        self.spend(len(str(text)) + len(margin) * len(lines))
        rest = [margin + line if line or blank else line for line in lines[1:]]
        return "\n".join([margin + lines[0] if first else lines[0], *rest])

    def _replace(self, text: Any, old: Any, new: Any, count: int | None = None) -> str:
        self._measure_replace(str(text), str(old), str(new))
        return str(text).replace(str(old), str(new), -1 if count is None else count)

    def _measure_replace(self, text: str, old: str, new: str) -> None:
        self.spend(len(text) + len(new) * text.count(old))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Texts keep the methods that templates use; those that pad or format without end are gone."""
        if isinstance(obj, str | bytes) and attr not in TEXT_METHODS.split():
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`"{:>1000000000}".format(1)`: a width is a size that nothing here could measure."""
        if isinstance(value, types.BuiltinMethodType) and value.__name__ in ("format", "format_map"):
            raise SecurityError("formatting with format() is not available")
        return None

    def call(self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Every call in the template passes here."""
        self.spend()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str) and __obj.__name__ == "replace" and len(args) > 1:
            self._measure_replace(owner, str(args[0]), str(args[1]))
        if isinstance(owner, str) and __obj.__name__ == "join" and args:
            args = ([str(item) for item in args[0]],)
            self.spend(sum(len(item) + len(owner) for item in args[0]))
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Operators that can make something large from something small."""
        sizes = [len(side) for side in (left, right) if isinstance(side, str | list | tuple)]
        self.spend(sum(sizes))
        if operator == "%" and isinstance(left, str):
            raise SecurityError("formatting with % is not available")
        if operator == "**" and not (abs(left) < 2**32 and abs(right) < 64):
            raise _BudgetError("it makes a number too large")
        if operator == "*":
            numbers = [side for side in (left, right) if isinstance(side, int)]
            self.spend(sizes[0] * max(0, *numbers) if sizes and numbers else 0)
            if any(abs(number) > 2**256 for number in numbers):
                raise _BudgetError("it makes a number too large")
        return super().call_binop(context, operator, left, right)


def _replace_joins(node: nodes.Node, make: Any) -> None:
    """Replace every `a ~ b` below a node."""
    for name, value in list(node.iter_fields()):
        if isinstance(value, nodes.Node):
            _replace_joins(value, make)
            if isinstance(value, nodes.Concat):
                setattr(node, name, make(value))
        elif isinstance(value, list):
            for child in value:
                if isinstance(child, nodes.Node):
                    _replace_joins(child, make)
            setattr(node, name, [make(item) if isinstance(item, nodes.Concat) else item for item in value])


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    """JSON as transformers writes it in templates: not escaped for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=None if indent is None else min(indent, 16))


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern[:100])


class _Renderer:
    """A template compiled once, which takes longer than a rendering; one rendering at a time has its budget."""

    def __init__(self, template: str, limits: RenderLimits):
        if len(template) > limits.template_characters:
            raise InputError(
                f"longer than {limits.template_characters:,} characters", WHERE, "use a shorter template"
            )
        self._limits, self._lock = limits, threading.Lock()
        self._environment = _Environment(limits)
        try:
            self._compiled = self._environment.bounded(template)
        except (TemplateError, RecursionError) as error:
            raise InputError(
                f"the chat template is not valid: {error}", WHERE, "use the template the model came with"
            ) from None

    def render(self, given: Mapping[str, Any]) -> str:
        """The text of a template given these names."""
        try:
            with self._lock:
                return self._join(given)
        except _BudgetError as error:
            raise InputError(
                f"the chat template was stopped: {error}", WHERE, "use another template"
            ) from None
        except (TemplateError, RecursionError) as error:
            raise InputError(
                f"the chat template refuses: {error}", WHERE, "check the messages, or the template"
            ) from None
        except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, MemoryError) as error:
            raise InputError(
                f"the chat template fails on these messages: {error}", WHERE, "give each a role and a content"
            ) from None

    def _join(self, given: Mapping[str, Any]) -> str:
        self._environment.begin()
        pieces, size = [], 0
        for piece in self._compiled.generate(**given):
            size += len(piece)
            if size > self._limits.output_characters:
                raise _BudgetError("it makes a text too long")
            pieces.append(piece)
        return "".join(pieces)


@lru_cache(maxsize=8)
def _renderer(template: str, limits: RenderLimits) -> _Renderer:
    return _Renderer(template, limits)


def render(
    template: str,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    limits: RenderLimits | None = None,
    names: Mapping[str, Any] | None = None,
) -> str:
    """Render messages with a model's own template, as transformers does.

    Args:
        template: Jinja source; only ever the model's own, never part of a request.
        messages: {"role", "content", ...}, oldest first.
        tools: JSON schemas of functions the model may call.
        add_generation_prompt: end with the beginning of an assistant's turn.
        limits: what the template may cost.
        names: further names the template may use, such as bos_token.

    Raises:
        InputError: the template is not valid, forbids these messages, or goes over a limit.
    """
    given = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
    return _renderer(template, limits or RenderLimits()).render({**(names or {}), **given})


class Segment(NamedTuple):
    """A piece of a rendered conversation.

    Args:
        text: what is written.
        special: whether it is a special token, written by the template itself.
        answer: whether it is the assistant's: what a model writes after the beginning of its turn.
    """

    text: str
    special: bool
    answer: bool


def render_segments(
    template: str,
    messages: Sequence[Message],
    special: Iterable[str],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    names: Mapping[str, Any] | None = None,
) -> list[Segment]:
    """Render messages into pieces of text and special tokens, the latter only where the template itself wrote them.

    A message that spells a special token keeps it as text: its spellings are replaced by numbers that occur nowhere
    before the template runs, and put back afterwards. A piece ends where an assistant's answer begins, as it did when
    the model was asked for that answer: so the same conversation has the same tokens in training and in serving.

    Args:
        template: the model's own.
        messages: see `render`.
        special: spellings of the special tokens.
        tools: see `render`.
        add_generation_prompt: see `render`.
        names: see `render`.

    Returns:
        The pieces in order; their texts joined are what `render` gives.
    """
    mask = _Mask(special, json.dumps([messages, tools], default=str))
    hidden, hidden_tools = mask.hide(messages), mask.hide(tools)

    def rendered(count: int, prompt: bool) -> str:
        return render(template, hidden[:count], hidden_tools, prompt, names=names)

    text = rendered(len(messages), add_generation_prompt)
    answers = _answers(hidden, rendered, text)
    borders = sorted({0, len(text), *(border for answer in answers for border in answer)})
    return [
        segment
        for start, stop in pairwise(borders)
        for segment in mask.segments(text[start:stop], (start, stop) in answers)
    ]


def _answers(messages: Any, rendered: Callable[[int, bool], str], text: str) -> set[tuple[int, int]]:
    """Where the assistant's answers begin and end in the text of a conversation.

    An answer begins where the text of the messages before it, ended by the beginning of an assistant's turn, ends. A
    template that writes earlier messages otherwise once later ones follow has no such place for them.
    """
    found: set[tuple[int, int]] = set()
    for number, message in enumerate(messages if len(messages) <= BORDERED_MESSAGES else ()):
        if not isinstance(message, Mapping) or message.get("role") != "assistant":
            continue
        try:
            before, whole = rendered(number, True), rendered(number + 1, False)
        except InputError:
            continue
        if len(before) < len(whole) and text.startswith(whole) and whole.startswith(before):
            found.add((len(before), len(whole)))
    return found


class _Mask:
    """Spellings of special tokens inside messages, replaced by numbers while the template runs."""

    def __init__(self, special: Iterable[str], everything: str):
        self._spellings = sorted(special, key=len, reverse=True)
        self._found = re.compile("|".join(map(re.escape, self._spellings)) or r"(?!)")
        digest = hashlib.sha256(everything.encode("utf-8", "replace")).hexdigest()
        stem = str(int(digest, 16))[:40]
        self._masked = {text: f"{stem}{number:04d}" for number, text in enumerate(self._spellings)}
        self._unmask = re.compile(f"{stem}([0-9]{{4}})")

    def hide(self, value: Any) -> Any:
        """The same value without any spelling."""
        if isinstance(value, str):
            return self._found.sub(lambda match: self._masked[match.group()], value)
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        return [self.hide(item) for item in value] if isinstance(value, list | tuple) else value

    def segments(self, text: str, answer: bool) -> Iterator[Segment]:
        """The pieces of a rendered text, with the spellings back in their places."""
        start = 0
        for match in [*self._found.finditer(text), None]:
            piece = text[start : match.start() if match else len(text)]
            if piece:
                plain = self._unmask.sub(lambda found: self._spellings[int(found.group(1))], piece)
                yield Segment(plain, False, answer)
            if match:
                yield Segment(match.group(), True, answer)
                start = match.end()
