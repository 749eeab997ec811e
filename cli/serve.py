"""Serve a TokCom model behind OpenAI's completions interface.

    tokcom serve --checkpoint . --port 8000
    curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" \
        -d '{"model": "tokcom", "prompt": "Once upon a time", "max_tokens": 64, "stream": true}'

Notable choices: one thread runs the model, and requests that wait with the same settings are denoised as one batch; every
request has noise of its own, so a seed gives the same text in any company. Listens on the loopback interface unless told
otherwise; `--api_key`, or TOKCOM_API_KEY in the environment, is then asked of every request but /health.
"""

import argparse
import asyncio
import contextlib
import ipaddress
import json
import os
import secrets
import threading
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from huggingface_hub.errors import StrictDataclassError
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from starlette.exceptions import HTTPException

from tokcom.pipeline_tokcom import TokComPiece, TokComPipeline
from tokcom.processing_tokcom import text_ids

GREEDY = 0.01  # what a temperature of 0 means: probabilities of all but the likeliest token vanish
MAX_STOPS, MAX_STOP_LENGTH = 4, 256
Count = Annotated[int, Field(ge=1)]


@dataclass
class ServerSettings:
    """Limits of the server: lengths in tokens, times in seconds, sizes in bytes."""

    model_name: str = "tokcom"
    api_key: str | None = None
    max_batch: int = 32
    max_queue: int = 256
    max_tokens: int = 2048
    max_choices: int = 16
    max_steps: int = 128
    batch_wait: float = 0.01
    timeout: float = 120.0
    max_body: int = 1 << 20


class CompletionRequest(BaseModel):
    """A request as the `openai` client sends it; `num_inference_steps` and `guidance_scale` are TokCom's own."""

    model_config = ConfigDict(extra="forbid")
    model: str | None = None
    prompt: str | list[str]
    max_tokens: Count | None = 16
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Count | None = 1
    stream: bool | None = False
    stream_options: dict | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    echo: bool | None = False
    user: str | None = None
    logprobs: None = None  # fields that clients send without meaning them
    suffix: None = None
    best_of: Literal[1] | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logit_bias: None = None
    num_inference_steps: Count | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=20)] = 1.0

    @field_validator("max_tokens", "n", "stream", "echo", mode="before")
    @classmethod
    def _null_is_the_default(cls, value: object, info: ValidationInfo) -> object:
        return cls.model_fields[info.field_name].default if value is None else value

    @property
    def stops(self) -> list[str]:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [stop for stop in stops if stop]


class RequestError(Exception):
    """What a client is told: an HTTP status, a message and OpenAI's names for the kind of error."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        code: str | None = None,
    ):
        super().__init__(message)
        self.status, self.body = (
            status,
            {"error": {"message": message, "type": kind, "param": None, "code": code}},
        )


def _closing() -> RequestError:
    return RequestError(503, "the server is shutting down.", "server_error")


@dataclass
class Job:
    """One text to write. `pieces` receives every `TokComPiece`, or the exception that ended it."""

    prompt: str
    max_tokens: int
    settings: tuple  # steps, guidance, temperature, top-p; jobs of equal settings and company share a batch
    seed: int
    loop: asyncio.AbstractEventLoop
    company: object = None
    pieces: asyncio.Queue = field(default_factory=asyncio.Queue)
    cancelled: bool = False

    def put(self, item: TokComPiece | Exception) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, item)


class Engine:
    """Runs the model in a thread of its own and denoises waiting jobs of equal settings together."""

    def __init__(self, pipe: TokComPipeline, settings: ServerSettings):
        self.pipe, self.settings = pipe, settings
        self.waiting: deque[Job] = deque()
        self.changed, self.closed, self.batches, self.running = threading.Condition(), False, 0, 0
        self.thread = threading.Thread(target=self._run, name="tokcom", daemon=True)
        self.thread.start()

    def submit(self, jobs: list[Job]) -> None:
        """Queue all of `jobs` or, if there is no room, none: then raises `RequestError`."""
        with self.changed:
            if self.closed:
                raise _closing()
            self.waiting = deque(job for job in self.waiting if not job.cancelled)
            if len(self.waiting) + len(jobs) > self.settings.max_queue:
                limit = self.settings.max_queue
                raise RequestError(
                    429, f"more than {limit} texts would wait; try again later.", "rate_limit_error"
                )
            self.waiting.extend(jobs)
            self.changed.notify_all()

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        self.thread.join(10)
        for job in self.waiting:
            job.put(_closing())

    def _next_batch(self) -> list[Job]:
        with self.changed:
            self.changed.wait_for(lambda: self.waiting or self.closed)
            if self.closed:
                return []
            first = self.waiting[0]

            def fitting() -> list[Job]:
                return [
                    job
                    for job in self.waiting
                    if (job.settings, job.company) == (first.settings, first.company)
                ]

            self.changed.wait_for(
                lambda: self.closed or len(fitting()) >= self.settings.max_batch,
                self.settings.batch_wait,
            )
            batch = fitting()[: self.settings.max_batch]
            taken = {id(job) for job in batch}
            self.waiting = deque(job for job in self.waiting if id(job) not in taken)
            return batch

    def _run(self) -> None:
        while not self.closed:
            batch = [job for job in self._next_batch() if not job.cancelled]
            if not batch:
                continue
            self.running = len(batch)
            try:
                self._write(batch)
            except Exception as error:  # told to the clients; the server goes on
                for job in batch:
                    job.put(error)
            self.running = 0

    def _write(self, batch: list[Job]) -> None:
        self.batches += 1
        steps, guidance_scale, temperature, top_p = batch[0].settings
        generators = [torch.Generator().manual_seed(job.seed) for job in batch]
        prompts, lengths = [job.prompt for job in batch], [job.max_tokens for job in batch]
        finished = [False] * len(batch)

        def should_stop() -> bool:
            return self.closed or all(done or job.cancelled for done, job in zip(finished, batch))

        settings = steps, guidance_scale, temperature, top_p, generators, should_stop
        stream = self.pipe.stream_batch(prompts, lengths, *settings)
        for pieces in stream:
            for i, (job, piece) in enumerate(zip(batch, pieces)):
                if not finished[i] and (piece.text or piece.finish_reason):
                    job.put(piece)
                finished[i] = finished[i] or piece.finish_reason is not None
            if should_stop():
                break
        for done, job in zip(finished, batch):
            if not done:  # nobody listens, or the server ends
                job.put(_closing())


class Choice:
    """The text of one job as it grows, cut at a stop sequence."""

    def __init__(self, job: Job, stops: list[str]):
        self.job, self.stops, self.text, self.shown, self.tokens, self.finish_reason = (
            job,
            stops,
            "",
            0,
            0,
            None,
        )

    async def grow(self) -> str:
        """Wait for the next piece and return what can be shown of it: the beginning of a stop sequence is held back."""
        piece = await self.job.pieces.get()
        if isinstance(piece, Exception):
            raise piece
        self.text += piece.text
        self.tokens, self.finish_reason = piece.tokens, piece.finish_reason
        ends = [self.text.find(stop) for stop in self.stops if stop in self.text]
        if ends:
            self.text, self.finish_reason, self.job.cancelled = self.text[: min(ends)], "stop", True
        held = 0
        if self.finish_reason is None:
            ends = ((stop, range(1, min(len(stop), len(self.text) + 1))) for stop in self.stops)
            held = max(
                (n for stop, sizes in ends for n in sizes if self.text.endswith(stop[:n])),
                default=0,
            )
        end = max(self.shown, len(self.text) - held)
        new, self.shown = self.text[self.shown : end], end
        return new


def _jobs(request: CompletionRequest, pipe: TokComPipeline, settings: ServerSettings) -> list[Job]:
    """What the request asks for, checked; raises `RequestError`."""
    prompts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise RequestError(400, "`prompt` must hold at least one text, and none may be empty.")
    for text in [*prompts, *request.stops]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(400, f"a text is not valid Unicode ({error}).") from error
    if len(request.stops) > MAX_STOPS or any(len(stop) > MAX_STOP_LENGTH for stop in request.stops):
        raise RequestError(
            400, f"`stop` takes {MAX_STOPS} sequences of at most {MAX_STOP_LENGTH} characters."
        )
    if (request.num_inference_steps or 1) > settings.max_steps:
        steps = request.num_inference_steps
        raise RequestError(
            400,
            f"`num_inference_steps` ({steps}) is above this server's limit of {settings.max_steps}.",
        )
    if len(prompts) * request.n > settings.max_choices:
        wanted = len(prompts) * request.n
        raise RequestError(
            400,
            f"{wanted} texts are more than the {settings.max_choices} of one request; send several.",
        )
    if request.max_tokens > settings.max_tokens:
        raise RequestError(
            400,
            f"`max_tokens` ({request.max_tokens}) is above this server's limit of {settings.max_tokens}.",
        )
    if request.model not in (None, settings.model_name):
        message = (
            f"the model {request.model!r} does not exist; this server has {settings.model_name!r}."
        )
        raise RequestError(404, message, code="model_not_found")
    ids = text_ids(pipe.tokenizer, [p.rstrip(" ") for p in prompts])
    sizes = [len(row) for row in ids]  # as the pipeline reads them
    for size in sizes:
        if size > pipe.max_length:
            message = (
                f"`prompt` has {size} tokens, more than the model's {pipe.max_length}; shorten it."
            )
            raise RequestError(400, message, code="context_length_exceeded")
    temperature = None if request.temperature is None else max(request.temperature, GREEDY)
    sampling = request.num_inference_steps, request.guidance_scale, temperature, request.top_p
    seed = secrets.randbits(32) if request.seed is None else request.seed % 2**63
    loop = asyncio.get_running_loop()
    alone = (
        pipe.model.config.transformer_config.block_size is None
    )  # would see the padding of others
    copies = [(prompt, size) for prompt, size in zip(prompts, sizes) for _ in range(request.n)]
    return [
        Job(
            prompt,
            request.max_tokens,
            sampling,
            seed + i,
            loop,
            (size, request.max_tokens) if alone else None,
        )
        for i, (prompt, size) in enumerate(copies)
    ]


def build_app(pipe: TokComPipeline, settings: ServerSettings) -> FastAPI:
    """The web application: `/v1/completions`, `/v1/models` and `/health`."""
    engine = Engine(pipe, settings)
    created = int(time.time())

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI):
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(
        title="TokCom", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None
    )
    app.state.engine = engine

    @app.exception_handler(RequestError)
    async def explain(request: Request, error: RequestError) -> JSONResponse:
        headers = {"Retry-After": "1"} if error.status == 429 else None
        return JSONResponse(error.body, error.status, headers)

    @app.exception_handler(RequestValidationError)
    async def explain_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = (
            "body"
            if first["type"] == "json_invalid"
            else ".".join(str(part) for part in first["loc"][1:]) or "body"
        )
        return JSONResponse(RequestError(400, f"`{place}`: {first['msg']}").body, 400)

    @app.exception_handler(HTTPException)
    async def explain_others(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(
            RequestError(error.status_code, str(error.detail)).body, error.status_code
        )

    @app.middleware("http")
    async def guard(request: Request, call_next):
        key = settings.api_key
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if (
            key
            and request.url.path != "/health"
            and not secrets.compare_digest(given.encode(), key.encode())
        ):
            error = RequestError(
                401, "the API key is missing or wrong.", "authentication_error", "invalid_api_key"
            )
            return await explain(request, error)
        sized = (
            request.headers.get("content-length", "").isdigit()
            and "transfer-encoding" not in request.headers
        )
        if request.method == "POST" and not sized:
            return await explain(
                request, RequestError(411, "the request must say its Content-Length.")
            )
        if int(request.headers.get("content-length") or 0) > settings.max_body:
            return await explain(
                request, RequestError(413, f"the body is larger than {settings.max_body} bytes.")
            )
        return await call_next(request)

    @app.get("/health")
    async def health() -> dict:
        alive = engine.thread.is_alive()
        return {
            "status": "ok" if alive else "stopped",
            "waiting": len(engine.waiting),
            "running": engine.running,
        }

    @app.get("/v1/models")
    async def models() -> dict:
        entry = {
            "id": settings.model_name,
            "object": "model",
            "created": created,
            "owned_by": "tokcom",
        }
        return {"object": "list", "data": [entry]}

    @app.post("/v1/completions")
    async def completions(request: CompletionRequest, connection: Request):
        jobs = _jobs(request, pipe, settings)
        engine.submit(jobs)
        answer = Answer(request, [Choice(job, request.stops) for job in jobs], pipe, settings)
        if request.stream:
            return StreamingResponse(answer.events(), media_type="text/event-stream")
        return await answer.whole(connection)

    return app


class Answer:
    """A response to one request, whole or as server-sent events; either way its jobs are cancelled when it ends."""

    def __init__(
        self,
        request: CompletionRequest,
        choices: list[Choice],
        pipe: TokComPipeline,
        settings: ServerSettings,
    ):
        self.request, self.choices, self.pipe, self.settings = request, choices, pipe, settings
        self.head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
        }
        self.head["model"] = settings.model_name

    def _choice(self, index: int, text: str, finish_reason: str | None) -> dict:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}

    def _usage(self) -> dict:
        prompts = {choice.job.prompt for choice in self.choices}
        known = sum(len(text_ids(self.pipe.tokenizer, prompt)) for prompt in prompts)
        new = sum(choice.tokens for choice in self.choices)
        return {"prompt_tokens": known, "completion_tokens": new, "total_tokens": known + new}

    async def _grown(self) -> AsyncIterator[tuple[int, str]]:
        """`(index, new text)` of the choices in the order in which they grow, until all are finished."""
        deadline = time.monotonic() + self.settings.timeout
        tasks = {asyncio.ensure_future(choice.grow()): i for i, choice in enumerate(self.choices)}
        try:
            while tasks:
                left = deadline - time.monotonic()
                done, _ = await asyncio.wait(
                    tasks, timeout=max(0.0, left), return_when=asyncio.FIRST_COMPLETED
                )
                if not done:
                    raise RequestError(
                        504, f"not finished within {self.settings.timeout:g} seconds.", "timeout"
                    )
                for task in sorted(done, key=tasks.get):
                    index = tasks.pop(task)
                    new = task.result()
                    if self.choices[index].finish_reason is None:
                        tasks[asyncio.ensure_future(self.choices[index].grow())] = index
                    yield index, new
        finally:
            for task in tasks:
                task.cancel()
            for choice in self.choices:
                choice.job.cancelled = True

    async def whole(self, connection: Request) -> dict:
        async def watch() -> None:
            while not await connection.is_disconnected():
                await asyncio.sleep(0.2)
            for choice in self.choices:  # nobody waits any more
                choice.job.cancelled = True

        watching = asyncio.ensure_future(watch())
        try:
            async for _ in self._grown():
                pass
        except ValueError as error:  # the model refuses a setting
            raise RequestError(400, str(error)) from error
        finally:
            watching.cancel()
        before = [choice.job.prompt if self.request.echo else "" for choice in self.choices]
        choices = [
            self._choice(i, start + choice.text, choice.finish_reason)
            for i, (start, choice) in enumerate(zip(before, self.choices))
        ]
        return {**self.head, "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncIterator[str]:
        try:
            if self.request.echo:
                for i, choice in enumerate(self.choices):
                    yield self._event([self._choice(i, choice.job.prompt, None)])
            async for index, new in self._grown():
                if new or self.choices[index].finish_reason:
                    yield self._event([self._choice(index, new, self.choices[index].finish_reason)])
        except (
            RequestError,
            ValueError,
        ) as error:  # the status line is sent already, so the stream says it
            yield f"data: {json.dumps(error.body if isinstance(error, RequestError) else RequestError(400, str(error)).body)}\n\n"
            return
        finally:
            for choice in self.choices:
                choice.job.cancelled = True
        if (self.request.stream_options or {}).get("include_usage"):
            yield self._event([], usage=self._usage())
        yield "data: [DONE]\n\n"

    def _event(self, choices: list[dict], **more) -> str:
        return f"data: {json.dumps({**self.head, 'choices': choices, **more})}\n\n"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint",
        default=str(Path(__file__).resolve().parents[1]),
        help="model directory or Hub id",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 for all interfaces; give an API key then"
    )
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--api_key", default=os.environ.get("TOKCOM_API_KEY"), help="or TOKCOM_API_KEY"
    )
    defaults = ServerSettings()
    for name in ("max_batch", "max_queue", "max_tokens", "max_choices", "max_steps", "timeout"):
        value = getattr(defaults, name)
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument(
        "--model_name", default=defaults.model_name, help="the name clients ask for"
    )
    return parser


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    names = (
        "model_name",
        "api_key",
        "max_batch",
        "max_queue",
        "max_tokens",
        "max_choices",
        "max_steps",
        "timeout",
    )
    try:
        pipe = TokComPipeline.from_pretrained(args.checkpoint).to(args.device)
    except (ValueError, OSError, StrictDataclassError) as error:
        parser.exit(1, f"error: {error}\n")
    if pipe.tokenizer is None:
        parser.exit(
            1, f"error: {args.checkpoint} has no tokenizer, so there is no text to serve.\n"
        )
    pipe.set_progress_bar_config(disable=True)
    if not is_loopback(args.host) and not args.api_key:
        print(f"warning: {args.host} can be reached from other machines and there is no --api_key.")
    app = build_app(pipe, ServerSettings(**{name: getattr(args, name) for name in names}))
    print(
        f"serving {args.checkpoint} as {args.model_name!r} on http://{args.host}:{args.port}/v1/completions"
    )
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
