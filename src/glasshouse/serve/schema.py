"""What a request may say: every field with its type and its bounds, so that nothing absurd gets past the door.

A field that is not known is refused, as OpenAI does, except those that change nothing here (`user`, `metadata`, ...).
Bounds of numbers are those of inference/sampling.py. Knows nothing of models or of how an answer comes about.
"""

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from glasshouse.inference.sampling import BIAS_BOUNDS, BOUNDS

MOST_MESSAGES, MOST_PARTS, MOST_TOOLS = 2048, 256, 128
MOST_PROMPTS, MOST_INPUTS, MOST_ANSWERS = 128, 512, 16
MOST_LOGPROBS = 20
MOST_TOKENS = int(BOUNDS["max_new_tokens"].high)
LONGEST_STOP = 256
LONGEST_TEXT = 2**22
MOST_BIASES = 1024
DEEPEST = 64
"""Levels of nesting in a value of any form: whoever walks through it later may recurse."""


def _check_any(value: Any) -> Any:
    """A JSON value of any form, not too deep, of numbers and characters that can be written again."""
    left = [(value, 1)]
    while left:
        item, depth = left.pop()
        if depth > DEEPEST:
            raise ValueError(f"nested too deeply: use at most {DEEPEST} levels")
        if isinstance(item, str):
            _check_text(item)
        elif isinstance(item, float) and not math.isfinite(item):
            raise ValueError("NaN and Infinity are no JSON")
        elif isinstance(item, dict):
            left += [(key, depth) for key in item]
            left += [(inner, depth + 1) for inner in item.values()]
        elif isinstance(item, list):
            left += [(inner, depth + 1) for inner in item]
    return value


def _check_text(text: str) -> str:
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"{len(text):,} characters; give at most {LONGEST_TEXT:,}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair is no character") from None
    return text


Text = Annotated[str, Field(max_length=LONGEST_TEXT)]
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
TokenId = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
TokenIds = Annotated[list[TokenId], Field(max_length=MOST_TOKENS)]
Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
Count = Annotated[int, Field(ge=1, le=MOST_ANSWERS, strict=True)]
NewTokens = Annotated[int, Field(ge=1, le=MOST_TOKENS, strict=True)]
Switch = Annotated[bool, Field(strict=True)]
Table = Annotated[dict[str, Any], BeforeValidator(_check_any)]


class Fields(BaseModel):
    """A table of fields, in which an unknown one is an error and a number is a finite number."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Sampling(Fields):
    """How tokens are drawn: the fields that every route which writes text shares."""

    model: str = Field(min_length=1, max_length=1000, description="The name of a model that is served.")
    temperature: float | None = Field(None, ge=0, le=2, description="0 takes the likeliest; 1 by default.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=BOUNDS["top_k"].high, strict=True, description="0 for all.")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=BOUNDS["repetition_penalty"].low, le=1000)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1, strict=True, description="Random without one.")
    stream: Switch | None = False
    user: str | None = Field(None, max_length=1000, description="Ignored.")
    metadata: Table | None = Field(None, max_length=16, description="Ignored.")
    service_tier: str | None = Field(None, max_length=100, description="Ignored.")
    safety_identifier: str | None = Field(None, max_length=1000, description="Ignored.")
    prompt_cache_key: str | None = Field(
        None, max_length=1000, description="Ignored: a prefix is found by itself."
    )


class StreamOptions(Fields):
    """What a stream says besides."""

    include_usage: Switch | None = False
    include_obfuscation: Switch | None = Field(False, description="Ignored: nothing is padded.")


def _as_list(value: Any) -> Any:
    """One text or several, as a list."""
    return [value] if isinstance(value, str) else value


Stops = Annotated[
    list[Stop],
    Field(max_length=4, json_schema_extra={"description": "A string, or up to 4 of them."}),
    BeforeValidator(_as_list, json_schema_input_type=str | list[str]),
]


def _check_bias(value: Any) -> Any:
    """Token ids as JSON has them (text) -> numbers; refused with their bounds."""
    if value is None or not isinstance(value, dict):
        return value
    if len(value) > MOST_BIASES:
        raise ValueError(f"{len(value):,} entries; give at most {MOST_BIASES:,}")
    for name, bias in value.items():
        if not (str(name).isascii() and str(name).isdigit() and len(str(name)) < 10):
            raise ValueError(f"{str(name)[:40]!r} is no token id")
        if not BIAS_BOUNDS.admit(bias):
            raise ValueError(f"the bias of token {name} must be a number {BIAS_BOUNDS}")
    return value


class Writing(Sampling):
    """What chat and completion share beyond the drawing of tokens."""

    n: Count | None = Field(1, description="Answers per prompt.")
    stop: Stops | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[dict[int, float] | None, BeforeValidator(_check_bias)] = Field(
        None, description=f"Token id -> bias from -100 to 100; at most {MOST_BIASES:,}."
    )
    stream_options: StreamOptions | None = None
    return_token_ids: Switch | None = Field(False, description="Also give the ids of prompt and answer.")

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> "Writing":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only allowed together with stream")
        return self


Prompt = list[str] | list[list[int]]


def _check_prompt(value: Any) -> Any:
    """The four forms of a prompt, as a list of texts or of lists of token ids."""
    message = "give a text, a list of texts, a list of token ids, or a list of lists of token ids"
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise ValueError(message)
    if value and all(type(item) is int for item in value):
        value = [value]
    if not value:
        raise ValueError("an empty list; " + message)
    if len(value) > MOST_INPUTS:
        raise ValueError(f"{len(value):,} entries; give at most {MOST_INPUTS}")
    if not all(value):
        raise ValueError("an empty text; leave prompt out to begin a document")
    if all(isinstance(item, str) for item in value):
        return [_check_text(item) for item in value]
    if not all(isinstance(item, list) and all(type(token) is int for token in item) for item in value):
        raise ValueError(message)
    if any(len(item) > MOST_TOKENS for item in value):
        raise ValueError(f"give at most {MOST_TOKENS:,} tokens")
    if any(min(item) < 0 for item in value):
        raise ValueError("a token's number is at least 0")
    return value


Prompts = Annotated[
    Prompt,
    BeforeValidator(_check_prompt, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]


class CompletionRequest(Writing):
    """A text to continue: POST /v1/completions."""

    prompt: Prompts | None = Field(None, description="Without one, a document is begun.")
    max_tokens: int | None = Field(16, ge=0, le=MOST_TOKENS, strict=True, description="0 only with echo.")
    best_of: Count | None = Field(None, description="Write so many and give the n likeliest.")
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS, strict=True, description="Alternatives shown.")
    echo: Switch | None = Field(False, description="Give the prompt back, with its odds where logprobs asks.")
    suffix: str | None = Field(None, max_length=1000, description="Not supported: must be empty.")

    @model_validator(mode="after")
    def _fits_together(self) -> "CompletionRequest":
        if self.suffix:
            raise ValueError("suffix: nothing is filled in here; leave it out")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 only makes sense with echo; give 1 or more")
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise ValueError("best_of: give n or more")
        if self.best_of is not None and self.best_of > (self.n or 1) and self.stream:
            raise ValueError("best_of: the best cannot be known while it is streamed; leave out stream")
        if len(self.prompt or [""]) * (self.best_of or self.n or 1) > MOST_PROMPTS:
            raise ValueError(f"prompt: prompts times answers must be at most {MOST_PROMPTS}")
        return self


class Part(BaseModel):
    """A part of a message: text. Anything that would have to be fetched or decoded is refused by name."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(max_length=100)
    text: Text | None = None
    refusal: Text | None = None

    @model_validator(mode="after")
    def _is_text(self) -> "Part":
        kinds = ("text", "input_text", "output_text", "refusal")
        if self.type not in kinds:
            raise ValueError("this server reads text only and never fetches a URL; give a part of type text")
        if (self.text if self.type != "refusal" else self.refusal) is None:
            raise ValueError("the part has no text")
        return self

    @property
    def content(self) -> str:
        """Its text."""
        return self.text or self.refusal or ""


Parts = Annotated[list[Part], Field(max_length=MOST_PARTS)]


def _check_content(value: Any) -> Any:
    """A text stays; a list of parts is read as parts; anything else is refused in one sentence."""
    if value is None or isinstance(value, str | list):
        return value
    raise ValueError("give a text, or a list of parts of type text")


Content = Annotated[
    Text | Parts | None, BeforeValidator(_check_content, json_schema_input_type=str | Parts | None)
]


class Call(Fields):
    """A function and its arguments, as JSON text."""

    name: Name
    arguments: Text


class ToolCall(BaseModel):
    """A call that the assistant made earlier in the conversation."""

    model_config = ConfigDict(extra="ignore")

    id: str = Field(max_length=256)
    type: Literal["function"] = "function"
    function: Call


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    name: str | None = Field(None, max_length=256)
    refusal: Text | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MOST_TOOLS)] | None = None
    tool_call_id: str | None = Field(None, max_length=256)

    @model_validator(mode="after")
    def _says_something(self) -> "Message":
        if self.content is None and not (self.role == "assistant" and (self.tool_calls or self.refusal)):
            raise ValueError("content: a message needs one; only an assistant's with tool_calls does not")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls: only an assistant's message has them")
        return self

    @property
    def text(self) -> str:
        """Its content as one text."""
        if isinstance(self.content, list):
            return "".join(part.content for part in self.content)
        return self.content or self.refusal or ""


class Function(Fields):
    """A function that the model may call."""

    name: Name
    description: Text | None = None
    parameters: Table | None = Field(None, description="A JSON schema of its arguments.")
    strict: Switch | None = None


class Tool(Fields):
    """A tool: a function."""

    type: Literal["function"]
    function: Function


class NamedFunction(Fields):
    """The name of a function."""

    name: Name


class NamedTool(Fields):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Fields):
    """The schema an answer must follow."""

    name: Name
    description: Text | None = None
    schema_: Table = Field(default_factory=dict, alias="schema")
    strict: Switch | None = None


class ResponseFormat(Fields):
    """The form of an answer: any text, a JSON object, or JSON that follows a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema: give it with type json_schema, and only then")
        return self


class ChatRequest(Writing):
    """A conversation to go on with: POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_tokens: NewTokens | None = None
    max_completion_tokens: NewTokens | None = Field(None, description="The newer name of max_tokens.")
    logprobs: Switch | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS, strict=True)
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: Switch | None = Field(None, description="false: at most one call is given.")
    response_format: ResponseFormat | None = None
    reasoning_effort: str | None = Field(None, max_length=100, description="Ignored.")
    verbosity: str | None = Field(None, max_length=100, description="Ignored.")
    store: Literal[False] | None = Field(None, description="Nothing is stored here.")
    modalities: list[Literal["text"]] | None = Field(None, max_length=1)

    @model_validator(mode="after")
    def _fits_together(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only allowed with logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise ValueError("max_tokens: give it or max_completion_tokens, not both")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise ValueError("tool_choice: there are no tools to choose from")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) != len(names):
            raise ValueError("tools: two have the same name")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError("tool_choice: it names none of the tools")
        formatted = self.response_format is not None and self.response_format.type != "text"
        if formatted and self.tools and self.tool_choice != "none":
            raise ValueError("response_format: cannot be together with tools; leave out one of them")
        return self


class EmbeddingRequest(Fields):
    """Texts to turn into vectors: POST /v1/embeddings."""

    model: str = Field(min_length=1, max_length=1000)
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: int | None = Field(
        None, ge=1, le=2**20, strict=True, description="Only the model's own width."
    )
    user: str | None = Field(None, max_length=1000, description="Ignored.")


class TokenizeRequest(Fields):
    """A text or a conversation whose tokens are asked for: POST /tokenize."""

    model: str | None = Field(None, max_length=1000, description="Needed where several are served.")
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    add_special_tokens: Switch = Field(True, description="With the begin token, as /v1/completions reads it.")
    add_generation_prompt: Switch = True
    return_token_strs: Switch | None = False

    @model_validator(mode="after")
    def _one_of_both(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: give exactly one of prompt and messages")
        return self


class DetokenizeRequest(Fields):
    """Tokens whose text is asked for: POST /detokenize."""

    model: str | None = Field(None, max_length=1000, description="Needed where several are served.")
    tokens: TokenIds
