"""The routes: each takes a checked request, has it answered by the module whose business it is, and gives it back.

Every error leaves as OpenAI's error object. Knows which path is whose; nothing of engines or of sockets.
"""

import base64
import re
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from glasshouse.artifact import Artifact
from glasshouse.errors import InputError
from glasshouse.inference.embedding import embed_tokens
from glasshouse.serve.completions import (
    Plan,
    chat_events,
    completion_events,
    plain_messages,
    plain_tools,
    plan_chat,
    plan_completion,
    whole_chat,
    whole_completion,
)
from glasshouse.serve.explain import explain_routes
from glasshouse.serve.guard import describe_fault
from glasshouse.serve.metrics import Line, Metrics
from glasshouse.serve.models import House, Served
from glasshouse.serve.openai import ApiError, api_error, describe_models, server_sent, to_json, unsupported
from glasshouse.serve.responses import Record, ResponsesRequest, chat_request, response_events, whole_response
from glasshouse.serve.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from glasshouse.serve.stream import EventStream, Job, unless_gone
from glasshouse.text.reading import read_text

PAGE = Path(__file__).parent / "page"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".webmanifest": "application/manifest+json",
}
PROMPT_NAMES = {"/v1/chat/completions": "messages", "/v1/responses": "input", "/v1/embeddings": "input"}
"""What a route calls what the engine calls the prompt."""
RESPONSES_NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
}
"""What /v1/responses calls the fields of a chat, which it is turned into."""


class ErrorFacts(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """OpenAI's error object."""

    error: ErrorFacts


ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request cannot be answered."},
    "5XX": {"model": ErrorBody, "description": "The server cannot answer now."},
}
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, "text/event-stream": {}}, "description": "The answer."}
}


class Json(JSONResponse):
    """JSON as the rest of the server writes it."""

    def render(self, content: Any) -> bytes:
        """Encode it."""
        return to_json(content)


def create_app(house: House, metrics: Metrics) -> FastAPI:
    """The application, without its door.

    Args:
        house: the models.
        metrics: what is counted.
    """
    app = FastAPI(
        title="Glasshouse",
        summary="Language models you can see through, by the interface of OpenAI's clients",
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
        responses=ERRORS,
        default_response_class=Json,
    )
    _add_errors(app)
    _add_facts(app, house, metrics)
    _add_writing(app, house, metrics)
    _add_texts(app, house, metrics)

    def find(name: str) -> Artifact:
        return house.find(name).artifact

    app.include_router(explain_routes(find))
    _add_page(app)
    return app


# ---- errors


def _add_errors(app: FastAPI) -> None:
    async def refuse(request: HttpRequest, error: Exception) -> Response:
        path = request.url.path
        if isinstance(error, RequestValidationError | ValidationError):
            found = validation_error(error.errors())
        elif isinstance(error, HTTPException):
            found = ApiError(error.status_code, str(error.detail), None, _word(error.status_code))
        else:
            found = api_error(error, PROMPT_NAMES.get(path, "prompt"))
        if path == "/v1/responses" and found.param is not None:
            field = found.param.partition("[")[0].partition(".")[0]
            found.param = RESPONSES_NAMES.get(field, field) + found.param[len(field) :]
        line: Line = request.state.line
        line.note(code=found.code or "", param=found.param or "")
        if found.status == 500:
            line.note(error=describe_fault(error))
        headers = {**(getattr(error, "headers", None) or {}), **found.headers}
        return Json(found.body, status_code=found.status, headers=headers)

    for kind in (RequestValidationError, ValidationError, HTTPException, ApiError, InputError, Exception):
        app.add_exception_handler(kind, refuse)


def _word(status: int) -> str:
    return {404: "not_found", 405: "method_not_allowed", 415: "unsupported_media_type"}.get(
        status, "bad_request"
    )


TYPE_MISMATCHES = ("_type", "_parsing", "literal_error", "string_unicode")
LOCATION = re.compile(r"[a-z][a-z0-9_]*")
BRANCHES = ("body", "str", "int", "float", "bool", "schema_")
"""Words in pydantic's locations that are no field of a request."""


def validation_error(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The refusal of a request whose fields are not what they must be: names one field, and what it may be.

    Args:
        errors: as pydantic lists them. Of the branches of a union the one that came furthest is shown.
    """
    first = min(errors, key=lambda error: (str(error["type"]).endswith(TYPE_MISMATCHES), -len(error["loc"])))
    param = ""
    for part in first["loc"]:
        if isinstance(part, int):
            param += f"[{part}]"
        elif LOCATION.fullmatch(part) and part not in BRANCHES:
            param += f".{part}" if param else part
    message = str(first["msg"]).removeprefix("Value error, ")
    named = re.match(r"([a-z_]+): ", message)
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['ctx']['error']}", None, "invalid_json")
    if named:
        param, message = (f"{param}.{named[1]}" if param else named[1]), message[named.end() :]
    if first["type"] == "model_attributes_type" and not param:
        return ApiError(400, "send a JSON object with Content-Type: application/json", None, "not_json")
    words = {"extra_forbidden": "is not a field of this request", "missing": "is missing"}
    message = f"{param or 'the request'}: {words.get(first['type'], message)}"
    return ApiError(400, message, param or None, str(first["type"]))


# ---- facts


def _add_facts(app: FastAPI, house: House, metrics: Metrics) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the process lives."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        """Whether requests are answered."""
        if house.phase != "ready":
            raise ApiError(503, f"the server is {house.phase}", None, house.phase, retry_after=5)
        return {"status": "ready"}

    @app.get("/metrics", responses={200: {"content": {"text/plain": {}}}})
    async def figures() -> Response:
        """Figures for Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The models that are served."""
        return describe_models([served.description() for served in house.models.values()])

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One of them."""
        return house.find(name).description()


# ---- writing


def _add_writing(app: FastAPI, house: House, metrics: Metrics) -> None:
    @app.post("/v1/chat/completions", responses=STREAMED)
    async def chat(body: ChatRequest, request: HttpRequest) -> Response:
        """Go on with a conversation."""
        served = house.find(body.model)
        plan = await house.in_thread(plan_chat, served, body)
        job = Job(house, served, plan.requests, metrics)
        if body.stream:
            return _streamed(request, job, plan, chat_events(job, plan, body, served))
        return await _whole(request, job, plan, whole_chat(job, plan, body, served))

    @app.post("/v1/completions", responses=STREAMED)
    async def complete(body: CompletionRequest, request: HttpRequest) -> Response:
        """Continue a text."""
        served = house.find(body.model)
        plan = await house.in_thread(plan_completion, served, body)
        job = Job(house, served, plan.requests, metrics)
        if body.stream:
            return _streamed(request, job, plan, completion_events(job, plan, body, served))
        return await _whole(request, job, plan, whole_completion(job, plan, body, served))

    @app.post("/v1/responses", responses=STREAMED)
    async def respond(body: ResponsesRequest, request: HttpRequest) -> Response:
        """Go on with a conversation, by the newer interface; nothing is stored."""
        served, asked = house.find(body.model), chat_request(body)
        plan = await house.in_thread(plan_chat, served, asked)
        job, record = Job(house, served, plan.requests, metrics), Record(body, served, plan, asked)
        if body.stream:
            return _streamed(request, job, plan, response_events(job, record), says_errors=True)
        return await _whole(request, job, plan, whole_response(job, record))


async def _whole(
    request: HttpRequest, job: Job, plan: Plan, work: Coroutine[Any, Any, dict[str, Any]]
) -> Response:
    """The answer in one piece; its work is dropped when the client leaves."""
    try:
        _begin(request, job, plan)
        return Json(await unless_gone(request, work))
    finally:
        work.close()
        request.state.line.note(tokens=job.count)
        job.close()


def _streamed(
    request: HttpRequest, job: Job, plan: Plan, events: AsyncIterator[bytes], says_errors: bool = False
) -> Response:
    """The answer as events. What goes wrong from here on is the last of them."""
    _begin(request, job, plan)
    return EventStream(_with_error(events, request, job, says_errors), job, request.state.line)


def _begin(request: HttpRequest, job: Job, plan: Plan) -> None:
    """Note what is asked and give it to the engine."""
    line: Line = request.state.line
    line.note(model=job.model, prompt_tokens=plan.prompt_tokens)
    if job.house.log_prompts:
        texts = [job.tokenizer.decode(prompt, keep_special=True) for prompt in plan.prompts]
        line.note(prompt=" | ".join(texts))
    job.submit()
    job.metrics.tokens.labels(job.model, "read").inc(plan.prompt_tokens)


async def _with_error(
    events: AsyncIterator[bytes], request: HttpRequest, job: Job, said: bool
) -> AsyncIterator[bytes]:
    """The events; what fails on the way is the last of them, and is counted and logged."""
    try:
        async for event in events:
            yield event
    except Exception as error:
        found = api_error(error, PROMPT_NAMES.get(request.url.path, "prompt"))
        line: Line = request.state.line
        line.note(
            failed=found.code or "", **({"error": describe_fault(error)} if found.status == 500 else {})
        )
        job.metrics.errors.labels(request.url.path, found.kind).inc()
        if not said:
            yield server_sent(found.body)


# ---- texts and tokens


def _add_texts(app: FastAPI, house: House, metrics: Metrics) -> None:
    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest, request: HttpRequest) -> dict[str, Any]:
        """Texts as vectors of length one."""
        served = house.find(body.model)
        answer = await house.in_thread(_embed, served, body)
        request.state.line.note(model=served.name, prompt_tokens=answer["usage"]["prompt_tokens"])
        metrics.tokens.labels(served.name, "embedded").inc(answer["usage"]["prompt_tokens"])
        return answer

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """The tokens of a text or a conversation."""
        served = house.find(body.model)
        return await house.in_thread(_tokenize, served, body)

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        """The text of tokens."""
        tokenizer = house.find(body.model).artifact.tokenizer
        if max(body.tokens, default=0) >= tokenizer.vocab_size:
            message = f"token {max(body.tokens)} in a vocabulary of {tokenizer.vocab_size:,}"
            raise ApiError(400, message, "tokens", "invalid_value")
        return {"prompt": await house.in_thread(tokenizer.decode, body.tokens, True)}


def _embed(served: Served, body: EmbeddingRequest) -> dict[str, Any]:
    artifact = served.artifact
    width = artifact.config.embedding_dim
    if body.dimensions not in (None, width):
        raise unsupported("dimensions", f"the vectors of {served.name} have {width} numbers: leave it out")
    begin = [artifact.tokenizer.end_of_document]
    rows = [
        read_text(artifact.tokenizer, item).ids or begin if isinstance(item, str) else item
        for item in body.input
    ]
    vectors = embed_tokens(artifact.model, rows)
    data = [
        {"object": "embedding", "index": index, "embedding": _encode(vector, body.encoding_format)}
        for index, vector in enumerate(vectors.numpy())
    ]
    count = sum(map(len, rows))
    spent = {"prompt_tokens": count, "total_tokens": count}
    return {"object": "list", "model": served.name, "data": data, "usage": spent}


def _encode(vector: np.ndarray, form: str | None) -> list[float] | str:
    """A vector as numbers, or as the base64 of its little-endian float32."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode() if form == "base64" else vector.tolist()


def _tokenize(served: Served, body: TokenizeRequest) -> dict[str, Any]:
    tokenizer = served.artifact.tokenizer
    if body.messages is not None:
        tools = plain_tools(body.tools or [])
        ids = tokenizer.encode_chat(plain_messages(body.messages), tools, body.add_generation_prompt)
    else:
        text = body.prompt or ""
        ids = tokenizer.prompt(text) if body.add_special_tokens else tokenizer.encode(text)
    shape = {"count": len(ids), "max_model_len": served.context_length, "tokens": ids}
    texts = (
        [tokenizer.decode([token], keep_special=True) for token in ids] if body.return_token_strs else None
    )
    return {**shape, "token_strs": texts}


# ---- the page


def _add_page(app: FastAPI) -> None:
    """The files of the page, by name: they are read once, so no path from outside is ever looked up."""
    files = {path.name: path for path in sorted(PAGE.glob("*")) if path.suffix in MEDIA_TYPES}
    contents = {name: (path.read_bytes(), MEDIA_TYPES[path.suffix]) for name, path in files.items()}

    async def show(name: str) -> Response:
        if name not in contents:
            raise ApiError(404, "there is no such page", None, "not_found")
        data, media_type = contents[name]
        return Response(data, media_type=media_type, headers={"cache-control": "no-cache"})

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        """The page."""
        return await show("index.html")

    @app.get("/{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        """A file of the page."""
        return await show(name)
