"""Laws of the study of attention inside the chunk."""

import torch
from helpers import build_model

from tokcom.evaluation.studies.chunk_attention import (
    ChunkObjective,
    ChunkTransformer,
    chunk_attention,
    own_nll,
)
from tokcom.transformer_tokcom import TokComTransformer


def built():
    torch.manual_seed(0)
    with chunk_attention():
        return build_model(300).eval()


@torch.no_grad()
def test_a_token_is_scored_given_those_before_it_and_no_other():
    model = built()
    ids = torch.randint(0, 290, (1, 12))
    plain = model(ids).token_losses.flatten()
    for place in range(12):
        other = ids.clone()
        other[0, place] = (ids[0, place] + 7) % 290
        changed = (model(other).token_losses.flatten() - plain).abs() > 1e-6
        assert not changed[:place].any() and changed[place:].any()


def test_every_part_of_the_head_learns():
    model = built().train()
    model.set_stage("flow")  # outside of its context it is a model like any other
    model.objective = ChunkObjective(infill_rate=0.0, context_dropout=0.0)
    model(torch.randint(0, 290, (2, 16))).loss.backward()
    for name, value in model.transformer.named_parameters():
        assert value.grad is not None and value.grad.abs().sum() > 0, name


def test_the_study_ends_with_its_context():
    model = built()
    assert type(model.transformer) is ChunkTransformer
    assert type(build_model(300).transformer) is TokComTransformer
    with chunk_attention():
        assert own_nll(model, torch.randint(0, 290, (2, 64)).numpy()) > 0
