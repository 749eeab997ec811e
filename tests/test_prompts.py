"""Laws of sampling token models: one alignment, gaps that see both sides, steps on turns, a seed
gives a prefix."""

import helpers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from helpers import TURNS, exact_pipe, quiet_pipe, seeded, tiny_config

from tokcom import context_tokcom
from tokcom.context_tokcom import CachedContext
from tokcom.evaluation.studies.infilling import token_nats
from tokcom.modeling_tokcom import TokComModel
from tokcom.pipeline_tokcom import TokComPipeline
from tokcom.processing_tokcom import take_new, text_ids, vocabulary_size
from tokcom.sampling_tokcom import TokComSampling, kept_tokens
from tokcom.scheduling_tokcom import TokComFlowMatchScheduler
from tokcom.tasks_tokcom import TokComTask, context_of_rows
from tokcom.training.presets import preset_config
from tokcom.transformer_tokcom import START_OF_TEXT

TEXT = "Once upon a time there was a little rabbit who lived in a wood."
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
SPLIT = {**SMALL, "num_hidden_layers": 2, "num_context_layers": 1, "conditioning_size": 16}
WHOLE = {**SMALL, "num_hidden_layers": 2, "conditioning_size": 16}
PRESETS = {
    "tiny": SPLIT,
    "tiny-local": SPLIT,
    "base": SPLIT,
    "base-local": SPLIT,
    "pixel-tiny": WHOLE,
    "pixel-b4": {**WHOLE, "max_position_embeddings": 64},
    "pixel-b16": {**WHOLE, "max_position_embeddings": 16},
    "zoo-pixels": SPLIT,
}


@pytest.fixture
def pipe(tokenizer) -> TokComPipeline:
    return exact_pipe(tokenizer)


def drawn_from(pipe: TokComPipeline) -> list[torch.Tensor]:
    """The logits `(R, V)` of every call that draws tokens, from now on."""
    calls, head = [], pipe.model.token_head
    draw = head.draw

    def listen(states, symbols, latents, times, chosen, *rest):
        rows = states.unflatten(-1, (head.num_symbols, -1)).flatten(0, -2)[chosen.index]
        calls.append(head.logits(rows))
        return draw(states, symbols, latents, times, chosen, *rest)

    head.draw = listen
    return calls


@torch.no_grad()
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("length", range(4, 12))
def test_the_next_token_has_the_probability_that_the_likelihood_says_at_every_prompt_length(
    pipe, length, inside
):
    # the two learned latents before a text differ as those of a trained model do
    torch.nn.init.normal_(pipe.model.transformer.start_embedding.weight)
    ids = text_ids(pipe.tokenizer, TEXT)[: length + 1]
    padded = torch.tensor([ids + [0] * (-len(ids) % 4)])
    begins = torch.tensor([not inside])
    expected = pipe.model(padded, text_start=begins).token_losses.flatten()[length]
    calls = drawn_from(pipe)
    sampling = TokComSampling(temperature=1.0, generator=seeded())
    _, blocks = pipe.continue_ids([ids[:length]], 4, sampling, inside=[inside])
    next(iter(blocks))
    # steps before the first new token draw nothing
    first = next(call for call in calls if len(call))
    torch.testing.assert_close(
        -first[0].log_softmax(-1)[ids[length]], expected, atol=1e-4, rtol=1e-4
    )


@torch.no_grad()
def test_a_prompt_goes_on_inside_its_last_chunk(pipe):
    for length in range(1, 10):
        ids = text_ids(pipe.tokenizer, TEXT)[:length]
        skip, blocks = pipe.continue_ids([ids], 8, TokComSampling(generator=seeded()))
        drawn = torch.cat([ids for _, ids in blocks], dim=1)[0].tolist()
        assert skip == [length % 4] and drawn[: skip[0]] == ids[length - skip[0] :]


def test_a_prompt_that_lost_its_beginning_is_read_as_the_inside_of_a_text(pipe, monkeypatch):
    asked = []
    whole = pipe.continue_ids

    def listen(rows, *arguments, inside, **options):
        asked.append(inside)
        return whole(rows, *arguments, inside=inside, **options)

    monkeypatch.setattr(pipe, "continue_ids", listen)
    options = {"gen_length": 4, "num_inference_steps": 1, "truncation": "left"}
    with pytest.warns(UserWarning, match="1 steps for the 4 tokens"):
        pipe([TEXT * 40, TEXT], **options)
        list(pipe.stream(TEXT * 40, **options))
    assert asked == [[True, False], [True]]


@torch.no_grad()
def test_a_prompt_that_fills_the_window_keeps_the_learned_start_and_loses_its_oldest_chunk(pipe):
    ids = (text_ids(pipe.tokenizer, TEXT) * 40)[: pipe.max_length]
    contexts = []
    for row in (ids, ids[:8]):
        context = context_of_rows(pipe.model, [row], "cpu")
        noise = torch.zeros(1, 1, context.latents.shape[-1])
        contexts.append(CachedContext(pipe.model, TokComTask(noise, context)))
    full, short = (context.cache.layers for context in contexts)
    torch.testing.assert_close(full[0].keys[:, :, 0], short[0].keys[:, :, 0])
    # the layer behind the others holds the states of the context and their positions
    places = full[-1].values[0, 0, : contexts[0].length, 0].long().tolist()
    assert places == [START_OF_TEXT, *range(1, len(ids) // 4)]
    assert contexts[0].filled[0, : len(places)].all()


def test_a_text_that_was_interrupted_has_no_mask_behind_its_last_token():
    ids = torch.arange(1, 9).expand(2, 8)
    found, mask = take_new(ids, 13, [0, 3], None, 0)
    assert mask.sum(1).tolist() == [8, 5]
    assert torch.equal(found, torch.where(mask.bool(), found, 0)) and found[1, 0] == 4


def test_a_line_break_between_two_gaps_is_read_with_them(pipe, monkeypatch):
    read = []
    fill = pipe._fill_tokens
    monkeypatch.setattr(pipe, "_fill_tokens", lambda rows, *a: read.append(rows) or fill(rows, *a))
    text = pipe.infill("Roses ____\n____ blue", gap_length=4, generator=seeded()).texts[0]
    assert read[0][1] == text_ids(pipe.tokenizer, "\n") and "\n" in text


def test_a_guided_text_does_not_depend_on_the_prompts_beside_it(pipe):
    torch.nn.init.normal_(pipe.model.transformer.start_embedding.weight)
    options = {"gen_length": 12, "guidance_scale": 3.0, "output_type": "seq", "temperature": 1.0}
    for short in ("S", "Squinty was"):
        alone = pipe([short], generator=[seeded(1)], **options).sequences
        beside = pipe([short, TEXT], generator=[seeded(1), seeded(2)], **options).sequences
        assert torch.equal(alone[0], beside[0])


def test_a_shorter_length_gives_the_beginning_of_the_same_text_in_any_batch(pipe):
    options = {"output_type": "seq", "temperature": 1.0}
    whole = pipe(TEXT, gen_length=40, generator=seeded(3), **options).sequences
    for length in (1, 6, 13):
        part = pipe(TEXT, gen_length=length, generator=seeded(3), **options).sequences
        assert torch.equal(part, whole[:, :length])
    company = pipe(
        [TEXT, "Squinty", "The family"], gen_length=13, generator=seeded(3), **options
    ).sequences
    assert torch.equal(company[:1], whole[:, :13])
    rows = pipe(
        ["Squinty", TEXT], gen_length=13, generator=[seeded(8), seeded(3)], **options
    ).sequences
    assert torch.equal(rows[1:], whole[:, :13])


@pytest.mark.parametrize("steps", [4, 6, 8])
def test_steps_lie_on_the_turns_whatever_the_shift_of_the_scheduler(pipe, steps):
    options = {"gen_length": 16, "num_inference_steps": steps, "output_type": "seq"}
    expected = pipe(TEXT, generator=seeded(), **options).sequences
    for scheduler in (
        TokComFlowMatchScheduler(shift=1.82),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
    ):
        pipe.scheduler = scheduler
        assert torch.equal(pipe(TEXT, generator=seeded(), **options).sequences, expected)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    with pytest.raises(ValueError, match="does not put its steps where the tokens .* turns"):
        pipe(TEXT, **options)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(
        ValueError, match="FlowMatchEuler.* `use_dynamic_shifting`.*set it to False"
    ):
        pipe(TEXT, **options)


def test_fewer_steps_than_turns_say_what_they_cost(pipe):
    with pytest.warns(UserWarning, match="2 steps for the 4 tokens.*num_inference_steps=4"):
        pipe(TEXT, gen_length=4, num_inference_steps=2)


@torch.no_grad()
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("before", ["There was a", ""])
def test_the_first_token_of_a_gap_depends_on_what_follows(tokenizer, preset, before):
    torch.manual_seed(0)
    config = preset_config(preset, vocabulary_size(tokenizer), transformer_config=PRESETS[preset])
    model = TokComModel(config).eval()
    for name, parameter in model.named_parameters():
        if "modulation" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    pipe = TokComPipeline(model, TokComFlowMatchScheduler.from_model_config(config), tokenizer)
    pipe.set_progress_bar_config(disable=True)
    calls, firsts = drawn_from(pipe), []
    for after in (" who lived in a big wood.", " ran home to his mother."):
        calls.clear()
        pipe.infill(f"{before}____{after}", gap_length=3, num_inference_steps=4, generator=seeded())
        firsts.append(next(call for call in calls if len(call))[0])
    assert (firsts[0] - firsts[1])[: vocabulary_size(tokenizer)].abs().max() > 1e-4


@torch.no_grad()
def test_gaps_are_filled_where_they_stand_and_all_else_stays(pipe):
    ids = text_ids(pipe.tokenizer, TEXT)
    for gaps in (
        [(0, 3)],
        [(5, 6)],
        [(2, 9)],
        [(3, 5), (6, 7), (12, 20)],
        [(len(ids) - 2, len(ids))],
        [(0, len(ids))],
    ):
        known = [not any(start <= i < stop for start, stop in gaps) for i in range(len(ids))]
        (filled,), _ = pipe.fill_ids(ids, known, TokComSampling(generator=[seeded()]))
        assert len(filled) == len(ids)
        assert [i for i, k in zip(filled, known) if k] == [i for i, k in zip(ids, known) if k]


@torch.no_grad()
def test_a_gap_is_filled_with_the_probabilities_that_training_shows(pipe):
    """The sampler reads a text with a gap as the objective does."""
    from tokcom.layers_tokcom import ContextPlan

    model, ids = pipe.model, torch.tensor([text_ids(pipe.tokenizer, TEXT)[:24]])
    known = torch.ones(24, dtype=torch.bool)
    known[6:13] = False
    given, gap = known.view(1, 6, 4), torch.tensor([True])
    plan, chunks, symbols = ContextPlan.of(given, gap), ids.view(1, 6, 4), model.symbols()
    times = torch.where(plan.partial[..., None] & ~given, 0.0, 1.0)
    features = torch.nn.functional.pad(
        model.token_head.read(symbols, None, times, chunks), (0, 0, 1, 0)
    )
    mask = plan.mask(torch.ones(1, 6, dtype=torch.bool))
    states = model.transformer.read_context(features, torch.arange(-1, 6)[None, :, None], mask)
    time, place_times = torch.tensor([[0.5]]), torch.tensor([[[1.0, 1.0, 0.0, 0.0]]])
    read = model.token_head.read(symbols, torch.zeros(1, 1, 16), place_times, chunks[:, 1:2])
    output = model.transformer(
        torch.zeros(1, 1, 16), time, features=read, entry=states[:, 1:2]
    ).latents
    expected = model.token_head.logits(output.view(4, -1)[2])
    calls = drawn_from(pipe)
    pipe.fill_ids(ids[0].tolist(), known.tolist(), TokComSampling(generator=[seeded()]))
    first = next(call for call in calls if len(call))[0]
    torch.testing.assert_close(first[:-1], expected[:-1], atol=1e-4, rtol=1e-4)


def _local_pipe(tokenizer) -> TokComPipeline:
    torch.manual_seed(0)
    options = {**TURNS, "transformer_config": {**helpers.SPLIT, "local_head": True}}
    model = TokComModel(tiny_config(vocabulary_size(tokenizer), **options)).eval()
    return quiet_pipe(model, tokenizer)


@torch.no_grad()
@pytest.mark.parametrize("length", [21, 22, 23, 24])
@pytest.mark.parametrize("is_local", [False, True])
def test_a_filling_is_drawn_from_the_probabilities_that_score_it(pipe, is_local, length):
    """At a temperature that leaves one choice: the likeliest token of each place."""
    if is_local:
        pipe = _local_pipe(pipe.tokenizer)
    for parameter in pipe.model.transformer.parameters():
        if parameter.ndim > 1:  # large enough for a mistake to show
            torch.nn.init.normal_(parameter, std=0.2)
    pipe.model.set_stage("flow")
    ids = torch.randint(0, 290, (length,), generator=seeded()).tolist()
    for start, stop in ((9, 13), (14, 15), (17, 18), (20, 21), (0, 2)):
        known = [not start <= place < stop for place in range(length)]
        settings = TokComSampling(4, generator=[seeded()], temperature=1e-3)  # a step for each turn
        (filled,), _ = pipe.fill_ids(ids, known, settings)
        for place in range(start, stop):
            others = torch.tensor(filled).repeat(vocabulary_size(pipe.tokenizer), 1)
            others[:, place] = torch.arange(len(others))
            nats, _ = token_nats(pipe.model, others.tolist(), start, stop)
            assert int(nats[:, place].argmin()) == filled[place]


@torch.no_grad()
@pytest.mark.parametrize("gaps", [[(0, 3)], [(5, 6)], [(3, 5), (12, 20)], [(0, 26)]])
def test_fillings_that_are_drawn_together_are_those_drawn_alone(pipe, gaps):
    ids = text_ids(pipe.tokenizer, TEXT)[:26]
    known = [not any(start <= i < stop for start, stop in gaps) for i in range(len(ids))]
    together, latents = pipe.fill_ids(
        ids, known, TokComSampling(generator=[seeded(s) for s in range(5)])
    )
    assert len(latents) == 5 and len({tuple(row) for row in together}) > 1
    for seed, row in enumerate(together):
        alone, _ = pipe.fill_ids(ids, known, TokComSampling(generator=[seeded(seed)]))
        assert alone == [row]


@pytest.mark.parametrize("block_size", [1, 3, 4])
@pytest.mark.parametrize("prediction", ["tokens", "latents"])
def test_a_shorter_text_is_the_beginning_of_a_longer_one(tokenizer, prediction, block_size):
    torch.manual_seed(0)
    options = {"prediction_type": prediction, "transformer_config": {"block_size": block_size}}
    if prediction == "tokens":
        options["codec_config"] = {"encoder_type": "token"}
    model = TokComModel(tiny_config(vocabulary_size(tokenizer), **options)).eval()
    pipe = quiet_pipe(model, tokenizer)
    whole = pipe("Once upon a time", gen_length=40, generator=seeded()).sequences[0].tolist()
    for length in (1, 4, 7, 16, 21):
        output = pipe("Once upon a time", gen_length=length, generator=seeded())
        assert output.sequences[0].tolist() == whole[:length]
        assert output.latents.shape[1] <= -(-length // 4) + 1


def test_no_gap_with_text_behind_it_holds_the_end_of_the_text(pipe):
    eos = pipe.tokenizer.eos_token_id
    pipe.model.token_head.logits = _all_but_certain(pipe.model.token_head.logits, eos)
    for text, ends in (("A ____ pig", False), ("A ____ pig ____", False), ("A pig ____", True)):
        output = pipe.infill(text, 3, generator=seeded())
        assert (eos in output.sequences.flatten().tolist()) is ends


def _all_but_certain(logits, symbol: int):
    def biased(states):
        found = logits(states)
        found[:, symbol] += 100
        return found

    return biased


def test_a_list_of_generators_is_one_for_each_filling(pipe):
    text = "Tom ____ home."
    alone = pipe.infill(text, 3, generator=seeded(4)).texts
    assert pipe.infill(text, 3, generator=[seeded(4)]).texts == alone
    assert pipe.infill(text, 3, generator=[seeded(4), seeded(4)], num_candidates=2).texts == alone
    with pytest.raises(ValueError, match="has 2 entries, not 3"):
        pipe.infill(text, 3, generator=[seeded(), seeded(1)], num_candidates=3)


def test_a_filling_whose_text_is_too_long_to_score_is_left_out(pipe, monkeypatch):
    window = type(pipe).max_length
    texts = [one.texts[0] for one in pipe._fill_gaps("Tom ____ home.", 3, _five_sources())]
    lengths = [len(text_ids(pipe.tokenizer, text)) for text in texts]
    monkeypatch.setattr(type(pipe), "max_length", property(lambda self: min(lengths)))
    chosen = pipe.infill("Tom ____ home.", 3, generator=_five_sources().generator, num_candidates=5)
    assert len(text_ids(pipe.tokenizer, chosen.texts[0])) == min(lengths)
    monkeypatch.setattr(type(pipe), "max_length", property(lambda self: 0))
    whole = pipe.infill("Tom ____ home.", 3, generator=_five_sources().generator, num_candidates=5)
    assert whole.texts[0] == texts[0]  # none fits, so none is scored
    monkeypatch.setattr(type(pipe), "max_length", window)


def test_what_is_no_text_is_not_scored(pipe):
    for value in (None, [], 3):
        with pytest.raises(ValueError, match="must be a text, or a list"):
            pipe.score(value)


def _five_sources() -> TokComSampling:
    return TokComSampling(generator=[seeded(s) for s in range(5)])


def test_a_token_that_is_kept_at_one_noise_level_is_kept_at_every_higher_one(pipe):
    levels = [kept_tokens(10_000, level, seeded(5)) for level in (0.0, 0.25, 0.5, 0.9, 1.0)]
    for level, kept in zip((0.0, 0.25, 0.5, 0.9, 1.0), levels):
        assert abs(sum(kept) / 10_000 - level) < 0.05
    for lower, higher in zip(levels, levels[1:]):
        assert all(b for a, b in zip(lower, higher) if a)
    ids = text_ids(pipe.tokenizer, TEXT)
    shares = []
    for level in (0.0, 0.5, 0.9):
        output = pipe.denoise_reconstruct(TEXT, level, generator=seeded())
        row = output.sequences[0, : len(ids)].tolist()
        shares.append(sum(a == b for a, b in zip(row, ids)) / len(ids))
    assert shares[0] < shares[1] < shares[2]
    assert pipe.denoise_reconstruct(TEXT, 1.0).texts == pipe.reconstruct(TEXT).texts


@torch.no_grad()
def test_the_likelihood_of_a_gap_is_that_of_its_sampler(pipe):
    """The first token of a gap has the probability that scoring the gap says."""
    from tokcom.evaluation.studies.infilling import gap_nats

    ids = text_ids(pipe.tokenizer, TEXT)[:26]
    both, left = gap_nats(pipe.model, ids, 9, 10)
    assert abs(both - left) > 1e-4  # what follows matters
    calls = drawn_from(pipe)
    known = [i != 9 for i in range(len(ids))]
    pipe.fill_ids(ids, known, TokComSampling(generator=[seeded()]))
    first = next(call for call in calls if len(call))[0]
    assert abs(-float(first.log_softmax(-1)[ids[9]]) - both) < 1e-3


def test_memory_of_the_context_is_bounded_by_the_window(build):
    pipe = build(transformer_config={"block_size": 1, "max_position_embeddings": 8})
    lengths, append = [], CachedContext.append

    def record(state, *args):
        append(state, *args)
        lengths.append(max(layer.keys.shape[2] for layer in state.cache.layers))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CachedContext, "append", record)
        pipe.generate(num_chunks=30, num_inference_steps=1, generator=seeded())
    assert len(lengths) == 29 and set(lengths) == {8}


def test_a_short_text_does_not_pay_for_the_window_and_growing_changes_no_token(build, monkeypatch):
    pipe = build(transformer_config={"block_size": 1, "max_position_embeddings": 128})
    sizes, append = [], context_tokcom.CachedContext.append

    def record(state, *args):
        append(state, *args)
        sizes.append(state.cache.layers[0].keys.shape[2])

    monkeypatch.setattr(context_tokcom.CachedContext, "append", record)
    options = dict(num_inference_steps=1, output_type="seq")
    found = pipe("Squinty", gen_length=300, generator=seeded(), **options).sequences
    assert sizes[0] < sizes[-1] == 128 and len(set(sizes)) == 3
    monkeypatch.setattr(context_tokcom, "SMALLEST_WINDOW", 128)
    expected = pipe("Squinty", gen_length=300, generator=seeded(), **options).sequences
    assert sizes[-1] == 128 and torch.equal(found, expected)


def test_a_callback_may_return_nothing_and_may_write_into_the_latents(pipe):
    options = dict(gen_length=16, output_type="seq")
    plain = pipe("Squinty", generator=seeded(), **options).sequences

    def run(callback):
        options["callback_on_step_end"] = callback
        return pipe("Squinty", generator=seeded(), **options).sequences

    assert torch.equal(run(lambda *_: None), plain)
    replaced = run(lambda p, i, t, found: {"latents": torch.zeros_like(found["latents"])})
    assert not torch.equal(replaced, plain)
    assert torch.equal(
        run(lambda p, i, t, found: found.update(latents=found["latents"].zero_())), replaced
    )


def test_a_score_leaves_the_mode_of_the_model_and_needs_a_text(pipe):
    pipe.model.train()
    pipe.score("Squinty was a pig.")
    assert pipe.model.training
    with pytest.raises(ValueError, match="must be a text, or a list"):
        pipe.score([])


@pytest.mark.parametrize(
    ["options", "message"],
    [
        (dict(prompt=[[5, 6]]), "`prompt` holds ids.*decode"),
        (dict(prompt="Hi", gen_length=8.0), "`gen_length` .8.0. must be a whole number"),
        (dict(prompt="Hi", num_inference_steps=0.5), "`num_inference_steps` .0.5. must be a whole"),
        (dict(prompt="Hi", temperature=1e-39), "`temperature` .1e-39. must be above 0.0001"),
    ],
)
def test_what_a_call_cannot_use_is_named(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        pipe(**options)
