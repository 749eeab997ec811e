"""The server speaks to the official `openai` client, and batches, limits and explains."""

import asyncio
import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import uvicorn
from helpers import seeded

from tokcom.cli.serve import Choice, Engine, Job, ServerSettings, build_app, is_loopback
from tokcom.pipeline_tokcom import TokComPiece

TOKENS = {
    "prediction_type": "tokens",
    "codec_config": {"encoder_type": "token"},
    "transformer_config": {
        **{
            "num_hidden_layers": 3,
            "num_context_layers": 2,
            "head_attention": False,
            "block_size": 1,
        },
    },
    "token_stagger": 1.0,
    "num_inference_steps": 4,
}


class Running:
    """The application on a free port of the loopback interface."""

    def __init__(self, pipe, **settings):
        self.app = build_app(pipe, ServerSettings(**settings))
        self.server = uvicorn.Server(uvicorn.Config(self.app, port=0, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]

    def client(self, key: str = "key") -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0
        )

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)


@pytest.fixture
def pipe(build):
    return build(**TOKENS)


@pytest.fixture
def start():
    running = []

    def make(pipe, **settings) -> Running:
        running.append(Running(pipe, **settings))
        return running[-1]

    yield make
    for server in running:
        server.stop()


def test_a_seed_gives_the_pipelines_text_whole_and_streamed(pipe, start):
    client = start(pipe).client()
    options = {"model": "tokcom", "prompt": "Squinty was", "max_tokens": 23, "seed": 7}
    expected = pipe("Squinty was", gen_length=23, generator=seeded(7)).texts[0]
    answer = client.completions.create(**options)
    assert (
        answer.choices[0].text == expected
        and answer.model == "tokcom"
        and answer.object == "text_completion"
    )
    assert answer.usage.completion_tokens <= 23
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.choices[0].finish_reason == (
        "length" if answer.usage.completion_tokens == 23 else "stop"
    )
    pieces = list(
        client.completions.create(stream=True, stream_options={"include_usage": True}, **options)
    )
    assert "".join(c.text for p in pieces for c in p.choices) == expected and len(pieces) > 3
    assert pieces[-1].usage == answer.usage


def test_prompts_choices_and_echo_come_in_order(pipe, start):
    client = start(pipe).client()
    answer = client.completions.create(
        model="tokcom", prompt=["Squinty", "Mr. Rabbit went"], n=2, max_tokens=8, seed=3, echo=True
    )
    starts = ["Squinty", "Squinty", "Mr. Rabbit went", "Mr. Rabbit went"]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert all(choice.text.startswith(start) for choice, start in zip(answer.choices, starts))
    alone = pipe("Mr. Rabbit went", gen_length=8, generator=seeded(3 + 2)).texts[0]
    assert answer.choices[2].text == "Mr. Rabbit went" + alone


def test_a_batch_gives_every_request_what_it_would_get_alone(pipe, start):
    server = start(pipe, max_batch=8, batch_wait=0.5)
    client = server.client()
    prompts = ["Squinty was", "Mr. Rabbit went home", "The", "One fine day the"]
    ask = lambda i: client.completions.create(
        model="tokcom", prompt=prompts[i], max_tokens=9 + 4 * i, seed=i
    )  # noqa: E731
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, range(4)))
    assert server.app.state.engine.batches == 1
    for i, answer in enumerate(answers):
        assert (
            answer.choices[0].text
            == pipe(prompts[i], gen_length=9 + 4 * i, generator=seeded(i)).texts[0]
        )


def test_fifty_concurrent_requests_share_batches_without_an_error(pipe, start):
    server = start(pipe, max_batch=16)
    client = server.client()
    with ThreadPoolExecutor(50) as pool:
        ask = lambda i: client.completions.create(
            model="tokcom", prompt="Squinty", max_tokens=16, seed=i
        )  # noqa: E731
        answers = list(pool.map(ask, range(50)))
    assert len(answers) == 50 and all(a.choices[0].finish_reason for a in answers)
    assert 50 / 16 <= server.app.state.engine.batches < 50


def test_a_wrong_key_is_refused_and_health_is_open(pipe, start):
    server = start(pipe, api_key="secret")
    with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
        server.client("wrong").models.list()
    assert [m.id for m in server.client("secret").models.list()] == ["tokcom"]
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/health") as answer:
        assert json.load(answer) == {"status": "ok", "waiting": 0, "running": 0}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(prompt=""), openai.BadRequestError, "none may be empty"),
        (dict(prompt=[]), openai.BadRequestError, "at least one"),
        (dict(prompt="x " * 2000), openai.BadRequestError, "tokens, more than the model's 128"),
        (dict(max_tokens=10**9), openai.BadRequestError, "limit of 2048"),
        (dict(max_tokens=0), openai.BadRequestError, "max_tokens"),
        (dict(temperature=-1), openai.BadRequestError, "temperature"),
        (dict(n=100), openai.BadRequestError, "more than the 16"),
        (dict(model="gpt-4"), openai.NotFoundError, "'gpt-4' does not exist"),
        (dict(suffix="end"), openai.BadRequestError, "suffix"),
        (dict(prompt="x" * (1 << 21)), openai.APIStatusError, "larger than 1048576 bytes"),
    ],
)
def test_bad_requests_are_explained(pipe, start, options, error, message):
    client = start(pipe).client()
    with pytest.raises(error, match=message):
        client.completions.create(**{"model": "tokcom", "prompt": "Squinty", **options})
    assert client.completions.create(
        model="tokcom", prompt="Squinty", max_tokens=4
    ).choices  # the server goes on


def test_settings_that_the_model_refuses_are_the_clients_error(build, start):
    client = start(build()).client()  # regresses latents: there is no temperature
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="tokcom", prompt="Squinty", temperature=0.5)
    with pytest.raises(openai.APIError, match="temperature"):
        list(
            client.completions.create(
                model="tokcom", prompt="Squinty", temperature=0.5, stream=True
            )
        )


def test_a_full_queue_and_a_slow_answer_are_said(pipe, start):
    server = start(pipe, max_queue=1, timeout=0.05)
    client, release = server.client(), threading.Event()
    plain = pipe.stream_batch

    def wait(*args):
        release.wait(10)
        yield from plain(*args)

    pipe.stream_batch = wait
    with pytest.raises(openai.APIStatusError, match="not finished within 0.05 seconds"):
        client.completions.create(model="tokcom", prompt="Squinty")
    with pytest.raises(openai.RateLimitError, match="try again later"):
        client.completions.create(model="tokcom", prompt=["a", "b"])
    release.set()


def test_stop_sequences_are_held_back_until_they_are_certain():
    async def grow() -> list[str]:
        job = Job("x", 9, (), 0, asyncio.get_running_loop())
        choice = Choice(job, ["\n\n"])
        for text in ("one\n", "two\n", "\nthree"):
            job.pieces.put_nowait(TokComPiece(text, 1, None))
        shown = [await choice.grow() for _ in range(3)]
        assert choice.finish_reason == "stop" and job.cancelled and choice.text == "one\ntwo"
        return shown

    assert asyncio.run(grow()) == ["one", "\ntwo", ""]


def test_a_failing_model_is_told_to_its_clients_and_the_engine_goes_on(pipe):
    engine = Engine(pipe, ServerSettings())
    plain, pipe.stream_batch = pipe.stream_batch, None

    async def ask() -> object:
        job = Job("Squinty", 4, (None, 1.0, None, None), 0, asyncio.get_running_loop())
        engine.submit([job])
        return await asyncio.wait_for(job.pieces.get(), 10)

    assert isinstance(asyncio.run(ask()), TypeError)
    pipe.stream_batch = plain
    assert isinstance(asyncio.run(ask()), TokComPiece)
    engine.close()
    assert not engine.thread.is_alive()


def test_only_loopback_hosts_are_private():
    assert is_loopback("127.0.0.1") and is_loopback("::1") and is_loopback("localhost")
    assert not is_loopback("0.0.0.0") and not is_loopback("example.org")


def post(port: int, body: bytes, **headers: str) -> tuple[int, dict]:
    """A request of the standard library's, which sends what the `openai` client would not."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(
        "POST", "/v1/completions", body, {"Content-Type": "application/json", **headers}
    )
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def test_malformed_requests_get_errors_in_the_same_form(pipe, start):
    port = start(pipe, max_steps=8).port
    cases = [
        (b"{", {}, 400, "body"),
        (b'{"prompt": "\\ud800"}', {}, 400, "not valid Unicode"),
        (b'{"prompt": "x", "num_inference_steps": 9}', {}, 400, "limit of 8"),
        (
            json.dumps({"prompt": "x", "stop": ["y" * 300]}).encode(),
            {},
            400,
            "at most 256 characters",
        ),
        (b'{"prompt": "x"}', {"Transfer-Encoding": "chunked"}, 411, "Content-Length"),
    ]
    for body, headers, status, message in cases:
        found, answer = post(port, body, **headers)
        assert found == status and message in answer["error"]["message"], answer
    nulls = b'{"prompt": "Squinty", "max_tokens": null, "n": null, "stop": null, "logprobs": null, "echo": null}'
    assert post(port, nulls)[0] == 200
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/nothing")
    assert json.load(caught.value)["error"]["message"] == "Not Found"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_does_not_hold_the_model(pipe, start, stream):
    server = start(pipe)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    body = json.dumps({"prompt": "Squinty", "max_tokens": 2000, "stream": stream, "n": 16})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    engine = server.app.state.engine
    while not engine.running:
        time.sleep(0.01)
    connection.sock.close()
    deadline = time.monotonic() + 20
    while engine.running and time.monotonic() < deadline:
        time.sleep(0.02)
    assert engine.running == 0


def test_bidirectional_models_keep_texts_of_other_lengths_apart(build, start):
    pipe = build(transformer_config={"block_size": None})
    server = start(pipe, batch_wait=0.3)
    client = server.client()
    jobs = [("Squinty", 8), ("Mr. Rabbit went home to his", 60), ("Squinty", 8), ("S" + " " * 6, 8)]
    ask = lambda job: client.completions.create(
        model="tokcom", prompt=job[0], max_tokens=job[1], seed=1
    )  # noqa: E731
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, jobs))
    for (prompt, length), answer in zip(jobs, answers):
        assert (
            answer.choices[0].text == pipe(prompt, gen_length=length, generator=seeded(1)).texts[0]
        )
    assert server.app.state.engine.batches == 3  # spaces at the end are not read


def test_texts_that_still_wait_are_told_when_the_server_ends(pipe):
    engine = Engine(pipe, ServerSettings())
    release, plain = threading.Event(), pipe.stream_batch

    def wait(*args):
        release.wait(10)
        yield from plain(*args)

    pipe.stream_batch = wait

    async def ask() -> list[object]:
        loop = asyncio.get_running_loop()
        jobs = [Job("Squinty", 4, (i, 1.0, None, None), 0, loop) for i in (1, 2)]
        engine.submit(jobs)
        while not engine.running:
            await asyncio.sleep(0.01)
        closing = asyncio.ensure_future(asyncio.to_thread(engine.close))
        await asyncio.sleep(0.05)
        release.set()
        await closing
        return [await asyncio.wait_for(job.pieces.get(), 10) for job in jobs]

    assert all(getattr(item, "status", None) == 503 for item in asyncio.run(ask()))
