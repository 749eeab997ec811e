"""Laws of a head that reads a chunk token by token."""

import numpy as np
import pytest
import torch
from helpers import SPLIT, TURNS, quiet_pipe, seeded, tiny_config
from huggingface_hub.errors import StrictDataclassError

from tokcom.context_tokcom import TokComChunkCache
from tokcom.evaluation.studies.joint_steps import train_student
from tokcom.evaluation.studies.masked import masked_training
from tokcom.evaluation.studies.speculation import train_guesses
from tokcom.modeling_causal_tokcom import TokComForCausalLM
from tokcom.modeling_tokcom import TokComModel
from tokcom.pipeline_tokcom import TokComPipeline
from tokcom.processing_tokcom import vocabulary_size

LOCAL = {**SPLIT, "local_head": True}


def local_model(vocab_size: int = 300, **overrides) -> TokComModel:
    torch.manual_seed(0)
    model = TokComModel(tiny_config(vocab_size, **{**TURNS, **overrides}, transformer_config=LOCAL))
    for parameter in model.transformer.parameters():
        if parameter.ndim > 1:  # large enough for a mistake to show
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture
def pipe(tokenizer) -> TokComPipeline:
    return quiet_pipe(local_model(vocabulary_size(tokenizer)), tokenizer)


@torch.no_grad()
def test_a_token_is_scored_given_those_before_it_and_no_other():
    model = local_model()
    ids = torch.randint(0, 290, (1, 12))
    plain = model(ids).token_losses.flatten()
    for place in range(12):
        other = ids.clone()
        other[0, place] = (ids[0, place] + 7) % 290
        changed = (model(other).token_losses.flatten() - plain).abs() > 1e-5
        assert not changed[:place].any() and changed[place:].any()


@torch.no_grad()
def test_one_pass_gives_the_likelihood_of_all_turns_and_of_the_causal_model():
    model = local_model()
    ids = torch.randint(0, 290, (2, 16))
    whole = model(ids).token_losses
    turns = [model(ids, timestep=turn / 4).token_losses for turn in range(4)]
    torch.testing.assert_close(sum(turns), whole)
    for turn, losses in enumerate(turns):
        assert losses[..., turn].all() and losses.count_nonzero() == losses[..., turn].numel()
    logits = TokComForCausalLM.sharing(model)(ids).logits[:, :-1].log_softmax(-1)
    own = -logits.gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(own, whole.flatten(1)[:, 1:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_logits_of_padded_rows_and_of_a_cache_are_those_of_each_text_alone():
    model = TokComForCausalLM.sharing(local_model())
    ids = torch.randint(0, 290, (2, 11))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    whole = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(whole[1:, 3:], model(ids[1:, 3:]).logits, atol=1e-4, rtol=1e-4)
    assert not whole[1, :3].any()
    cache = None
    for start, stop in ((0, 6), (6, 7), (7, 11)):
        mask_so_far = mask[:, :stop]
        found = model(
            ids[:, start:stop], attention_mask=mask_so_far, past_key_values=cache, use_cache=True
        )
        torch.testing.assert_close(found.logits, whole[:, start:stop], atol=1e-4, rtol=1e-4)
        cache = found.past_key_values


def test_every_part_of_the_head_learns():
    model = local_model().train()
    model.set_stage("flow", infill_rate=0.5, context_dropout=0.0)
    model(torch.randint(0, 290, (2, 16))).loss.backward()
    for name, value in model.transformer.named_parameters():
        assert value.grad is not None and value.grad.abs().sum() > 0, name


@pytest.mark.filterwarnings("ignore:.*steps for the 4 tokens")
@pytest.mark.parametrize(
    "options",
    [
        {"num_inference_steps": 4},
        {"num_inference_steps": 8},
        {"num_inference_steps": 6},
        {"num_inference_steps": 3},
        {"guidance_scale": 1.5},
    ],
)
def test_a_place_is_computed_once_and_samples_are_those_of_the_whole_chunk(
    pipe, options, monkeypatch
):
    """The prompts end inside a chunk, at different places."""

    def sample() -> list[str]:
        prompts = ["Squinty was", "The pig ran to"]
        return pipe(prompts, gen_length=13, generator=seeded(), **options).texts

    computed = []
    opened = TokComChunkCache.open

    def listen(cache, before, after):
        opened(cache, before, after)
        computed.append(cache.places)

    monkeypatch.setattr(TokComChunkCache, "open", listen)
    cached = sample()
    if options == {"num_inference_steps": 4}:
        assert computed[:4] == [slice(i, i + 1) for i in range(4)]
    monkeypatch.setattr(TokComChunkCache, "open", lambda cache, before, after: cache.clear())
    assert sample() == cached


def test_tokens_that_a_callback_changes_are_read_anew(pipe, monkeypatch):
    def swap(pipe, step, timestep, values):
        return {"latents": values["latents"].flip(0)}

    def sample() -> list[str]:
        options = {"callback_on_step_end": swap, "generator": seeded()}
        return pipe(["Squinty was", "The pig ran"], gen_length=9, **options).texts

    cached = sample()
    monkeypatch.setattr(TokComChunkCache, "open", lambda cache, before, after: cache.clear())
    assert sample() == cached


@pytest.mark.slow  # compiles
def test_a_compiled_model_has_a_graph_for_each_place_and_writes_the_same(pipe):
    def sample() -> list[str]:
        prompts = ["Squinty was", "The pig ran to"]
        return pipe(prompts, gen_length=33, num_inference_steps=4, generator=seeded()).texts

    eager = sample()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    pipe.compile()
    assert sample() == eager and sample() == eager
    counters = torch._dynamo.utils.counters
    # the context that is read at once, its blocks and the four places
    assert counters["stats"]["unique_graphs"] <= 6 and not counters["graph_break"]


def test_a_gap_is_filled_from_both_sides(pipe):
    fillings = {
        pipe.infill(f"The pig ____ {end}", gap_length=3, generator=seeded()).texts[0][:16]
        for end in ("went home.", "?", "a big red ball and a dog")
    }
    assert len(fillings) > 1


def test_settings_that_a_local_head_has_no_use_for_are_refused():
    model = local_model()
    for setting in ({"noise_draws": 4}, {"turn_share": 0.75}):
        with pytest.raises(ValueError, match="local_head"):
            model.set_stage("flow", **setting)
    with pytest.raises(StrictDataclassError, match="`local_head` needs `token_stagger` 1, got 0"):
        local_model(token_stagger=0.0)
    with pytest.raises(StrictDataclassError, match="`local_head` needs `start_latents`"):
        tiny_config(300, **TURNS, transformer_config={**LOCAL, "start_latents": False})


def test_studies_that_leave_the_order_of_reading_refuse_a_local_head():
    with masked_training(), pytest.raises(ValueError, match="in their order"):
        local_model()
    for train in (train_guesses, train_student):
        with pytest.raises(ValueError, match="in their order"):
            train(local_model(), np.zeros(0), 1, 1)


def gap_nats(model: TokComModel, ids: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Nats of the tokens of a gap in `ids (B, T)`, all others known, `(B, stop - start)`."""
    known = torch.ones_like(ids)
    known[:, start:stop] = 0
    output = model.objective.loss(model, ids, known_mask=known, fills_gaps=True)
    return output.token_losses.flatten(1)[:, start:stop]


@torch.no_grad()
def test_a_gap_reads_the_tokens_behind_it_in_its_chunk_and_nothing_that_is_not_given():
    model = local_model()
    model.set_stage("flow")
    ids = torch.randint(0, 290, (1, 12))
    plain = gap_nats(model, ids, 4, 6)  # the beginning of the second chunk
    for place in range(4, 8):
        other = ids.clone()
        other[0, place] = (ids[0, place] + 7) % 290
        changed = (gap_nats(model, other, 4, 6) - plain).abs() > 1e-5
        # the first token of the gap must not see the second, however the chunk is read
        assert changed[0].tolist() == [place != 5, True]


@torch.no_grad()
def test_the_head_itself_reads_the_first_known_token_behind_a_gap():
    """The context knows it, too; here it says nothing."""
    net = local_model().transformer
    features = torch.randn(1, 2, net.config.feature_size)
    entry = torch.zeros(1, 2, net.config.hidden_size)
    given = torch.tensor([[[False, False, True, True], [True, True, False, False]]])

    def expected(features: torch.Tensor) -> torch.Tensor:
        return net._denoise_locally(features, entry, given, None).unflatten(-1, (4, -1))

    plain = expected(features)
    for chunk, place, reads in ((0, 2, [True, True]), (0, 3, [False] * 3), (1, 3, [False] * 4)):
        other = features.clone().unflatten(-1, (4, -1))
        other[0, chunk, place] += 1
        changed = (expected(other.flatten(2)) - plain).abs().amax(-1)[0, chunk] > 1e-5
        assert changed[: len(reads)].tolist() == reads


def test_ends_of_chunks_are_given_as_often_as_the_infill_rate_says_and_never_whole_chunks():
    objective = local_model().objective
    objective.infill_rate = 0.2
    given = torch.zeros(50, 200, 4, dtype=torch.bool)
    given[:25, :, 0] = True
    torch.manual_seed(0)
    drawn = objective._draw_ends(given)
    assert not drawn[:25].any() and not drawn[..., 0].any()
    assert (drawn[..., 1:] >= drawn[..., :-1]).all()  # ends, not middles
    assert abs(float(drawn[25:].any(-1).float().mean()) - 0.2) < 0.02
