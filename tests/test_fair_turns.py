"""The server gives every client its turns, and drops those who leave."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from harness.server_load import measure
from helpers import ROOT, seeded
from serving import PROMPT, wait_until

from tokcom.cli.fair_turns import PATIENCE, Batch, Engine, Job, Piece, RequestError, Sampling
from tokcom.cli.serve import Choice
from tokcom.processing_tokcom import text_ids


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
    """The figures of docs/serving.md, for a shorter time; limits are loose, since the machine may
    do other work."""
    results = measure(ROOT.parent, seconds=6)
    for name in ("whole", "streamed"):
        assert results[f"dead_clients_{name}"]["cpu_seconds"] < 2
    small = results["small_requests"]
    assert small["beside"]["p50"] < 4 * small["alone"]["p50"] + 1
    nonsense = results["nonsense"]
    assert nonsense["answers_afterwards"] and nonsense["explained"] == len(nonsense["statuses"])
    assert all(400 <= status < 500 for status in nonsense["statuses"])
    assert results["sigterm"]["exit"] == 0 and results["sigterm"]["request"] == 200
