"""The server speaks to the official `openai` client, gives every client its turns, and drops, limits and explains."""

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
import torch
import uvicorn
from harness.server_load import measure
from helpers import ROOT, build_model, seeded

from tokcom.cli import openai_format
from tokcom.cli.fair_turns import PATIENCE, Batch, Engine, Job, Piece, RequestError, Sampling
from tokcom.cli.main import build_parser
from tokcom.cli.scoring import score_tokens
from tokcom.cli.serve import Choice, DrainingServer, build_app, is_loopback, warm_up
from tokcom.cli.server_settings import ServerSettings
from tokcom.pipeline_tokcom import TokComPipeline
from tokcom.processing_tokcom import text_ids, vocabulary_size
from tokcom.scheduling_tokcom import TokComFlowMatchScheduler

PROMPT = "Squinty was"


class Running:
    """The application on a free port of the loopback interface."""

    def __init__(self, pipe, grace: float = 10.0, **settings):
        self.app = build_app(pipe, ServerSettings(**settings))
        self.engine = self.app.state.engine
        self.server = DrainingServer(uvicorn.Config(self.app, port=0, log_level="error"), grace)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]

    def client(self, key: str = "key") -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0, timeout=30
        )

    def post(self, body: bytes, path: str = "/v1/completions", **headers: str) -> tuple[int, dict]:
        """A request of the standard library's, which sends what the `openai` client would not."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("POST", path, body, {"Content-Type": "application/json", **headers})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())

    def send(self, **body) -> http.client.HTTPConnection:
        """A request whose answer nobody reads yet."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request(
            "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        return connection

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)


@pytest.fixture(scope="module")
def pipe(tokenizer) -> TokComPipeline:
    """A model whose tokens take turns, so that its probabilities are exact."""
    model = build_model(vocabulary_size(tokenizer))
    pipe = TokComPipeline(
        model, TokComFlowMatchScheduler.from_model_config(model.config), tokenizer
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def server(pipe):
    running = Running(pipe)
    yield running
    running.stop()


@pytest.fixture
def start():
    running = []

    def make(pipe, **settings) -> Running:
        running.append(Running(pipe, **settings))
        return running[-1]

    yield make
    for server in running:
        server.stop()


def wait_until(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def test_a_compiled_server_has_compiled_everything_once_it_is_warm(tokenizer):
    model = build_model(vocabulary_size(tokenizer)).requires_grad_(False)
    scheduler = TokComFlowMatchScheduler.from_model_config(model.config)
    pipe = TokComPipeline(model, scheduler, tokenizer)
    pipe.set_progress_bar_config(disable=True)
    torch._dynamo.reset()
    graphs = []
    pipe.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    warm_up(pipe)
    warm = len(graphs)
    for count, prompt in ((1, "Squinty"), (4, "The pig"), (7, "He was a comical little pig")):
        pipe([prompt] * count, gen_length=30)
    assert 0 < warm == len(graphs)


# ---- completions ----


def test_a_seed_gives_the_pipelines_text_whole_and_streamed(pipe, server):
    client = server.client()
    options = {"model": "tokcom", "prompt": PROMPT, "max_tokens": 23, "seed": 7}
    expected = pipe(PROMPT, gen_length=23, generator=seeded(7)).texts[0]
    answer = client.completions.create(**options)
    assert (
        answer.choices[0].text == expected
        and answer.model == "tokcom"
        and answer.object == "text_completion"
    )
    assert answer.usage.prompt_tokens == len(text_ids(pipe.tokenizer, PROMPT))
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.choices[0].finish_reason == (
        "length" if answer.usage.completion_tokens == 23 else "stop"
    )
    pieces = list(
        client.completions.create(stream=True, stream_options={"include_usage": True}, **options)
    )
    assert "".join(c.text for p in pieces for c in p.choices) == expected and len(pieces) > 3
    assert pieces[-1].usage == answer.usage


def test_prompts_choices_and_echo_come_in_order(pipe, server):
    answer = server.client().completions.create(
        model="tokcom", prompt=["Squinty", "Mr. Rabbit went"], n=2, max_tokens=8, seed=3, echo=True
    )
    starts = ["Squinty", "Squinty", "Mr. Rabbit went", "Mr. Rabbit went"]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert all(choice.text.startswith(start) for choice, start in zip(answer.choices, starts))
    alone = pipe("Mr. Rabbit went", gen_length=8, generator=seeded(3 + 2)).texts[0]
    assert answer.choices[2].text == "Mr. Rabbit went" + alone


@pytest.mark.parametrize("prompt", ["Squinty was ", "Squinty   "])
def test_a_space_that_ends_a_prompt_belongs_to_the_next_word(pipe, server, prompt):
    answer = server.client().completions.create(model="tokcom", prompt=prompt, max_tokens=9, seed=5)
    assert answer.choices[0].text == pipe(prompt, gen_length=9, generator=seeded(5)).texts[0]


def test_token_ids_are_prompts_like_their_text(pipe, server):
    client = server.client()
    ids = text_ids(pipe.tokenizer, PROMPT)
    options = {"model": "tokcom", "max_tokens": 8, "seed": 1}
    expected = client.completions.create(prompt=PROMPT, **options).choices[0].text
    assert client.completions.create(prompt=ids, **options).choices[0].text == expected
    assert client.completions.create(prompt=[ids], **options).choices[0].text == expected


def test_a_suffix_fills_the_gap_as_the_pipeline_does(pipe, server):
    client = server.client()
    options = {
        "model": "tokcom",
        "prompt": "Squinty was ",
        "suffix": " went home.",
        "max_tokens": 6,
        "seed": 2,
    }
    whole = pipe.infill("Squinty was ____ went home.", gap_length=6, generator=seeded(2)).texts[0]
    answer = client.completions.create(**options)
    assert "Squinty was " + answer.choices[0].text + " went home." == whole
    pieces = list(client.completions.create(stream=True, **options))
    assert "".join(c.text for p in pieces for c in p.choices) == answer.choices[0].text


def test_logprobs_are_those_of_the_exact_model_and_stop_at_the_text(pipe, server):
    client = server.client()
    answer = client.completions.create(
        model="tokcom", prompt=PROMPT, max_tokens=10, seed=4, logprobs=3, echo=True
    )
    found = answer.choices[0].logprobs
    ids = text_ids(pipe.tokenizer, PROMPT)
    scores = score_tokens(pipe.model, ids)
    own = scores.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert found.token_logprobs[0] is None
    assert found.token_logprobs[1 : len(ids)] == pytest.approx(own, abs=1e-4)
    text = answer.choices[0].text
    for token, start in zip(found.tokens, found.text_offset):
        # a part of a character spells nothing of its own
        assert "\ufffd" in token or text[start:].lstrip("\ufffd").startswith(token)
    for best, own in zip(found.top_logprobs[1:], found.token_logprobs[1:]):
        assert len(best) <= 3 and max(best.values()) >= own - 1e-6
    new = client.completions.create(
        model="tokcom", prompt=PROMPT, max_tokens=10, seed=4, logprobs=3
    )
    assert new.choices[0].logprobs.token_logprobs == pytest.approx(
        found.token_logprobs[len(ids) :], abs=1e-4
    )


def test_a_prompt_is_scored_without_writing(pipe, server):
    """What evaluation harnesses ask: `echo`, `logprobs` and no new token, for token ids."""
    ids = text_ids(pipe.tokenizer, "Mr. Rabbit went home to his")
    answer = server.client().completions.create(
        model="tokcom", prompt=[ids], max_tokens=0, logprobs=1, echo=True
    )
    scores = score_tokens(pipe.model, ids)
    own = scores.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert answer.choices[0].logprobs.token_logprobs[1:] == pytest.approx(own, abs=1e-4)
    assert answer.usage.completion_tokens == 0


def test_scores_sum_to_one_do_not_see_the_future_and_are_the_models_likelihood(pipe):
    ids = text_ids(pipe.tokenizer, "Mr. Rabbit went home to his wife")
    ids = ids[: len(ids) // 4 * 4]
    scores = score_tokens(pipe.model, ids)
    assert torch.allclose(scores.exp().sum(-1), torch.ones(len(ids) - 1), atol=1e-5)
    for length in range(1, len(ids)):
        assert torch.allclose(
            score_tokens(pipe.model, ids[:length]).exp(), scores[: length - 1].exp(), atol=1e-5
        )
    losses = [
        pipe.model(torch.tensor([ids]), timestep=k / 4).token_losses[..., k] for k in range(4)
    ]
    own = scores.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert torch.allclose(own, -torch.stack(losses, dim=-1).flatten()[1:], atol=1e-4)


# ---- chat ----

MESSAGES = [
    {"role": "system", "content": "Once there was a rabbit."},
    {"role": "user", "content": [{"type": "text", "text": "Where did he go?"}]},
]


@pytest.mark.parametrize(
    "template", [None, "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"]
)
def test_a_dialogue_is_continued_as_the_pipeline_does(pipe, start, template):
    turns = [
        {"role": "system", "content": "Once there was a rabbit."},
        {"role": "user", "content": "Where did he go?"},
    ]
    pipe.tokenizer.chat_template = template
    try:
        client = start(pipe).client()
        expected = pipe(turns, gen_length=12, generator=seeded(6)).texts[0]
    finally:
        pipe.tokenizer.chat_template = None
    options = {"model": "tokcom", "messages": MESSAGES, "max_completion_tokens": 12, "seed": 6}
    answer = client.chat.completions.create(**options)
    assert (
        answer.choices[0].message.content == expected
        and answer.choices[0].message.role == "assistant"
    )
    assert answer.object == "chat.completion" and answer.usage.completion_tokens <= 12
    pieces = list(client.chat.completions.create(stream=True, n=2, **options))
    assert (
        pieces[0].choices[0].delta.role == "assistant"
        and pieces[0].object == "chat.completion.chunk"
    )
    texts = ["", ""]
    for choice in (choice for piece in pieces for choice in piece.choices):
        texts[choice.index] += choice.delta.content or ""
    assert texts[0] == expected != texts[1]


def test_chat_logprobs_spell_the_reply(server):
    answer = server.client().chat.completions.create(
        model="tokcom", messages=MESSAGES, max_tokens=8, seed=6, logprobs=True, top_logprobs=2
    )
    content = answer.choices[0].logprobs.content
    reply = answer.choices[0].message.content
    assert all("\ufffd" in entry.token or entry.token in reply for entry in content)
    assert all(len(entry.top_logprobs) == 2 and entry.logprob <= 0 for entry in content)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(prompt=""), openai.BadRequestError, "none may be empty"),
        (dict(prompt=[]), openai.BadRequestError, "at least one"),
        (dict(prompt=[[]]), openai.BadRequestError, "at least one token id"),
        (dict(prompt=[5, 10**6]), openai.BadRequestError, "1000000 is no token id of this model; they are 0 to"),
        (dict(prompt=[5, "x"]), openai.BadRequestError, "must be a text, a list of texts, a list of token ids"),
        (dict(prompt="x " * 2000), openai.BadRequestError, "tokens, more than the model's 128; shorten it"),
        (dict(prompt="x " * 50_000), openai.BadRequestError, "100000 characters, more than this server's 65536"),
        (dict(max_tokens=10**9), openai.BadRequestError, "limit of 2048"),
        (dict(max_tokens=0), openai.BadRequestError, r"`max_tokens` \(0\) must be at least 1"),
        (dict(max_tokens=2048, n=16, extra_body={"num_inference_steps": 8}), openai.BadRequestError, "are 262144, more"),
        (dict(temperature=-1), openai.BadRequestError, r"`temperature` \(-1\) must be at least 0"),
        (dict(n=100), openai.BadRequestError, "more than this server's limit of 16"),
        (dict(model="gpt-4"), openai.NotFoundError, "'gpt-4' does not exist"),
        (dict(suffix="____"), openai.BadRequestError, "stand for a gap"),
        (dict(suffix=" a ___ b"), openai.BadRequestError, "stand for a gap"),
        (dict(suffix="_ end"), openai.BadRequestError, "one beside the gap"),
        (dict(suffix=" end", echo=True), openai.BadRequestError, "`suffix` does not go with"),
        (dict(suffix=" end", max_tokens=200), openai.BadRequestError, "asks for 200 more"),
        (dict(logprobs=2, stream=True), openai.BadRequestError, "leave out `stream` or `logprobs`"),
        (dict(logprobs=2, max_tokens=200), openai.BadRequestError, "asks for 200 more, more than the model's 128"),
        (dict(presence_penalty=1), openai.BadRequestError, r"`presence_penalty` \(1\) is not supported"),
        (dict(extra_body={"tools": []}), openai.BadRequestError, "`tools` is not supported by this server"),
        (dict(stop=["y" * 300]), openai.BadRequestError, "at most 256 characters"),
        (dict(prompt="x" * (1 << 21)), openai.APIStatusError, "larger than 1048576 bytes"),
    ],
)  # fmt: skip
def test_bad_requests_are_explained(server, options, error, message):
    client = server.client()
    with pytest.raises(error, match=message):
        client.completions.create(**{"model": "tokcom", "prompt": "Squinty", **options})


def test_bad_dialogues_are_explained(server):
    client = server.client()
    picture = [{"type": "image_url", "image_url": {"url": "x"}}]
    for options, message in [
        (dict(messages=[]), "must be a list of at least one"),
        (dict(messages=[{"role": "user", "content": picture}]), "'content': a text"),
        (dict(messages=[{"role": "user", "content": " "}]), "hold no text"),
        (dict(messages=MESSAGES, top_logprobs=2), "needs `logprobs`"),
        (dict(messages=MESSAGES, response_format={"type": "json_object"}), "can only be"),
    ]:
        with pytest.raises(openai.BadRequestError, match=message):
            client.chat.completions.create(model="tokcom", **options)


def test_malformed_requests_get_errors_in_the_same_form(server):
    cases = [
        (b"{", {}, 400, "not valid JSON"),
        (b"[" * 100_000, {}, 400, "body"),
        (b"[]", {}, 400, "must be a JSON object"),
        (b"{}", {}, 400, "`prompt` is missing"),
        (b'{"prompt": "\\ud800"}', {}, 400, "not valid Unicode"),
        (b'{"prompt": "x", "temperature": NaN}', {}, 400, "temperature"),
        (b'{"prompt": "x", "num_inference_steps": 129}', {}, 400, "limit of 128"),
    ]
    for body, headers, status, message in cases:
        found, answer = server.post(body, **headers)
        assert found == status and message in answer["error"]["message"], answer
    nulls = b'{"prompt": "Squinty", "max_tokens": null, "n": null, "stop": null, "logprobs": null, "echo": null}'
    assert server.post(nulls)[0] == 200
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"http://127.0.0.1:{server.port}/nothing")
    assert "there is nothing at /nothing" in json.load(caught.value)["error"]["message"]
    assert server.post(b"{}", "/v1/models")[0] == 405


def test_a_body_that_never_comes_is_not_waited_for(pipe, start):
    server = start(pipe, body_timeout=0.1)
    status, answer = server.post(b"{", **{"Content-Length": "100"})
    assert status == 408 and "did not come within 0.1 seconds" in answer["error"]["message"]


def test_long_texts_are_refused_before_they_are_tokenised(pipe, start, monkeypatch):
    def fail(*args):
        raise AssertionError("tokenised")

    server = start(pipe, max_characters=100)
    monkeypatch.setattr(openai_format, "text_ids", fail)
    with pytest.raises(openai.BadRequestError, match="101 characters"):
        server.client().completions.create(model="tokcom", prompt="x" * 101)


def test_models_without_exact_probabilities_say_so(build, start):
    client = start(build()).client()  # regresses latents
    for options, message in [
        (dict(temperature=0.5), "no token probabilities"),
        (dict(logprobs=1), "no exact"),
    ]:
        with pytest.raises(openai.BadRequestError, match=message):
            client.completions.create(model="tokcom", prompt="Squinty", **options)


def test_settings_that_make_no_sense_are_refused():
    for name, value in [
        ("max_batch", 0),
        ("max_queue", -1),
        ("timeout", 0.0),
        ("grace", float("nan")),
        ("max_work", 0),
    ]:
        with pytest.raises(ValueError, match=name):
            ServerSettings(**{name: value})
    for name in ("max_batch", "grace", "max_work", "max_characters"):
        assert f"--{name}" in build_parser("serve").format_help()


def test_a_wrong_key_is_refused_and_health_is_open(pipe, start):
    server = start(pipe, api_key="secret")
    with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
        server.client("wrong").models.list()
    client = server.client("secret")
    assert [m.id for m in client.models.list()] == ["tokcom"] and client.models.retrieve(
        "tokcom"
    ).id == "tokcom"
    with pytest.raises(openai.NotFoundError, match="'other/one' does not exist"):
        client.get("/models/other/one", cast_to=object)
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/health") as answer:
        assert json.load(answer) == {"status": "ok", "waiting": 0, "running": 0}


def test_only_loopback_hosts_are_private():
    assert is_loopback("127.0.0.1") and is_loopback("::1") and is_loopback("localhost")
    assert not is_loopback("0.0.0.0") and not is_loopback("example.org")


# ---- turns ----


def test_a_batch_gives_every_request_what_it_would_get_alone(pipe, start):
    server = start(pipe, max_batch=4, batch_wait=1.0)
    client = server.client()
    prompts = ["Squinty was", "Mr. Rabbit went home", "The", "One fine day the"]

    def ask(i: int):
        return client.completions.create(
            model="tokcom", prompt=prompts[i], max_tokens=9 + 2 * i, seed=i
        )

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, range(4)))
    assert server.engine.batches == 1
    for i, answer in enumerate(answers):
        assert (
            answer.choices[0].text
            == pipe(prompts[i], gen_length=9 + 2 * i, generator=seeded(i)).texts[0]
        )


def test_fifty_concurrent_requests_share_batches_without_an_error(pipe, start):
    server = start(pipe, max_batch=16)
    client = server.client()
    with ThreadPoolExecutor(50) as pool:
        answers = list(
            pool.map(
                lambda i: client.completions.create(
                    model="tokcom", prompt="Squinty", max_tokens=16, seed=i
                ),
                range(50),
            )
        )
    assert all(a.choices[0].finish_reason for a in answers)
    assert 50 / 16 <= server.engine.batches < 50


def test_bidirectional_models_keep_texts_of_other_lengths_apart_and_take_turns_by_step(
    build, start
):
    pipe = build(transformer_config={"block_size": None})
    server = start(pipe, batch_wait=0.3, max_batch=4)
    client = server.client()
    jobs = [("Squinty", 8), ("Mr. Rabbit went home to his", 60), ("Squinty", 8), ("S" + " " * 6, 8)]

    def ask(job):
        return client.completions.create(model="tokcom", prompt=job[0], max_tokens=job[1], seed=1)

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, jobs))
    for (prompt, length), answer in zip(jobs, answers):
        assert (
            answer.choices[0].text == pipe(prompt, gen_length=length, generator=seeded(1)).texts[0]
        )
    assert server.engine.batches == 3  # spaces at the end are not read


def make_job(pipe, tokens: int, client: str = "", loop=None, **options) -> Job:
    ids = text_ids(pipe.tokenizer, PROMPT)
    return Job(ids, tokens, Sampling(), 0, loop or asyncio.new_event_loop(), client, **options)


def without_end(pipe, monkeypatch) -> None:
    """No text ends before its length."""
    monkeypatch.setattr(type(pipe), "_eos_token_id", property(lambda self: None))


def turns_until_finished(engine: Engine, job: Job, other: Batch) -> int:
    """How many turns the `other` batch gets until `job`, which is new, has been written."""
    engine.waiting.append(job)
    engine._admit()
    own = engine.active[-1]
    before = other.turns
    while own in engine.active:
        engine._take_turn()
    return other.turns - before


@pytest.fixture
def idle_engine(pipe, monkeypatch):
    """An engine whose thread has ended, so that a test can take its turns."""
    without_end(pipe, monkeypatch)
    engine = Engine(pipe)
    engine.close()
    engine.closed = False
    return engine


def test_a_long_text_delays_a_short_one_by_at_most_two_blocks(pipe, idle_engine):
    engine = idle_engine
    engine.waiting.append(make_job(pipe, 2000))
    engine._admit()
    (long,) = engine.active
    for _ in range(2):
        engine._take_turn()
    # besides these turns, the block at hand when the short text comes
    assert max(turns_until_finished(engine, make_job(pipe, 40), long) for _ in range(2)) <= 1
    assert engine.active == [long]


def test_a_long_text_goes_on_while_short_ones_keep_coming(pipe, idle_engine):
    engine = idle_engine
    engine.waiting.append(make_job(pipe, 1000))
    engine._admit()
    (long,) = engine.active
    for _ in range(3 * PATIENCE):
        if len(engine.active) == 1:
            engine.waiting.append(make_job(pipe, 8))
            engine._admit()
        engine._take_turn()
    assert long.turns >= 3


def test_long_texts_do_not_take_the_lanes_of_short_ones(pipe, idle_engine):
    engine = idle_engine
    engine.max_batch = 1
    engine.waiting = [make_job(pipe, 2000) for _ in range(9)] + [make_job(pipe, 8)]
    engine._admit()
    assert [batch.jobs[0].max_tokens for batch in engine.active] == [2000, 2000, 8]


def test_the_next_place_belongs_to_the_client_with_the_fewest_texts(pipe, idle_engine):
    engine = idle_engine
    engine.max_batch = 3
    engine.waiting = [make_job(pipe, 8, "greedy") for _ in range(9)] + [make_job(pipe, 8, "modest")]
    engine._admit()
    first, second = engine.active
    assert [job.client for job in first.jobs].count("modest") == 1
    assert len(second.jobs) == 3 and len(engine.waiting) == 4


def test_a_full_queue_makes_room_for_clients_with_fewer_texts(pipe):
    engine = Engine(pipe, max_queue=4)
    engine.close()  # nothing is taken from the queue
    engine.closed = False

    async def fill() -> tuple[list[Job], Job]:
        loop = asyncio.get_running_loop()
        greedy = [make_job(pipe, 8, "greedy", loop) for _ in range(4)]
        engine.submit(greedy)
        with pytest.raises(RequestError, match="try again later") as caught:
            engine.submit([make_job(pipe, 8, "greedy", loop)])
        assert caught.value.status == 429
        modest = make_job(pipe, 8, "modest", loop)
        engine.submit([modest])
        error = await asyncio.wait_for(greedy[-1].pieces.get(), 5)
        assert error.status == 429
        return greedy, modest

    greedy, modest = asyncio.run(fill())
    assert engine.waiting == [*greedy[:3], modest]


# ---- clients that leave, failures, and the end ----


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_dropped_at_the_next_step(pipe, start, monkeypatch, stream):
    without_end(pipe, monkeypatch)
    server = start(pipe, max_queue=64)
    connections = [
        server.send(prompt=PROMPT, max_tokens=2000, stream=stream, n=4) for _ in range(3)
    ]
    wait_until(lambda: server.engine.active)
    (batch,) = server.engine.active[:1]
    waiting = server.send(
        prompt=PROMPT, max_tokens=2000, temperature=0.3
    )  # and one that has not begun
    for connection in [*connections, waiting]:
        connection.sock.close()
    wait_until(lambda: not server.engine.active and not server.engine.running, 5)
    assert batch.turns < 400
    assert server.client().completions.create(model="tokcom", prompt=PROMPT, max_tokens=4).choices


def test_a_gap_takes_turns_and_is_dropped_when_its_client_leaves(pipe):
    job = make_job(pipe, 60, infill=(PROMPT, " home."))
    batch = Batch([job], pipe)
    assert batch.advance() and batch.advance()
    job.cancelled = True
    assert not batch.advance()
    assert not any(thread.name == "tokcom-paused" for thread in threading.enumerate())


def test_a_slow_answer_is_given_up(pipe, start, monkeypatch):
    without_end(pipe, monkeypatch)
    server = start(pipe, timeout=0.2)
    with pytest.raises(openai.APIStatusError, match="not finished within 0.2 seconds") as caught:
        server.client().completions.create(model="tokcom", prompt=PROMPT, max_tokens=2000)
    assert caught.value.status_code == 504
    wait_until(lambda: not server.engine.active, 5)


def test_stop_sequences_are_held_back_until_they_are_certain(pipe):
    async def grow() -> list[str]:
        job = make_job(pipe, 9, loop=asyncio.get_running_loop())
        choice = Choice(job, ["\n\n"])
        for text in ("one\n", "two\n", "\nthree"):
            job.pieces.put_nowait(Piece(text, 1, None))
        shown = [await choice.grow() for _ in range(3)]
        assert choice.finish_reason == "stop" and job.cancelled and choice.text == "one\ntwo"
        return shown

    assert asyncio.run(grow()) == ["one", "\ntwo", ""]


def test_a_failing_model_is_told_to_its_clients_and_the_engine_goes_on(pipe, start, monkeypatch):
    server = start(pipe)
    client = server.client()
    with monkeypatch.context() as patch:
        patch.setattr(pipe, "stream_batch", None)
        with pytest.raises(openai.InternalServerError, match="its log says why"):
            client.completions.create(model="tokcom", prompt="Squinty")
        with pytest.raises(openai.APIError, match="its log says why"):
            list(client.completions.create(model="tokcom", prompt="Squinty", stream=True))
    assert client.completions.create(model="tokcom", prompt="Squinty", max_tokens=4).choices


def test_running_requests_are_finished_when_the_server_is_told_to_end(pipe, start, monkeypatch):
    without_end(pipe, monkeypatch)
    server = start(pipe, grace=60)  # a busy machine takes its time
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(
            server.client().completions.create, model="tokcom", prompt=PROMPT, max_tokens=200
        )
        wait_until(lambda: server.engine.running)
        server.server.should_exit = True
        assert asked.result(60).usage.completion_tokens == 200
    wait_until(lambda: not server.thread.is_alive(), 5)


def test_what_is_not_finished_within_the_grace_is_told(pipe, start, monkeypatch):
    without_end(pipe, monkeypatch)
    server = start(pipe, grace=0.1)
    with ThreadPoolExecutor(2) as pool:
        options = {"model": "tokcom", "prompt": PROMPT, "max_tokens": 2000}
        asked = [
            pool.submit(server.client().completions.create, temperature=0.5 + i, **options)
            for i in range(2)
        ]
        wait_until(lambda: len(server.engine.active) == 2)
        server.server.should_exit = True
        for each in asked:
            with pytest.raises(openai.InternalServerError, match="shutting down") as caught:
                each.result(30)
            assert caught.value.status_code == 503
    wait_until(lambda: not server.thread.is_alive(), 5)


@pytest.mark.slow
def test_the_shipped_model_survives_hostile_load():
    """The figures of docs/serving.md, for a shorter time; limits are loose, since the machine may do other work."""
    results = measure(ROOT.parent, seconds=6)
    for name in ("whole", "streamed"):
        assert results[f"dead_clients_{name}"]["cpu_seconds"] < 2
    small = results["small_requests"]
    assert small["beside"]["p50"] < 4 * small["alone"]["p50"] + 1
    nonsense = results["nonsense"]
    assert nonsense["answers_afterwards"] and nonsense["explained"] == len(nonsense["statuses"])
    assert all(400 <= status < 500 for status in nonsense["statuses"])
    assert results["sigterm"]["exit"] == 0 and results["sigterm"]["request"] == 200
