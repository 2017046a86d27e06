"""The shapes that OpenAI's clients read: errors, usage, log-probabilities, ids, JSON and server-sent events.

Values in, plain JSON values out. Knows tokens and their odds; nothing of sockets, routes or models.
"""

import json
import math
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from glasshouse.errors import InputError
from glasshouse.inference.request import QueueFull, Token
from glasshouse.text.tokenizer import Tokenizer

LEAST_LOG_PROBABILITY = -9999.0
"""Shown where a probability is too small for its logarithm to be a number that JSON can hold; OpenAI shows the same."""
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    411: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    499: "client_closed_request",
    500: "server_error",
    503: "unavailable_error",
    504: "timeout_error",
}
"""HTTP status -> the type of an error object."""
RETRY_SECONDS = 2


class ApiError(Exception):
    """A request that gets an error object for an answer.

    Args:
        status: HTTP status.
        message: one line: what is wrong and what to do about it.
        param: the field of the request that is to blame, like "messages[0].content".
        code: a word that programs compare.
        retry_after: seconds after which trying again makes sense.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, " ".join(message.split()), param, code
        self.retry_after = retry_after

    @property
    def kind(self) -> str:
        """OpenAI's type of it."""
        return TYPES.get(self.status, "server_error")

    @property
    def body(self) -> dict[str, Any]:
        """The error object."""
        facts = {"message": self.message, "type": self.kind}
        return {"error": {**facts, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """What the answer's header says besides."""
        return {} if self.retry_after is None else {"retry-after": str(self.retry_after)}


def api_error(error: BaseException, prompt: str = "prompt") -> ApiError:
    """The error object for whatever went wrong.

    Args:
        error: what was raised. Only an InputError's text is shown: it is written for whoever asked.
        prompt: the request's own name for what the engine calls its prompt.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(429, "too many requests wait: try again later", None, "queue_full", RETRY_SECONDS)
    if isinstance(error, InputError):
        where = error.where.removeprefix("--")
        where = prompt if where == "prompt" else FIELDS.get(where, where)
        message = error.what + (f": {error.fix}" if error.fix else "")
        code = "context_length_exceeded" if "reads at most" in error.what else "invalid_value"
        return ApiError(400, message, where or None, code)
    return ApiError(500, "an error inside the server; its log says more", None, "internal_error")


FIELDS = {"max_new_tokens": "max_tokens", "chat_template": "messages", "chat_template.jinja": "messages"}
"""Names of ours -> the request's field that they come from."""


def unsupported(param: str, message: str) -> ApiError:
    """The refusal of something that OpenAI's interface knows and this server does not do."""
    return ApiError(400, message, param, "unsupported_value")


def new_id(prefix: str) -> str:
    """An id that is not used twice, like "chatcmpl-4f3a...": 96 random bits."""
    return f"{prefix}{secrets.token_hex(12)}"


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())


def to_json(value: Any) -> bytes:
    """JSON in UTF-8, as text rather than escapes; what is no number or no character never gets in."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


def server_sent(value: Any, event: str = "") -> bytes:
    """One server-sent event; JSON holds no line breaks, so it is one line."""
    return (b"event: " + event.encode() + b"\n" if event else b"") + b"data: " + to_json(value) + b"\n\n"


DONE = b"data: [DONE]\n\n"
PING = b": still here\n\n"


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """What a request cost, in tokens."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def log_probability(probability: float) -> float:
    """The natural logarithm, or the least value shown."""
    return max(math.log(probability), LEAST_LOG_PROBABILITY) if probability > 0 else LEAST_LOG_PROBABILITY


def token_name(tokenizer: Tokenizer, token: int) -> str:
    """A token's spelling; one that is no whole character is written as OpenAI does: bytes:\\xf0\\x9f."""
    if not tokenizer.byte_level:
        return tokenizer.decode([token], keep_special=True)
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _ranked(token: Token) -> list[tuple[int, float]]:
    """The alternatives of a token as (id, log-probability), its own among them with exactly the same number."""
    own = log_probability(token.probability)
    return [
        (other.id, own if other.id == token.id else log_probability(other.probability))
        for other in token.alternatives
    ]


def chat_logprob(tokenizer: Tokenizer, token: Token) -> dict[str, Any]:
    """The log-probabilities of one token of a chat: its own and its alternatives', with `token_id` besides."""

    def entry(number: int, logprob: float | None) -> dict[str, Any]:
        data = list(tokenizer.token_bytes(number))
        return {
            "token": token_name(tokenizer, number),
            "logprob": logprob,
            "bytes": data,
            "token_id": number,
        }

    top = [entry(number, logprob) for number, logprob in _ranked(token)]
    own = None if math.isnan(token.probability) else log_probability(token.probability)
    return {**entry(token.id, own), "top_logprobs": top}


def completion_logprobs(
    tokenizer: Tokenizer, tokens: Sequence[Token], texts: Sequence[str], offset: int = 0, ids: bool = False
) -> dict[str, Any]:
    """The log-probabilities of a completion: lists that run along the tokens.

    Args:
        tokenizer: names them.
        tokens: in order; one that nothing precedes has a probability that is not a number and gets null.
        texts: what each added to the text.
        offset: characters before the first.
        ids: whether the same is given once more in the form of a chat, with token ids (an extension).
    """
    places, place = [], offset
    for text in texts:
        places.append(place)
        place += len(text)
    own = [None if math.isnan(token.probability) else log_probability(token.probability) for token in tokens]
    tops: list[dict[str, float] | None] = []
    for token, logprob in zip(tokens, own, strict=True):
        top = {token_name(tokenizer, number): value for number, value in _ranked(token)}
        tops.append(None if logprob is None else {token_name(tokenizer, token.id): logprob, **top})
    shape: dict[str, Any] = {
        "tokens": [token_name(tokenizer, token.id) for token in tokens],
        "token_logprobs": own,
        "top_logprobs": tops,
        "text_offset": places,
    }
    return shape | ({"content": [chat_logprob(tokenizer, token) for token in tokens]} if ids else {})


def finish_reason(finish: str) -> str:
    """OpenAI's word for why an answer ended; the engine's "end" (the model closed it) and "stop" are both "stop"."""
    return "length" if finish == "length" else "stop"


def describe_models(models: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The list of models."""
    return {"object": "list", "data": list(models)}
