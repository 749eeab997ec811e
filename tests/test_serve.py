"""The server speaks to the official `openai` client, and explains what it refuses."""

import json
import urllib.error
import urllib.request

import openai
import pytest
import torch
from helpers import exact_pipe, seeded
from serving import PROMPT, servers

from tokcom.cli import openai_format
from tokcom.cli.logprobs import TokenTexts
from tokcom.cli.main import build_parser
from tokcom.cli.scoring import score_tokens
from tokcom.cli.serve import is_loopback, warm_up
from tokcom.cli.server_settings import ServerSettings
from tokcom.processing_tokcom import text_ids


@pytest.fixture(scope="module")
def server(pipe):
    with servers() as make:
        yield make(pipe)


@pytest.mark.slow
def test_a_compiled_server_has_compiled_everything_once_it_is_warm(tokenizer):
    pipe = exact_pipe(tokenizer)
    pipe.model.requires_grad_(False)
    torch._dynamo.reset()
    graphs = []
    pipe.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    warm_up(pipe)
    warm = len(graphs)
    for count, prompt in ((1, "Squinty"), (4, "The pig"), (7, "He was a comical little pig")):
        pipe([prompt] * count, gen_length=30)
    pipe.infill("Squinty was ____ and went away.", 7, num_candidates=16)
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
    text = "Squinty was ____ went home."
    whole = pipe.infill(text, gap_length=6, num_candidates=16, generator=seeded(2)).texts[0]
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


def test_logprobs_begin_where_the_answer_does_behind_a_prompt_that_ends_in_a_space(server):
    options = dict(model="tokcom", max_tokens=10, seed=4, logprobs=3)
    plain = server.client().completions.create(prompt=PROMPT, **options).choices[0]
    spaced = server.client().completions.create(prompt=PROMPT + " ", **options).choices[0]
    dropped = len(plain.text) - len(spaced.text)  # the space of the first word, if it has one
    assert spaced.text == plain.text[dropped:]
    assert spaced.logprobs.token_logprobs == plain.logprobs.token_logprobs
    begins = [max(0, offset - dropped) for offset in plain.logprobs.text_offset]
    assert spaced.logprobs.text_offset == begins


@pytest.mark.parametrize("text", ["é 😀!", "plain"])
def test_the_bytes_of_tokens_join_to_those_of_the_text(tokenizer, text):
    texts = TokenTexts(tokenizer)
    ids = text_ids(tokenizer, text)
    assert bytes(b for token in ids for b in texts.bytes_of(token)).decode().strip() == text


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


def test_a_dialogue_that_the_template_refuses_is_the_clients_mistake(pipe, start):
    pipe.tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    try:
        client = start(pipe).client()
        with pytest.raises(openai.BadRequestError, match="no system role"):
            client.chat.completions.create(model="tokcom", messages=MESSAGES)
    finally:
        pipe.tokenizer.chat_template = None


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
