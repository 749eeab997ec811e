"""Laws of `TokComForCausalLM`: exact logits at every place, whatever the padding, the cache or the
company in a batch."""

import pytest
import torch
import torch.nn.functional as F
from helpers import build_model, seeded, tiny_config, tiny_pipeline
from transformers import DynamicCache, TextDiffusionStreamer, TextStreamer

from tokcom.modeling_causal_tokcom import TokComForCausalLM
from tokcom.pipeline_tokcom import TokComPipeline
from tokcom.processing_tokcom import vocabulary_size
from tokcom.sampling_tokcom import spawn_generators
from tokcom.scheduling_tokcom import TokComFlowMatchScheduler

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 320}


def causal(**overrides) -> TokComForCausalLM:
    base = build_model(**overrides)
    model = TokComForCausalLM(base.config).eval()
    model.load_state_dict(base.state_dict())
    return model


@pytest.fixture(scope="module")
def model() -> TokComForCausalLM:
    return causal()


def text(length: int = 32, rows: int = 2) -> torch.Tensor:
    return torch.randint(0, 320, (rows, length), generator=seeded())


@torch.no_grad()
@pytest.mark.parametrize("length", [29, 30, 31, 32])
def test_logits_are_the_likelihood_of_the_objective_at_every_length(model, length):
    ids = text(length)
    padded = F.pad(ids, (0, -length % 4))
    mask = F.pad(torch.ones_like(ids), (0, -length % 4))
    expected = model.objective.loss(model, padded, mask).token_losses.flatten(1)[:, 1:length]
    found = F.cross_entropy(model(ids).logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_what_follows_never_changes_the_logits_of_a_prefix(model):
    ids = text()
    whole = model(ids).logits
    for length in (1, 2, 13, 16, 19):
        torch.testing.assert_close(
            model(ids[:, :length]).logits, whole[:, :length], atol=1e-4, rtol=1e-4
        )


@torch.no_grad()
@pytest.mark.parametrize("padding", [1, 3, 6])
def test_padding_on_either_side_changes_nothing(model, padding):
    ids = text(19)
    expected = model(ids).logits
    mask = torch.ones_like(ids)
    left = model(F.pad(ids, (padding, 0), value=7), F.pad(mask, (padding, 0))).logits
    torch.testing.assert_close(left[:, padding:], expected, atol=1e-4, rtol=1e-4)
    right = model(F.pad(ids, (0, padding), value=7), F.pad(mask, (0, padding))).logits
    torch.testing.assert_close(right[:, :19], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_shorter_rows_go_on_behind_their_padding(model):
    ids = text(13, rows=2)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    batch = model.generate(ids, attention_mask=mask, max_new_tokens=6, **GREEDY)
    for row, length in enumerate((13, 7)):
        alone = model.generate(ids[row : row + 1, :length], max_new_tokens=6, **GREEDY)
        assert torch.equal(batch[row, 13:], alone[0, length:])


@torch.no_grad()
def test_a_loss_does_not_depend_on_the_side_of_the_padding(model):
    ids = text(11)
    mask = torch.ones_like(ids)
    expected = model(ids, labels=ids).loss
    for pad in ((5, 0), (0, 5)):
        labels = F.pad(ids, pad, value=-100)
        found = model(F.pad(ids, pad, value=7), F.pad(mask, pad), labels=labels).loss
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_what_transformers_allows_is_honoured_or_refused(model):
    ids = text(9)
    logits = model(ids).logits
    places = torch.tensor([3, 8])
    kept = model(ids, logits_to_keep=places).logits
    torch.testing.assert_close(kept, logits[:, places], atol=1e-4, rtol=1e-4)
    loss, found, *_ = model(ids, labels=ids, return_dict=False)
    assert loss.ndim == 0 and torch.equal(found, logits)
    with pytest.raises(ValueError, match=r"leave out `logits_to_keep` \(1\)"):
        model(ids, labels=ids, logits_to_keep=1)
    foreign = DynamicCache()
    assert model(ids, past_key_values=foreign).past_key_values is not None  # it holds nothing
    foreign.update(torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8), 0)
    with pytest.raises(ValueError, match="DynamicCache that holds tokens"):
        model(ids, past_key_values=foreign)


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[9, *range(10, 25)], [9, 24], [3, 4, 17, 24], [1, 24]])
def test_a_cache_changes_nothing_though_rows_are_at_different_places_of_their_chunks(model, cuts):
    ids = text(24, rows=3)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    mask[1, :2] = 0
    expected = model(ids, mask).logits
    cache = None
    parts = []
    start = 0
    for stop in cuts:
        output = model(ids[:, start:stop], mask[:, :stop], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
        start = stop
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_greedy_text_is_the_same_with_and_without_a_cache_and_in_any_batch(model):
    ids = text(10, rows=3)
    cached = model.generate(ids, max_new_tokens=14, **GREEDY)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=14, use_cache=False, **GREEDY))
    alone = model.generate(ids[1:2], max_new_tokens=14, **GREEDY)
    assert torch.equal(cached[1:2], alone)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    ragged = model.generate(ids, attention_mask=mask, max_new_tokens=6, **GREEDY)
    short = model.generate(ids[:1, 3:], max_new_tokens=6, **GREEDY)
    assert torch.equal(ragged[0, 10:], short[0, 7:])


@torch.no_grad()
@pytest.mark.parametrize(
    ["draws", "tolerance"],
    [(2000, 0.04), pytest.param(100_000, 0.006, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("remainder", [0, 1, 2, 3])
def test_the_block_sampler_draws_from_these_logits(tokenizer, stories, remainder, draws, tolerance):
    """At every length of a prompt modulo K: shares of the pipeline's draws against `exp(logits)`.

    The standard deviation of a share of 100,000 draws is at most 0.0016.
    """
    model = causal(vocab_size=vocabulary_size(tokenizer), num_inference_steps=4)  # one step a turn
    kept = [30, 50, 200]
    model.token_head.bias.data[:] = -30.0  # all but these become impossible
    model.token_head.bias.data[kept] = torch.tensor([1.0, 0.5, 0.0])
    ids = tokenizer(stories[0])["input_ids"]
    prompts = (tokenizer.decode(ids[: 8 + n]) for n in range(remainder, 40, 4))
    prompt = next(p for p in prompts if len(tokenizer(p)["input_ids"]) % 4 == remainder)
    expected = model(torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1].softmax(-1)[kept]
    pipe = TokComPipeline(
        model, TokComFlowMatchScheduler.from_model_config(model.config), tokenizer
    )
    pipe.set_progress_bar_config(disable=True)
    generator = seeded()
    count = torch.zeros(len(kept))
    for _ in range(draws // 2000):
        output = pipe([prompt] * 2000, gen_length=1, generator=generator, output_type="seq")
        count += torch.stack([(output.sequences[:, -1] == token).sum() for token in kept])
    torch.testing.assert_close(count / draws, expected, atol=tolerance, rtol=0)


def test_labels_give_the_mean_of_what_is_scored_and_a_gradient(model):
    ids = text(21)
    labels = ids.clone()
    labels[0, :9] = -100
    output = model(ids, labels=labels)
    losses = F.cross_entropy(output.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    torch.testing.assert_close(output.loss, losses.sum() / (labels[:, 1:] != -100).sum())
    output.loss.backward()
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert trained == {"transformer", "token_head"}


@torch.no_grad()
def test_only_the_logits_that_are_kept_are_computed(model):
    ids = text(14)
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, model(ids).logits[:, -2:])


@torch.no_grad()
def test_generate_takes_what_tools_pass(model):
    ids = text(9)
    options = {"max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 320}
    first = model.generate(ids, do_sample=True, seed=3, top_k=20, top_p=0.9, **options)
    assert torch.equal(
        first, model.generate(ids, do_sample=True, seed=3, top_k=20, top_p=0.9, **options)
    )
    assert model.generate(ids, num_beams=3, **options).shape == (2, 14)
    assert model.generate(ids, do_sample=True, num_return_sequences=2, **options).shape == (4, 14)
    cold = model.generate(ids, do_sample=True, temperature=0, **options)
    assert torch.equal(cold, model.generate(ids, do_sample=False, **options))


@pytest.fixture(scope="module")
def pipe(tokenizer) -> TokComPipeline:
    model = causal(vocab_size=vocabulary_size(tokenizer), num_inference_steps=4)
    pipe = TokComPipeline(
        model, TokComFlowMatchScheduler.from_model_config(model.config), tokenizer
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def test_a_score_is_the_likelihood_of_the_logits_in_any_batch(pipe, tokenizer):
    texts = ["Squinty was a pig.", "He", "Mr. Rabbit went home to his wife."]
    for text, score in zip(texts, pipe.score(texts)):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        losses = F.cross_entropy(pipe.model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        assert (score.tokens, score.characters) == (ids.shape[1], len(text))
        assert score.token_nats[1:] == pytest.approx(losses.tolist(), rel=1e-4, abs=1e-4)
        assert score.nats == pytest.approx(sum(score.token_nats))
        assert score.nats_per_character == pytest.approx(score.nats / len(text))
        alone = pipe.score(text)[0]
        assert alone.nats == pytest.approx(score.nats, rel=1e-4)


def test_a_gap_of_unknown_length_gets_the_likeliest_of_several(pipe):
    text = "Squinty was a _______ pig."
    best = pipe.infill(text, gap_length=None, num_candidates=8, generator=seeded()).texts[0]
    assert best.startswith("Squinty was a") and best.endswith(" pig.") and "_" not in best
    sources = spawn_generators(seeded(), 8)
    others = [pipe.infill(text, 1 + i, generator=s).texts[0] for i, s in enumerate(sources)]
    scores = {text: pipe.score(text)[0].nats_per_character for text in others}
    assert best == min(scores, key=scores.get)


def test_of_several_fillings_of_one_length_the_likeliest_is_kept(pipe):
    text = "Squinty was a _______ pig."
    best = pipe.infill(text, gap_length=2, num_candidates=4, generator=seeded()).texts[0]
    sources = spawn_generators(seeded(), 4)
    others = [pipe.infill(text, gap_length=2, generator=s).texts[0] for s in sources]
    scores = {text: pipe.score(text)[0].nats_per_character for text in others}
    assert best == min(scores, key=scores.get) and len(set(others)) > 1
    with pytest.raises(ValueError, match="num_candidates"):
        pipe.infill(text, gap_length=2, num_candidates=0)


def test_models_without_exact_likelihoods_score_nothing(build):
    with pytest.raises(ValueError, match="exact likelihoods"):
        build().score("Squinty")


@torch.no_grad()
def test_the_pad_token_is_never_generated(model):
    assert model(text(7)).logits[..., 320].isinf().all()


@torch.no_grad()
def test_a_streamer_receives_the_text(model, tokenizer, capsys):
    streamer = TextStreamer(tokenizer, skip_prompt=False)
    ids = text(9, rows=1)
    generated = model.generate(ids.clamp_max(299), max_new_tokens=5, streamer=streamer, **GREEDY)
    assert tokenizer.decode(generated[0]) in capsys.readouterr().out


class Recorder(TextDiffusionStreamer):
    """Keeps what it receives instead of printing it."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer)
        self.received: list[tuple[str, list[int]]] = []

    def put_draft(self, value, **kwargs):
        self.received.append(("draft", value.tolist()))

    def put(self, value):
        self.received.append(("put", value.flatten().tolist()))

    def end(self):
        self.received.append(("end", []))

    def all(self, kind: str) -> list[list[int]]:
        return [ids for what, ids in self.received if what == kind]


@torch.no_grad()
def test_a_streamer_with_drafts_sees_the_rest_of_the_chunk_before_each_token(model, tokenizer):
    ids = text(10, rows=1)
    streamer = Recorder(tokenizer)
    generated = model.generate(ids, max_new_tokens=6, streamer=streamer, **GREEDY)
    assert torch.equal(generated, model.generate(ids, max_new_tokens=6, **GREEDY))
    new = generated[0, 10:].tolist()
    drafts = streamer.all("draft")
    assert [len(draft) for draft in drafts] == [2, 1, 4, 3, 2, 1]
    assert [draft[0] for draft in drafts] == new  # greedy text is what was likeliest
    assert streamer.all("put") == [ids[0].tolist(), *([token] for token in new)]
    with pytest.raises(ValueError, match="drafts, which come from the cache"):
        model.generate(ids, max_new_tokens=2, streamer=streamer, use_cache=False, **GREEDY)


def test_the_pipeline_shows_every_denoising_step_to_a_streamer_with_drafts(pipe, tokenizer):
    prompt = "Squinty was a pig."
    streamer = Recorder(tokenizer)
    output = pipe(prompt, 10, streamer=streamer, generator=seeded())
    assert output.texts == pipe(prompt, 10, generator=seeded()).texts
    first, *blocks = streamer.all("put")
    assert first == tokenizer(prompt)["input_ids"]
    assert sum(blocks, []) == output.sequences[0].tolist()
    kinds = [kind for kind, _ in streamer.received[1:]]
    assert kinds == (["draft"] * 4 + ["put"]) * len(blocks) + ["end"]
    lengths = [len(ids) for _, ids in streamer.received[1:-1]]
    assert lengths == [len(block) for block in blocks for _ in range(5)]


def test_the_beginning_of_a_prompt_beyond_the_window_is_left_out_on_request(pipe, tokenizer):
    words = "Squinty was a pig. " * 40
    ids = tokenizer(words.rstrip(" "))["input_ids"]
    limit = pipe.max_length
    assert len(ids) > limit
    with pytest.raises(ValueError, match="truncation='left'"):
        pipe(words)
    kept = ids[-(-(len(ids) - limit) // 4) * 4 :]  # whole chunks are left out
    streamer = Recorder(tokenizer)
    output = pipe(words, 6, truncation="left", streamer=streamer, generator=seeded())
    assert streamer.all("put")[0] == kept
    pieces = pipe.stream(words, 6, truncation="left", generator=seeded())
    assert "".join(pieces) == output.texts[0]
    with pytest.raises(ValueError, match="must be None or 'left'"):
        pipe(words, truncation=True)


@pytest.mark.parametrize(
    ["method", "argument", "advice"],
    [
        ("__call__", "max_new_tokens", "write `gen_length`"),
        ("__call__", "seed", r"write generator=torch.Generator\(\).manual_seed\(seed\)"),
        ("__call__", "guidence_scale", "write `guidance_scale`"),
        ("stream", "max_length", "write `gen_length`"),
        ("infill", "max_new_tokens", "write `gap_length`"),
        ("generate", "max_tokens", "write `num_chunks`"),
        ("score", "text", "write `texts`"),
        ("encode", "verbose", r"\(it takes text, output_file\)"),
    ],
)
def test_an_unknown_argument_is_called_so_and_the_near_miss_is_named(
    pipe, method, argument, advice
):
    with pytest.raises(TypeError, match=f"{method} has no argument `{argument}`.*{advice}"):
        getattr(pipe, method)("Squinty", **{argument: 1})


def test_media_pipelines_name_near_misses_too():
    image = tiny_pipeline("image")
    with pytest.raises(TypeError, match="no argument `num_steps`; write `num_inference_steps`"):
        image(num_steps=3)


def test_what_cannot_be_done_is_refused_by_name(model):
    ids = text(9)
    with pytest.raises(ValueError, match="more than the model's maximum of 128"):
        model(torch.zeros(1, 129, dtype=torch.long))
    with pytest.raises(ValueError, match="lower `max_new_tokens`"):
        model.generate(ids, max_new_tokens=500, **GREEDY)
    for name, value in (("prompt_lookup_num_tokens", 3), ("guidance_scale", 1.5)):
        with pytest.raises(ValueError, match=f"`{name}` .* does not exist here"):
            model.generate(ids, max_new_tokens=5, **{name: value}, **GREEDY)
    with pytest.raises(ValueError, match="inputs_embeds"):
        model(ids, inputs_embeds=torch.zeros(1, 1, 1))
    with pytest.raises(ValueError, match="cannot be resized"):
        model.resize_token_embeddings(400)
    with pytest.raises(ValueError, match="prediction_type.*'latents'"):
        TokComForCausalLM(tiny_config())


def test_the_configuration_answers_what_tools_ask(model):
    config = model.config
    answers = (
        config.vocab_size,
        config.hidden_size,
        config.num_hidden_layers,
        config.max_position_embeddings,
    )
    assert answers == (321, 64, 2, 128)
