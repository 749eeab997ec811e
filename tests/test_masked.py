"""Laws of masked diffusion inside chunks, the baseline without a flow."""

import pytest
import torch
from helpers import exact_pipe, seeded

from tokcom.evaluation.studies.masked import MaskedObjective, MaskedPipeline, masked_training
from tokcom.objective_tokcom import TokComNextChunkObjective


@pytest.fixture
def pipe(tokenizer) -> MaskedPipeline:
    return exact_pipe(tokenizer, MaskedPipeline)


@torch.no_grad()
def test_every_token_has_one_loss_along_an_order_that_is_drawn(pipe):
    model = pipe.model
    model.objective = MaskedObjective()
    ids = torch.randint(0, 300, (2, 16))
    turns = torch.arange(4) / 4
    progress, has_loss = model.objective._turns(model, turns.view(1, 4, 1).expand(2, 4, 4))
    assert has_loss.sum(1).eq(1).all()  # each token once
    assert torch.equal(progress.sum(-1)[0, :, 0], torch.arange(4.0))  # given 0, 1, 2, 3 others
    assert model(ids).token_losses.gt(0).all()


@pytest.mark.parametrize("threshold, evaluations", [(1e9, 1), (0.0, 4)])
def test_a_threshold_decides_how_many_evaluations_a_chunk_costs(pipe, threshold, evaluations):
    pipe.order = "confidence"
    pipe.threshold = threshold
    pipe("Once upon a time", gen_length=12, generator=seeded(), output_type="seq")
    sampler = pipe.sampler
    whole = sampler.chunks - 1  # the first chunk may begin with the end of the prompt
    assert abs(sampler.evaluations - evaluations * whole) <= evaluations


@pytest.mark.parametrize("order", ["random", "confidence"])
def test_masked_sampling_keeps_the_prompt_and_fills_every_place(pipe, order):
    pipe.order = order
    found = pipe("Once upon a time", gen_length=13, num_inference_steps=2, generator=seeded())
    assert found.sequences.shape == (1, 13)
    assert pipe.sampler.evaluations <= 2 * pipe.sampler.chunks


def test_training_on_masks_ends_with_its_context(pipe):
    with masked_training():
        pipe.model.set_stage("flow")
        assert type(pipe.model.objective) is MaskedObjective
    pipe.model.set_stage("flow")
    assert type(pipe.model.objective) is TokComNextChunkObjective
