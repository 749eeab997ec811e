import copy

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from helpers import STOCK_SCHEDULERS, seeded
from safetensors import safe_open
from transformers import TextStreamer

from tokcom.heads_tokcom import TokComChoice
from tokcom.interface_tokcom import continue_text
from tokcom.modeling_tokcom import TokComModel
from tokcom.pipeline_tokcom import TokComPipeline
from tokcom.processing_tokcom import end_at_eos
from tokcom.sampling_tokcom import TokComSampling, spawn_generators, split_blocks
from tokcom.scheduling_tokcom import TokComFlowMatchScheduler
from tokcom.training.data import train_tokenizer

PROMPTS = ["The family of four was ", "Squinty"]
FORMS = [{"block_size": None}, {"block_size": 2}]


@pytest.mark.parametrize("transformer_config", FORMS)
def test_prompts_of_different_lengths_in_one_batch_equal_single_calls(build, transformer_config):
    pipe = build(transformer_config=transformer_config)
    noise = torch.randn(2, 4, 16, generator=seeded())
    options = dict(gen_length=16, num_inference_steps=3, output_type="latent")
    batch = pipe(PROMPTS, latents=noise, **options).latents
    for i, prompt in enumerate(PROMPTS):
        single = pipe(prompt, latents=noise[i : i + 1], **options).latents
        torch.testing.assert_close(batch[i : i + 1], single, atol=1e-4, rtol=1e-3)


TOKENS = {"prediction_type": "tokens", "codec_config": {"encoder_type": "token"}}
KINDS = {
    "one network": {},
    "context layers": {"transformer_config": {"num_context_layers": 1}},
    "tokens": {**TOKENS, "transformer_config": {"num_context_layers": 1}},
    "tokens in turns": {
        **TOKENS,
        "token_stagger": 0.5,
        "transformer_config": {"num_context_layers": 1},
    },
    "head without attention": {
        **TOKENS,
        "token_stagger": 1.0,
        "transformer_config": {"num_context_layers": 1, "head_attention": False, "block_size": 1},
    },
}


@pytest.mark.parametrize("prompt", ["whole chunks", None])
@pytest.mark.parametrize("kind", KINDS)
def test_block_causal_sampling_with_cache_equals_the_uncached_computation(build, kind, prompt):
    """Several blocks, sampled by the pipeline and by hand with the training mask over all
    latents."""
    from tokcom.transformer_tokcom import block_causal_mask

    own = KINDS[kind].get("transformer_config", {})
    overrides = {**KINDS[kind], "transformer_config": {"block_size": 2, **own}}
    size = overrides["transformer_config"]["block_size"]
    pipe = build(**overrides)
    for name, parameter in pipe.model.transformer.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    noise, draws = torch.randn(1, 4, 16, generator=seeded()), spawn_generators(seeded(1), 1)[0]
    options = dict(num_inference_steps=2, latents=noise, output_type="latent", generator=seeded(1))
    if prompt is None:
        sampled = pipe.generate(num_chunks=4, **options)
        known, real = torch.zeros(1, 0, 16), torch.ones(1, 0, dtype=torch.bool)
    else:
        prompt = pipe.tokenizer.decode(
            pipe.tokenizer("The family of four was not at home.")["input_ids"][:8]
        )
        sampled = pipe(prompt, gen_length=16, **options)
        context, _ = pipe.encode_prompt([prompt])
        known, real = context.latents, context.mask

    done, n, blocks, ids = known, known.shape[1], [], None
    for x in noise.split(size, dim=1):
        m = done.shape[1]
        before, after = (torch.arange(n) + n % size) // size, n + torch.arange(m - n) // size
        order = torch.cat((before, after, torch.full((size,), 99)))[None]
        valid = torch.cat((real, torch.ones(1, m - n + size, dtype=torch.bool)), dim=1)
        mask = block_causal_mask(order, valid)[:, : m + size, : m + size]
        pipe.scheduler.set_timesteps(2)
        grid = (
            pipe.scheduler.sigmas.tolist()
            if not pipe._sampler().planner.takes_turns
            else [1.0, 0.5, 0.0]
        )
        uniforms = (
            torch.rand(2, size, 4, generator=draws) if pipe.model.token_head else [None, None]
        )
        for sigma, following, uniform in zip(grid, grid[1:], uniforms):
            now, then = (torch.full((1, size), 1 - s) for s in (sigma, following))
            both, time = torch.cat((done, x), dim=1), torch.cat((torch.ones(1, m), now), dim=1)
            with torch.no_grad():
                states = pipe.model.predict(both, time, attention_mask=mask, num_context=m).latents[
                    :, -size:
                ]
                x1, head = states, pipe.model.token_head
                if head is not None:
                    symbols, times = pipe.model.symbols(), head.place_times(now)
                    chosen = TokComChoice.of((times < 1) & (head.progress(then) > 0))
                    drawn = head.draw(states, symbols, x, times, chosen, uniform[None])
                    ids = drawn if sigma == 1 else torch.where(times == 1, ids, drawn)
                    x1 = head.latents_of(symbols, ids)
            now, then = (pipe.model.channel_times(t) for t in (now, then))
            x = x + (then - now) / (1 - now).clamp_min(1e-6) * (x1 - x)
        blocks.append(x)
        decoded = pipe.model.to_ids(x) if head is None else ids.flatten(1)
        done = torch.cat(
            (done, pipe.model.encode(decoded).latents), dim=1
        )  # the context is clean text
    torch.testing.assert_close(sampled.latents, torch.cat(blocks, dim=1), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("transformer_config", FORMS)
def test_same_generator_same_text_and_other_seed_other_text(build, transformer_config):
    pipe = build(transformer_config=transformer_config)
    first, second, third = (
        pipe(
            "Squinty",
            gen_length=16,
            num_inference_steps=2,
            generator=seeded(s),
            output_type="latent",
        ).latents
        for s in (0, 0, 1)
    )
    assert torch.equal(first, second) and not torch.equal(first, third)


def test_output_types(build):
    pipe = build()
    text = pipe(PROMPTS, gen_length=10, num_inference_steps=1)
    assert len(text.texts) == 2 and text.sequences.shape == (2, 10)
    ids = pipe(PROMPTS, gen_length=10, num_inference_steps=1, output_type="seq")
    assert ids.texts is None and ids.sequences.shape == (2, 10)
    latents = pipe(PROMPTS, gen_length=10, num_inference_steps=1, output_type="latent")
    assert latents.sequences is None and latents.latents.shape == (2, 3, 16)
    assert isinstance(pipe(PROMPTS, gen_length=4, num_inference_steps=1, return_dict=False), tuple)


def test_eos_ends_a_text(build):
    pipe = build()
    eos, pad = pipe.tokenizer.eos_token_id, pipe.model.config.codec_config.pad_token_id
    sequences, mask = end_at_eos(torch.tensor([[5, eos, 6, eos], [5, 6, 7, 8]]), eos, pad)
    assert sequences.tolist() == [[5, eos, pad, pad], [5, 6, 7, 8]]
    assert mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    decoded = torch.full((2, 8), eos)
    pipe.model.to_ids = lambda latents: decoded[:, : latents.shape[1] * 4]
    output = pipe(PROMPTS, gen_length=40, num_inference_steps=1)
    assert output.texts == ["", ""] and output.sequences.shape == (2, 40)
    assert output.latents.shape[1] < 10  # sampling stopped once every text had ended


def test_continuation_follows_the_prompt_with_one_space(build):
    pipe = build()
    known, new = pipe.tokenizer("He was")["input_ids"], pipe.tokenizer(" here")["input_ids"]
    assert continue_text(pipe.tokenizer, "He was ", known, new) == "here"
    assert continue_text(pipe.tokenizer, "He was", known, new) == " here"


def test_continuation_keeps_the_space_of_tokenizers_that_strip_it(build):
    """SentencePiece-style decoding drops the first space, so a continuation cannot be decoded on
    its own."""
    pipe = build()
    decode = pipe.tokenizer.decode
    known, new = pipe.tokenizer("He was")["input_ids"], pipe.tokenizer(" here")["input_ids"]
    pipe.tokenizer = type(pipe.tokenizer)(
        tokenizer_object=pipe.tokenizer.backend_tokenizer, eos_token="</s>"
    )
    pipe.tokenizer.decode = lambda ids, **k: decode(ids, **k).removeprefix(" ")
    assert continue_text(pipe.tokenizer, "He was", known, new) == " here"


def test_blocks_never_cross_an_edge():
    assert split_blocks(7, 2, (3,)) == [slice(0, 2), slice(2, 3), slice(3, 5), slice(5, 7)]
    assert split_blocks(7, None, (3,)) == [slice(0, 7)]


def test_callback_sees_and_replaces_latents(build):
    pipe, steps = build(transformer_config={"block_size": 2}), []

    def callback(pipe, index, timestep, tensors):
        steps.append(index)
        return {"latents": torch.zeros_like(tensors["latents"])}

    output = pipe(
        "Hi",
        gen_length=16,
        num_inference_steps=3,
        callback_on_step_end=callback,
        output_type="latent",
    )
    assert steps == list(range(6)) and not output.latents.any()


@pytest.mark.parametrize("transformer_config", FORMS)
def test_guidance_of_one_is_off_and_two_extrapolates_from_the_unconditional(
    build, transformer_config
):
    pipe = build(transformer_config={**transformer_config})
    noise = torch.randn(1, 2, 16, generator=seeded())

    def one_step(**options):
        options = (
            dict(gen_length=8, num_inference_steps=1, latents=noise, output_type="latent") | options
        )
        return pipe("Squinty was", **options).latents

    context = pipe.encode_prompt(["Squinty was"])[0].latents.shape[1]
    positions = context + torch.arange(2)[None, :, None]
    with torch.no_grad():
        free = pipe.model.denoise(noise, 0.0, positions).latents
    conditional = one_step()
    torch.testing.assert_close(
        one_step(guidance_scale=3.0), free + 3 * (conditional - free), atol=1e-3, rtol=1e-3
    )
    guided = one_step(guidance_scale=3.0)
    pipe.model.config.sampling_guidance_scale = 3.0
    assert torch.equal(one_step(), guided)


def test_text_longer_than_the_window_is_generated_with_a_bounded_cache(build):
    pipe = build(transformer_config={"block_size": 2, "max_position_embeddings": 8})
    seen = []
    predict = pipe.model.predict

    def spy(*args, **kwargs):
        output = predict(*args, **kwargs)
        seen.extend(layer.keys.shape[2] for layer in kwargs["past_key_values"].layers)
        return output

    pipe.model.predict = spy
    assert pipe.generate(num_chunks=20, num_inference_steps=1).sequences.shape == (1, 80)
    assert set(seen) == {8}
    prompt = pipe.tokenizer.decode(
        pipe.tokenizer("Squinty was a pig and ran home again to his pen.")["input_ids"][:32]
    )
    seen.clear()
    pipe(prompt, gen_length=40, num_inference_steps=1)
    assert set(seen) == {8}


def test_reconstruct_denoise_encode_and_decode_agree(build, tmp_path):
    pipe, texts = build(), ["Squinty was a little pig.", "Hi"]
    encoded = pipe.encode(texts, tmp_path / "latents.safetensors")
    assert (
        encoded.latents.shape[0] == 2
        and encoded.latents.shape[1] * 4 == encoded.attention_mask.shape[1]
    )
    plain = pipe.reconstruct(texts)
    assert pipe.decode(tmp_path / "latents.safetensors").texts == plain.texts
    assert pipe.decode(encoded.latents, encoded.attention_mask).texts == plain.texts
    assert pipe.denoise_reconstruct(texts, noise_level=1.0).texts == plain.texts


def test_denoise_reconstruct_keeps_the_promised_share_of_the_text(build):
    """An oracle denoiser turns every noise level back into the text, in steps x (1 - level)
    calls."""
    pipe, calls = build(transformer_config={"block_size": None}), []
    encoded = pipe.encode("Squinty was a little pig.")

    def oracle(latents, timestep, *args, **kwargs):
        calls.append(float(timestep[0, 0]))
        return type("O", (), {"latents": encoded.latents})()

    pipe.model.predict = oracle
    for level, steps in ((0.0, 20), (0.3, 14), (0.75, 5), (0.9, 2)):
        calls.clear()
        output = pipe.denoise_reconstruct(
            "Squinty was a little pig.", level, num_inference_steps=20
        )
        assert output.texts == pipe.reconstruct("Squinty was a little pig.").texts
        assert len(calls) == steps and calls[0] == pytest.approx(level, abs=1e-6)


@pytest.mark.parametrize("transformer_config", FORMS)
def test_infill_keeps_the_known_text_and_depends_on_what_follows(build, transformer_config):
    pipe = build(transformer_config=transformer_config)

    def fill(text):
        return pipe.infill(text, gap_length=8, num_inference_steps=2, generator=seeded())

    output = fill("Squinty was a ____ who ran ____ home.")
    assert output.texts[0].startswith("Squinty was a ") and output.texts[0].endswith(" home.")
    assert " who ran " in output.texts[0] and output.sequences.shape == (2, 8)
    other = fill("Squinty was a ____ who sat ____ away.")
    assert not torch.equal(output.latents[:, :2], other.latents[:, :2])


@pytest.mark.parametrize("stock", STOCK_SCHEDULERS)
def test_stock_schedulers_bring_the_pipeline_to_an_oracles_answer(build, stock):
    pipe = build(transformer_config={"block_size": None})
    target = torch.randn(1, 4, 16, generator=seeded(5))
    pipe.model.predict = lambda latents, *a, **k: type(
        "O", (), {"latents": target.expand(len(latents), -1, -1)}
    )()
    pipe.scheduler = stock.from_config(pipe.scheduler.config)
    latents = pipe.generate(
        num_chunks=4, num_inference_steps=12, output_type="latent", generator=seeded()
    ).latents
    torch.testing.assert_close(latents, target, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("stock", STOCK_SCHEDULERS)
def test_starting_between_noise_and_text_works_or_is_refused_by_name(build, stock):
    pipe = build()
    pipe.scheduler = stock.from_config(pipe.scheduler.config)
    try:
        assert pipe.denoise_reconstruct("Squinty", 0.6, num_inference_steps=10).texts
        assert abs(float(pipe.scheduler.sigmas[0]) - 0.4) < 1e-3
    except ValueError as error:
        assert stock.__name__ in str(error) and "TokComFlowMatchScheduler" in str(error)
        assert stock is not FlowMatchEulerDiscreteScheduler


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p(""), "`prompt` is empty.*generate"),
        (lambda p: p("   "), "`prompt` is empty"),
        (lambda p: p([]), "empty list"),
        (lambda p: p(3), "not 3 of type int"),
        (lambda p: p(["Hi", "Ho"], generator=[seeded()]), "1 entries but there are 2 samples"),
        (lambda p: p.generate(num_chunks=1, batch_size=0), r"`batch_size` \(0\)"),
        (lambda p: p.infill(["a ____"]), "one text"),
        (lambda p: p("word " * 500), "tokens, more than the model's maximum of 128"),
        (lambda p: p("Hi", num_inference_steps=0), r"`num_inference_steps` \(0\)"),
        (lambda p: p("Hi", gen_length=0), r"`gen_length` \(0\)"),
        (lambda p: p("Hi", output_type="image"), "'image'"),
        (lambda p: p("Hi", latents=torch.zeros(1, 1, 3)), r"\(1, 1, 3\)"),
        (lambda p: p("Hi", callback_on_step_end_tensor_inputs=["noise"]), "noise"),
        (lambda p: p.denoise_reconstruct("Hi", noise_level=-0.1), r"\(-0.1\).*\[0, 1\]"),
        (lambda p: p.denoise_reconstruct("Hi", noise_level="x"), r"\('x'\).*\[0, 1\]"),
        (lambda p: p("Hi", generator=3), r"\(3\).*manual_seed"),
        (lambda p: p("Hi", guidance_scale=-1.0), r"\(-1.0\) must be finite and not negative"),
        (lambda p: p("Hi", callback_on_step_end=5), r"\(5\) must be a function"),
        (lambda p: p.decode([1, 2]), r"not \[1, 2\]"),
        (lambda p: p.decode(torch.full((1, 2, 16), torch.nan)), "NaN"),
        (lambda p: p("a\ud800b"), "not valid Unicode"),
        (lambda p: p.denoise_reconstruct("Hi", noise_level=1.1), r"\(1.1\).*\[0, 1\]"),
        (lambda p: p.denoise_reconstruct("Hi", num_inference_steps=0), r"\(0\)"),
        (lambda p: p.generate(num_chunks=0), r"\(0\)"),
        (lambda p: p.infill("a ____", None, num_candidates=7), "at least 8 without a `gap_length`"),
        (lambda p: p.infill("a ____", 2, num_candidates=2), "give a `gap_length` and `num_cand"),
        (
            lambda p: p("Hi", streamer=TextStreamer(p.tokenizer), output_type="latent"),
            "`streamer` shows text",
        ),
        (lambda p: p("Hi", guidance_scale={"text": 2.0}), "give a number"),
        (lambda p: p.infill("no gap"), "____"),
        (lambda p: p.infill("____"), "____"),
        (lambda p: p.infill("word " * 100 + "____"), "more than the model's maximum of 128"),
        (lambda p: p.decode(__file__), "not a latents file"),
        (lambda p: p.decode(torch.zeros(1, 2, 16), torch.ones(1, 5)), r"\(1, 5\).*\(1, 8\)"),
        (lambda p: p.decode(torch.zeros(2, 3)), r"\(2, 3\)"),
    ],
)
def test_bad_input_is_named(build, call, message):
    with pytest.raises(ValueError, match=message):
        call(build())


def test_bidirectional_model_refuses_more_than_it_can_see(build):
    with pytest.raises(ValueError, match="maximum of 128"):
        build(transformer_config={"block_size": None})("Hi", gen_length=500)
    with pytest.raises(ValueError, match="maximum of 128"):
        build(transformer_config={"block_size": None}).denoise_reconstruct("word " * 200)


def test_interrupted_text_ends_before_the_block_that_is_not_finished(build):
    pipe = build(transformer_config={"block_size": 2})
    steps = pipe.model.config.num_inference_steps

    def stop_at(last):
        def callback(pipe, index, timestep, tensors):
            pipe._interrupt = index >= last
            return tensors

        return pipe("Hi", gen_length=48, generator=seeded(), callback_on_step_end=callback)

    whole = stop_at(10**6)
    for last, blocks in ((2 * steps - 1, 2), (2 * steps, 2), (steps, 1), (0, 0)):
        part = stop_at(last)
        kept = 8 * blocks
        assert part.latents.shape[1] == 2 * blocks and part.attention_mask.sum() == kept
        assert torch.equal(part.sequences[:, :kept], whole.sequences[:, :kept])


def test_tokenizer_of_another_vocabulary_is_refused(build, stories):
    pipe = build()
    other = train_tokenizer(stories, 400)
    with pytest.raises(ValueError, match="400 tokens.*320"):
        TokComPipeline(pipe.model, pipe.scheduler, other)


def test_without_tokenizer_ids_and_latents_still_work(build):
    model = build().model
    assert isinstance(model, TokComModel)
    pipe = TokComPipeline(model, TokComFlowMatchScheduler())
    pipe.set_progress_bar_config(disable=True)
    output = pipe.generate(num_chunks=2, num_inference_steps=1)
    assert output.texts is None and output.sequences.shape == (1, 8)
    with pytest.raises(ValueError, match="no tokenizer"):
        pipe("Hi")


class Recorder:
    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, ids):
        self.pieces.append(ids)

    def end(self):
        self.ended = True


def test_a_streamer_gets_the_whole_text_where_the_tokenizer_knows_no_end(build):
    pipe = build(transformer_config={"block_size": 2})
    pipe.tokenizer = copy.deepcopy(pipe.tokenizer)  # other tests have the same one
    pipe.tokenizer.eos_token = None
    recorder = Recorder()
    pipe("Squinty", gen_length=12, num_inference_steps=2, streamer=recorder)
    assert recorder.ended and sum(len(piece) for piece in recorder.pieces[1:]) == 12


@pytest.mark.parametrize("gen_length", [16, 13])
def test_streamed_text_is_the_text(build, gen_length):
    pipe = build(transformer_config={"block_size": 2})
    options = dict(gen_length=gen_length, num_inference_steps=2)
    whole = pipe("Squinty", generator=seeded(), **options)
    pieces = list(pipe.stream("Squinty", generator=seeded(), **options))
    assert "".join(pieces) == whole.texts[0] and len(pieces) > 1
    recorder = Recorder()
    again = pipe("Squinty", generator=seeded(), streamer=recorder, **options)
    prompt, *blocks = recorder.pieces
    assert again.texts == whole.texts and recorder.ended
    assert prompt.tolist() == [pipe.tokenizer("Squinty")["input_ids"]]
    assert torch.cat(blocks).tolist() == whole.sequences[0][whole.attention_mask[0].bool()].tolist()
    with pytest.raises(ValueError, match="2 prompts"):
        pipe(PROMPTS, streamer=recorder, **options)


def test_streaming_yields_a_block_before_the_next_is_computed(build):
    pipe = build(transformer_config={"block_size": 1, "max_position_embeddings": 8})
    calls = []
    pipe.model.transformer.register_forward_hook(lambda *args: calls.append(1))
    stream = pipe.stream("Squinty", gen_length=4000, num_inference_steps=1, generator=seeded())
    next(stream)
    assert len(calls) < 10  # of two thousand


def test_a_quantised_text_is_stored_as_codes(build, tmp_path):
    pipe = build(codec_config={"quantizer": "vq", "num_codes": 64, "num_quantizers": 2})
    pipe.model.codec.train().training_loss(torch.randint(0, 300, (4, 32)))
    pipe.model.eval()
    encoded = pipe.encode(["Squinty was a little pig.", "Hi"], tmp_path / "codes.safetensors")
    assert encoded.codes.shape == (*encoded.latents.shape[:2], 2)
    texts = pipe.decode(encoded.latents, encoded.attention_mask).texts
    assert pipe.decode(tmp_path / "codes.safetensors").texts == texts
    assert pipe.decode(encoded.codes, encoded.attention_mask).texts == texts
    with safe_open(tmp_path / "codes.safetensors", "pt") as stored:
        assert (
            set(stored.keys()) == {"codes", "attention_mask"}
            and stored.get_tensor("codes").dtype == torch.int16
        )


def test_a_dialogue_is_its_chat_template_or_its_lines(build):
    pipe, options = build(), {"gen_length": 8, "num_inference_steps": 2}
    turns = [{"role": "user", "content": "Who was Squinty?"}]
    plain = pipe("Who was Squinty?", generator=seeded(), **options)
    assert pipe(turns, generator=seeded(), **options).texts == plain.texts
    assert pipe([turns, turns], generator=[seeded(), seeded()], **options).texts == plain.texts * 2
    pipe.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} Answer: {% endfor %}"
    try:
        templated = pipe("Who was Squinty? Answer: ", generator=seeded(), **options)
        assert pipe(turns, generator=seeded(), **options).texts == templated.texts
    finally:
        pipe.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="'role', 'content'"):
        pipe([{"content": "Who?"}], **options)


@pytest.mark.parametrize("head_attention", [True, False])
def test_one_compiled_graph_serves_all_blocks(build, head_attention):
    """No graph breaks, and after the first blocks nothing is compiled again, however long the
    text."""
    shape = {"block_size": 1, "num_context_layers": 1, "head_attention": head_attention}
    config = {
        "prediction_type": "tokens",
        "codec_config": {"encoder_type": "token"},
        "transformer_config": shape,
    }
    plain, pipe = build(**config), build(**config)
    torch._dynamo.reset()
    graphs, compiled = [], None

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    pipe.model.requires_grad_(False)
    pipe.compile(backend=count, fullgraph=True)
    for num_chunks in (3, 40):  # the window holds 32 latents
        options = dict(num_chunks=num_chunks, num_inference_steps=3, output_type="seq")
        found, expected = (
            p.generate(generator=seeded(), **options).sequences for p in (pipe, plain)
        )
        assert torch.equal(found, expected)
        compiled = compiled if num_chunks == 40 else len(graphs)
    assert len(graphs) == compiled


def test_a_bidirectional_model_recognises_the_tokens_of_its_prompt_once(build, monkeypatch):
    pipe = build(**TOKENS, transformer_config={"block_size": None})
    head, calls = pipe.model.token_head, []
    recognise = head.recognise
    monkeypatch.setattr(head, "recognise", lambda *args: calls.append(args) or recognise(*args))
    pipe("Squinty was a little pig.", gen_length=8, num_inference_steps=6, generator=seeded())
    assert len(calls) == 1


def test_temperature_needs_token_probabilities(build):
    with pytest.raises(ValueError, match="temperature"):
        build()("Squinty", gen_length=4, num_inference_steps=1, temperature=0.5)
    tokens = build(prediction_type="tokens", codec_config={"encoder_type": "token"})
    tokens("Squinty", gen_length=4, num_inference_steps=1, temperature=0.5)
    tokens.infill("Squinty ____ pig", gap_length=4, top_p=0.5)
    for name, bad in (("temperature", 0.0), ("top_p", 0.0), ("top_p", 1.5)):
        with pytest.raises(ValueError, match=name):
            tokens.generate(1, **{name: bad})


def test_settings_that_the_caller_does_not_name_are_the_models_own(build):
    own = {"sampling_temperature": 0.7, "sampling_top_p": 0.9, "num_inference_steps": 3}
    pipe = build(prediction_type="tokens", codec_config={"encoder_type": "token"}, **own)
    found = pipe._sampler(TokComSampling(top_p=0.5)).sampling
    assert (found.temperature, found.top_p, found.num_inference_steps) == (0.7, 0.5, 3)


def test_rows_of_a_streamed_batch_are_the_texts_of_each_at_its_own_length(build):
    pipe = build(transformer_config={"block_size": 2})
    prompts, lengths = ["Squinty", "The family of four was ", "One fine day"], [9, 24, 5]
    generators = [seeded(i) for i in range(3)]
    rows = list(pipe.stream_batch(prompts, lengths, 4, generator=generators))
    for i, (prompt, length) in enumerate(zip(prompts, lengths)):
        expected = pipe(prompt, gen_length=length, num_inference_steps=4, generator=[seeded(i)])
        assert "".join(pieces[i].text for pieces in rows) == expected.texts[0]
        assert rows[-1][i].tokens == int(expected.attention_mask.sum())
        ended = pipe.tokenizer.eos_token_id in expected.sequences[0]
        assert rows[-1][i].finish_reason == ("stop" if ended else "length")
    with pytest.raises(ValueError, match="2 entries for 1 prompts"):
        next(pipe.stream_batch(["a"], [1, 2]))


def test_a_default_temperature_is_nothing_to_models_without_probabilities(build):
    pipe = build(sampling_temperature=0.85, sampling_top_p=0.9)
    plain = build()
    made = (
        p.generate(4, num_inference_steps=2, generator=seeded()).sequences for p in (pipe, plain)
    )
    assert torch.equal(*made)
    with pytest.raises(ValueError, match="temperature.*0.85"):
        pipe.generate(4, temperature=0.85)


@pytest.mark.parametrize(
    "codes, message",
    [([[[99]]], "between 99 and 99.*16"), ([[[-1]]], "-1"), ([[[1, 2]]], r"\(1, 1, 2\)")],
)
def test_codes_that_do_not_exist_are_named(build, codes, message):
    quantizer = {"quantizer": "fsq", "fsq_levels": [2, 2, 2, 2], "latent_channels": 4}
    pipe = build(codec_config=quantizer, transformer_config={"latent_channels": 4})
    with pytest.raises(ValueError, match=message):
        pipe.decode(torch.tensor(codes))
