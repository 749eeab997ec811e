"""Laws of guessing the tokens of a chunk and checking them."""

import pytest
import torch
from helpers import exact_pipe, seeded

from tokcom.evaluation.studies.speculation import (
    SpeculativePipeline,
    SpeculativeSampler,
    check_guess,
    train_guesses,
)


@pytest.fixture
def pipe(tokenizer) -> SpeculativePipeline:
    return exact_pipe(tokenizer, SpeculativePipeline)


def test_a_checked_guess_has_the_distribution_that_it_is_checked_against():
    torch.manual_seed(0)
    count = 200_000
    q, p = torch.rand(2, 5).softmax(-1)
    guesses = torch.multinomial(q, count, replacement=True)
    rows = q.expand(count, -1), p.expand(count, -1)
    kept, ids = check_guess(guesses, *rows, torch.rand(2, count))
    found = torch.bincount(ids, minlength=5) / count
    torch.testing.assert_close(found, p, atol=5e-3, rtol=0)
    # as many guesses are kept as the two distributions have in common
    torch.testing.assert_close(kept.float().mean(), torch.minimum(p, q).sum(), atol=5e-3, rtol=0)


def test_a_guess_from_the_distribution_itself_is_always_kept():
    p = torch.rand(7, 5).softmax(-1)
    guesses = torch.arange(7) % 5
    kept, ids = check_guess(guesses, p, p.clone(), torch.rand(2, 7))
    assert kept.all() and torch.equal(ids, guesses)


@pytest.mark.parametrize("prompt", ["Once upon a time", "Once"])
def test_speculation_keeps_the_prompt_and_costs_at_most_the_turns(pipe, prompt):
    found = pipe(prompt, gen_length=13, generator=seeded())
    assert found.sequences.shape == (1, 13)
    sampler = pipe.sampler
    assert sampler.chunks <= sampler.evaluations <= 4 * sampler.chunks
    assert (sampler.kept <= sampler.tried).all() and sampler.tried[0] == 0


def test_perfect_guesses_cost_two_evaluations_a_chunk(pipe, monkeypatch):
    # every place has one distribution, whatever is known
    monkeypatch.setattr(
        SpeculativeSampler,
        "probabilities",
        lambda self, x, context, chunks, known: torch.full((*chunks.shape, 100), 0.01),
    )
    pipe.generate(16, generator=seeded())
    assert pipe.sampler.chunks and pipe.sampler.evaluations == 2 * pipe.sampler.chunks


def test_learning_to_guess_changes_neither_the_model_nor_what_reads_the_context(pipe):
    before = {name: value.clone() for name, value in pipe.model.state_dict().items()}
    tokens = torch.randint(3, 300, (2000,)).numpy()
    guesser = train_guesses(pipe.model, tokens, pipe.tokenizer.eos_token_id, steps=2)
    changed = set()
    for name, value in guesser.state_dict().items():
        assert torch.equal(pipe.model.state_dict()[name], before[name]), name
        if not torch.equal(value, before[name]):
            changed.add(name.split(".")[1])
    assert changed == {"layers", "norm", "proj_out"}
    context = pipe.model.config.transformer_config.num_context_layers
    for index in range(context):
        for one, two in zip(
            guesser.transformer.layers[index].parameters(),
            pipe.model.transformer.layers[index].parameters(),
            strict=True,
        ):
            assert torch.equal(one, two)
