"""Serve a TokCom model behind OpenAI's completions and chat interfaces.

    tokcom serve --checkpoint . --port 8000
    curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" \
        -d '{"model": "tokcom", "prompt": "Once upon a time", "max_tokens": 64, "stream": true}'

Notable choices: one thread runs the model and gives all requests their turns (`fair_turns.py`),
another one reads requests (`openai_format.py`), so the event loop only passes pieces of text on;
every text has noise of its own, so a seed gives the same text in any company. Listens on the
loopback interface unless told otherwise; `--api_key`, or TOKCOM_API_KEY in the environment, is then
asked of every request but /health. docs/serving.md describes what it understands and what it was
measured to do.
"""

import argparse
import asyncio
import contextlib
import copy
import gc
import ipaddress
import json
import logging
import math
import secrets
import signal
import socket
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokcom.cli.fair_turns import Engine, Job, Piece, RequestError, Scores
from tokcom.cli.loading import open_pipeline, speed_up
from tokcom.cli.logprobs import ScoredText, TokenTexts
from tokcom.cli.openai_format import (
    ChatFormat,
    ChatRequest,
    CompletionFormat,
    CompletionRequest,
    Prompt,
    answer_head,
    explain_invalid,
    read_request,
)
from tokcom.cli.server_settings import LIMITS, ServerSettings
from tokcom.pipeline_tokcom import TokComPipeline

logger = logging.getLogger("tokcom.serve")


class ClientLeft(Exception):
    """The connection is closed; there is nobody to answer."""


class Choice:
    """The text of one job as it grows, cut at a stop sequence."""

    def __init__(self, job: Job, stops: list[str], prompt: Prompt | None = None):
        self.job = job
        self.stops = stops
        self.prompt = prompt
        self.text = ""
        self.shown = 0
        self.tokens = 0
        self.finish_reason: str | None = None
        self.scores: Scores | None = None
        # a space that ends the prompt is the one that the first new word brings along
        self._drops_space = prompt is not None and prompt.drops_space
        self.dropped = 0  # characters

    async def grow(self) -> str:
        """Wait for the next piece and return what can be shown of it: the beginning of a stop
        sequence is held back."""
        piece: Piece | Exception = await self.job.pieces.get()
        if isinstance(piece, Exception):
            raise piece
        new = piece.text
        if self._drops_space and new:
            self.dropped = int(new.startswith(" "))
            new = new[self.dropped :]
            self._drops_space = False
        self.text += new
        self.tokens = piece.tokens
        self.finish_reason = piece.finish_reason
        self.scores = piece.scores
        ends = [self.text.find(stop) for stop in self.stops if stop in self.text]
        # scores are computed when a text is complete, so a scored one is written to its end and cut
        # then
        if ends and (self.job.num_logprobs is None or piece.finish_reason):
            self.text = self.text[: min(ends)]
            self.finish_reason = "stop"
            # the rest of the text would be computed for nobody
            self.job.cancelled = True
        held = 0 if self.finish_reason else self._held()
        # never backwards: what was sent cannot be taken back
        end = max(self.shown, len(self.text) - held)
        shown = self.text[self.shown : end]
        self.shown = end
        return shown

    def _held(self) -> int:
        """Length of the longest end of the text with which a stop sequence begins."""
        longest = 0
        for stop in self.stops:
            # less than the whole stop sequence, which `grow` has looked for
            for count in range(1, min(len(stop), len(self.text) + 1)):
                if self.text.endswith(stop[:count]):
                    longest = max(longest, count)
        return longest


def as_request_error(error: Exception) -> RequestError:
    """What a client is told about an exception that ended its text."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, ValueError):  # the model refuses a setting
        return RequestError(400, str(error))
    return RequestError(
        500, "the server failed to write this text; its log says why.", "server_error"
    )


class Answer:
    """A response to one request, whole or as server-sent events; either way its jobs are cancelled
    when it ends."""

    def __init__(
        self,
        request: CompletionRequest | ChatRequest,
        choices: list[Choice],
        prompt_tokens: int,
        settings: ServerSettings,
        connection: Request,
    ):
        self.request = request
        self.choices = choices
        self.prompt_tokens = prompt_tokens
        self.timeout = settings.timeout
        self.connection = connection
        self.form = ChatFormat if isinstance(request, ChatRequest) else CompletionFormat
        # the same id and time in all events of a stream
        self.head = answer_head(self.form, bool(request.stream), settings.model_name)
        self.echoes = bool(getattr(request, "echo", False))

    def _usage(self) -> dict:
        new = sum(choice.tokens for choice in self.choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self.prompt_tokens + new,
        }

    async def _client_leaves(self) -> None:
        """Returns when the client closes the connection; it has sent everything before."""
        while (await self.connection.receive())["type"] != "http.disconnect":
            pass

    async def _grown(self) -> AsyncIterator[tuple[int, str]]:
        """`(index, new text)` of the choices in the order in which they grow, until all are
        finished.

        Raises `ClientLeft` as soon as the client does, and `RequestError` after the timeout or when
        a text failed.
        """
        deadline = self.choices[0].job.deadline
        leaves = asyncio.ensure_future(self._client_leaves())
        tasks = {asyncio.ensure_future(choice.grow()): i for i, choice in enumerate(self.choices)}
        try:
            while tasks:
                left = max(0.0, deadline - time.monotonic())
                # the client's leaving is one of the things waited for, so no text is written for
                # nobody
                done, _ = await asyncio.wait(
                    {*tasks, leaves}, timeout=left, return_when=asyncio.FIRST_COMPLETED
                )
                if leaves in done:
                    raise ClientLeft
                if not done:
                    message = f"not finished within {self.timeout:g} seconds; ask for fewer tokens."
                    raise RequestError(504, message, "timeout")
                # in the order of the choices, so that answers do not depend on which task woke
                # first
                for task in sorted(done, key=tasks.get):
                    index = tasks.pop(task)
                    try:
                        new = task.result()
                    except Exception as error:
                        raise as_request_error(error) from error
                    if self.choices[index].finish_reason is None:
                        tasks[asyncio.ensure_future(self.choices[index].grow())] = index
                    yield index, new
        finally:
            leaves.cancel()
            for task in tasks:
                task.cancel()
            # also after an error in one of them: all belong to one answer
            for choice in self.choices:
                choice.job.cancelled = True

    async def whole(self, texts: TokenTexts, reader: ThreadPoolExecutor) -> JSONResponse:
        """The complete answer; `reader` is the thread that may use the tokenizer."""
        try:
            async for _ in self._grown():
                pass
        except ClientLeft:
            return JSONResponse(None, 499)  # sent to nobody
        # tokenizing takes milliseconds, during which the event loop would serve nobody
        make = asyncio.get_running_loop().run_in_executor
        choices = await make(reader, self._whole_choices, texts)
        return JSONResponse({**self.head, "choices": choices, "usage": self._usage()})

    def _whole_choices(self, texts: TokenTexts) -> list[dict]:
        choices = []
        for i, choice in enumerate(self.choices):
            text = choice.prompt.text + choice.text if self.echoes else choice.text
            logprobs = None
            if choice.scores is not None:
                # without `echo` the prompt's tokens are not part of the answer
                start = 0 if self.echoes else len(choice.job.ids)
                # with `echo` the prompt shows the space that was dropped
                dropped = 0 if self.echoes else choice.dropped
                scored = ScoredText.of(choice.scores, start, text, texts, dropped)
                logprobs = self.form.logprobs(scored, texts, choice.job.num_logprobs)
            choices.append(
                {
                    "index": i,
                    **self.form.whole(text),
                    "logprobs": logprobs,
                    "finish_reason": choice.finish_reason,
                }
            )
        return choices

    async def events(self) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        try:
            for i, choice in enumerate(self.choices):
                first = self.form.first(choice.prompt.text if self.echoes else "")
                if first is not None:
                    yield self._event([self._chunk(i, first, None)])
            async for index, new in self._grown():
                reason = self.choices[index].finish_reason
                if new or reason:
                    yield self._event([self._chunk(index, self.form.piece(new), reason)])
        except ClientLeft:
            return
        except RequestError as error:  # the status line is sent already, so the stream says it
            yield f"data: {json.dumps(error.body)}\n\n"
            return
        finally:
            for choice in self.choices:
                choice.job.cancelled = True
        if self.request.includes_usage:
            yield self._event([], usage=self._usage())
        yield "data: [DONE]\n\n"

    def _chunk(self, index: int, content: dict, finish_reason: str | None) -> dict:
        return {"index": index, **content, "logprobs": None, "finish_reason": finish_reason}

    def _event(self, choices: list[dict], **more) -> str:
        return f"data: {json.dumps({**self.head, 'choices': choices, **more})}\n\n"


class Guard:
    """Lets requests in: asks for the key, and reads each body itself, so that none is too large or
    takes forever to come."""

    def __init__(self, app: ASGIApp, settings: ServerSettings):
        self.app = app
        self.settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # the encoding of HTTP headers, in which no byte is an error
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        try:
            self._check(scope["path"], headers)
            body = await self._read_body(receive)
        except RequestError as error:
            await error_response(error)(scope, receive, send)
            return
        if body is None:
            return
        # the application reads the body as if it had just come
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again() -> Message:
            # after the body the connection's own messages, of which the client's leaving is one
            return unread.pop() if unread else await receive()

        await self.app(scope, receive_again, send)

    def _check(self, path: str, headers: dict[str, str]) -> None:
        key = self.settings.api_key
        given = headers.get("authorization", "").removeprefix("Bearer ")
        # takes the same time wherever two keys differ, so nobody can guess one letter by letter
        if key and path != "/health" and not secrets.compare_digest(given.encode(), key.encode()):
            raise RequestError(
                401, "the API key is missing or wrong.", "authentication_error", "invalid_api_key"
            )
        # refused before it is read; a body that comes in chunks has no length and is counted below
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.settings.max_body:
            raise self._too_large()

    def _too_large(self) -> RequestError:
        return RequestError(
            413, f"the body is larger than {self.settings.max_body} bytes; send less."
        )

    async def _read_body(self, receive: Receive) -> bytes | None:
        """All of the body; None if the client has left before its end."""
        parts = []
        size = 0
        try:
            # a client that sends a byte a minute would hold a connection for ever
            async with asyncio.timeout(self.settings.body_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    # while it comes: the length that a client names need not be true
                    if size > self.settings.max_body:
                        raise self._too_large()
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError as error:
            seconds = self.settings.body_timeout
            raise RequestError(
                408, f"the body did not come within {seconds:g} seconds.", "timeout"
            ) from error


def error_response(error: RequestError) -> JSONResponse:
    # the `openai` client waits that long and asks again
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    return JSONResponse(error.body, error.status, headers)


def _explain_errors(app: FastAPI) -> None:
    """Whatever goes wrong is said in OpenAI's form."""

    @app.exception_handler(RequestError)
    async def explain(request: Request, error: RequestError) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def explain_form(request: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(explain_invalid(error.errors()))

    @app.exception_handler(HTTPException)
    async def explain_others(request: Request, error: HTTPException) -> JSONResponse:
        message = str(error.detail)
        if error.status_code == 404:
            paths = "/v1/completions, /v1/chat/completions and /v1/models"
            message = f"there is nothing at {request.url.path}; this server has {paths}."
        if error.status_code == 405:
            message = f"{request.method} is not the method of {request.url.path}."
        return error_response(RequestError(error.status_code, message))

    @app.exception_handler(Exception)
    async def explain_failure(request: Request, error: Exception) -> JSONResponse:
        return error_response(
            RequestError(500, "the server failed; its log says why.", "server_error")
        )


class Service:
    """A model with the two threads that read requests and run it."""

    def __init__(self, pipe: TokComPipeline, settings: ServerSettings):
        self.pipe = pipe
        self.settings = settings
        self.engine = Engine(pipe, settings.max_batch, settings.max_queue, settings.batch_wait)
        # a tokenizer is not safe in two threads: the model's has the pipeline's, the reader a copy
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="tokcom-reader")
        self.tokenizer = copy.deepcopy(pipe.tokenizer)
        self.texts = TokenTexts(self.tokenizer)
        self.card = {
            "id": settings.model_name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "tokcom",
        }

    def health(self) -> dict:
        engine = self.engine
        state = "ok" if engine.thread.is_alive() else "stopped"
        if engine.draining:
            state = "draining"
        return {"status": state, "waiting": len(engine.waiting), "running": engine.running}

    def model(self, name: str) -> dict:
        if name != self.settings.model_name:
            known = self.settings.model_name
            message = f"the model {name!r} does not exist; this server has {known!r}."
            raise RequestError(404, message, code="model_not_found", param="model")
        return self.card

    async def answer(self, request: CompletionRequest | ChatRequest, connection: Request):
        """Read a request, hand its jobs to the model, and answer as they grow or when they end."""
        loop = asyncio.get_running_loop()
        # by address: connections of one machine count as one client
        client = connection.client.host if connection.client else ""
        what = request, self.pipe, self.tokenizer, self.settings, client, loop
        prompts, jobs = await loop.run_in_executor(self.reader, read_request, *what)
        # all or none, so that an answer is never half queued
        self.engine.submit(jobs)
        # `n` texts for each prompt, in the order of the prompts
        choices = [
            Choice(job, request.stops, prompts[i // request.n]) for i, job in enumerate(jobs)
        ]
        count = sum(len(prompt.ids) for prompt in prompts)
        response = Answer(request, choices, count, self.settings, connection)
        if request.stream:
            return StreamingResponse(response.events(), media_type="text/event-stream")
        return await response.whole(self.texts, self.reader)

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI):
        yield
        # it waits for the turn at hand, which must not stop the event loop
        await asyncio.to_thread(self.engine.close)
        self.reader.shutdown(wait=False)


def build_app(pipe: TokComPipeline, settings: ServerSettings) -> FastAPI:
    """The web application; its `state.engine` runs the model."""
    service = Service(pipe, settings)
    # without the pages that describe an API
    hidden = {"docs_url": None, "redoc_url": None, "openapi_url": None}
    app = FastAPI(title="TokCom", lifespan=service.lifespan, **hidden)
    app.state.engine = service.engine
    # outside of everything: a body that is refused is not even parsed
    app.add_middleware(Guard, settings=settings)
    _explain_errors(app)

    @app.get("/health")
    async def health() -> dict:
        return service.health()

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [service.card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict:
        return service.model(name)

    @app.post("/v1/completions")
    async def completions(request: CompletionRequest, connection: Request):
        return await service.answer(request, connection)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: ChatRequest, connection: Request):
        return await service.answer(request, connection)

    return app


class DrainingServer(uvicorn.Server):
    """Ends on SIGTERM or SIGINT with status 0: takes no more requests, and finishes running ones
    for `grace` seconds.

    A second SIGINT ends at once.
    """

    def __init__(self, config: uvicorn.Config, grace: float, name: str):
        super().__init__(config)
        self.grace = grace
        self.name = name

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        # only now is it known which port the system has given for port 0
        for server in self.servers[:1]:
            port = server.sockets[0].getsockname()[1]
            print(f"serving {self.name} on http://{self.config.host}:{port}/v1", flush=True)

    def handle_exit(self, sig: int, frame: object) -> None:
        # uvicorn would raise the signal again at the end and so die of it
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True

    async def shutdown(self, sockets=None) -> None:
        engine: Engine = self.config.app.state.engine
        # first: new requests are refused while old ones finish
        engine.drain()
        # unfinished texts are told so after `grace`, which ends the answers that uvicorn waits for
        ending = asyncio.get_running_loop().call_later(self.grace, self._give_up, engine)
        await super().shutdown(sockets)
        ending.cancel()

    def _give_up(self, engine: Engine) -> None:
        asyncio.get_running_loop().run_in_executor(None, engine.close)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def warm_up(pipe: TokComPipeline) -> None:
    """Let a compiled network see what requests will bring, so that none of them waits for a compiler."""
    for count in (1, 2, 3):  # a size that has changed is compiled for all sizes
        for prompt in ("Once", "Once upon a time there was", "Once upon a time there was a house"):
            pipe([prompt] * count, gen_length=16)
            pipe.infill(f"{prompt} ____ a house.", 4 * count, num_candidates=count)
    pipe("Once upon a time there was", gen_length=16, guidance_scale=1.5)


def check_address(host: str, port: int) -> None:
    """Raise `ValueError` for an address that this machine cannot listen at: uvicorn would say so
    in its log only, after the model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as listener:
            # as uvicorn does: a port of a server that has just ended is free
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        raise ValueError(
            f"--host {host} --port {port} cannot be listened at ({error.strerror}); give another "
            "address of this machine, or another port."
        ) from error


def run(args: argparse.Namespace) -> None:
    """Serve until a signal ends the process."""
    settings = ServerSettings(
        **{name: getattr(args, name) for name in ("model_name", "api_key", *LIMITS)}
    )
    check_address(args.host, args.port)
    pipe = open_pipeline(args.checkpoint, args.device)
    if not isinstance(pipe, TokComPipeline):
        raise ValueError(f"{args.checkpoint} is no model of texts; the server completes texts.")
    if pipe.tokenizer is None:
        raise ValueError(f"{args.checkpoint} has no tokenizer, so there is no text to serve.")
    pipe.set_progress_bar_config(disable=True)
    # before the first request, which would time out while it waits for the compiler
    if args.compile:
        speed_up(pipe, int8=False, compiled=True)
        warm_up(pipe)
    if not is_loopback(args.host) and not args.api_key:
        print(f"warning: {args.host} can be reached from other machines and there is no --api_key.")
    app = build_app(pipe, settings)
    last = math.ceil(settings.grace) + 5  # for clients that do not read what they are sent
    config = uvicorn.Config(
        app, host=args.host, port=args.port, log_level="warning", timeout_graceful_shutdown=last
    )
    gc.freeze()  # the model lives as long as the server, so collections need not walk through it
    DrainingServer(config, settings.grace, f"{args.checkpoint} as {args.model_name!r}").run()
