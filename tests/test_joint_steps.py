"""Laws of students that draw several tokens of a chunk in one step."""

import pytest
import torch
from helpers import exact_pipe, seeded

from tokcom.evaluation.studies.joint_steps import (
    JointPipeline,
    JointSampler,
    Student,
    draw_ranked,
    held_out_nats,
    number_of,
    train_student,
)


@pytest.fixture
def pipe(tokenizer) -> JointPipeline:
    pipe = exact_pipe(tokenizer, JointPipeline)
    torch.manual_seed(1)
    pipe.student = Student(pipe.model).eval()
    # a student that has learnt nothing, but does read the numbers
    torch.nn.init.normal_(pipe.student.reader.linear_2.weight)
    return pipe


def test_the_number_of_a_token_draws_that_token():
    torch.manual_seed(0)
    p = torch.randn(500, 40).mul(2).softmax(-1)
    coarse = p[:250].mul(50).round().clamp_min(1)  # many equals
    p[:250] = coarse / coarse.sum(-1, keepdim=True)
    ids = torch.randint(0, 40, (500,))
    assert torch.equal(draw_ranked(p, number_of(p, ids).clamp(1e-6, 1 - 1e-6)), ids)


def test_numbers_of_drawn_tokens_are_uniform():
    torch.manual_seed(0)
    p = torch.randn(5).softmax(-1).expand(50_000, -1)
    ids = torch.multinomial(p, 1)[:, 0]
    counts = torch.histc(number_of(p, ids), bins=10, min=0, max=1) / 50_000
    torch.testing.assert_close(counts, torch.full((10,), 0.1), atol=0.01, rtol=0)


def test_small_numbers_draw_the_likeliest_token():
    p = torch.tensor([[0.2, 0.5, 0.3]]).expand(3, -1)
    assert draw_ranked(p, torch.tensor([0.1, 0.6, 0.9])).tolist() == [1, 2, 0]


@pytest.mark.parametrize("prompt", ["Once upon a time", "Once"])
def test_checked_samples_are_those_of_turns_in_no_more_steps(pipe, prompt):
    found = {}
    steps = {}
    for pipe.mode in ("turns", "checked"):
        found[pipe.mode] = pipe(prompt, gen_length=24, generator=seeded()).sequences
        steps[pipe.mode] = pipe.sampler.evaluations
    assert torch.equal(found["turns"], found["checked"])
    assert steps["checked"] <= steps["turns"]


def test_guesses_that_always_agree_cost_two_steps_a_chunk(pipe, monkeypatch):
    # every place has one distribution, whatever is known
    monkeypatch.setattr(
        JointSampler,
        "probabilities",
        lambda self, x, context, chunks, known: torch.full((*chunks.shape, 100), 0.01),
    )
    pipe.mode = "checked"
    pipe.generate(16, generator=seeded())
    sampler = pipe.sampler
    assert sampler.chunks and sampler.evaluations == 2 * sampler.chunks
    assert torch.equal(sampler.kept, sampler.tried) and sampler.tried[1:].all()


@pytest.mark.parametrize(("tokens", "steps"), [(2, 2), (4, 1)])
def test_joint_steps_are_as_many_as_their_tokens_say(pipe, tokens, steps):
    pipe.tokens_per_step = tokens
    pipe.generate(16, generator=seeded())
    assert pipe.sampler.evaluations == steps * pipe.sampler.chunks
    # what is not checked is not counted as tried
    assert pipe.sampler.tried.sum() == 0


def test_joint_samples_depend_on_what_the_student_reads(pipe):
    pipe.tokens_per_step = 4
    plain = pipe.generate(32, generator=seeded()).sequences
    torch.nn.init.zeros_(pipe.student.reader.linear_2.weight)
    assert not torch.equal(plain, pipe.generate(32, generator=seeded()).sequences)


def test_a_student_that_sees_no_numbers_reads_nothing(pipe):
    numbers = torch.rand(3, 4)
    assert pipe.student.read(numbers, 0, 2).any()
    pipe.student.sees = False
    assert not pipe.student.read(numbers, 0, 2).any()


def test_the_teacher_has_its_exact_likelihood(pipe):
    windows = torch.randint(3, 300, (2, 64))
    model = pipe.model.eval()
    inside = torch.zeros(2, dtype=torch.bool)
    exact = model(windows, text_start=inside).token_losses.mean((0, 1))
    found = list(held_out_nats(model, pipe.student, windows.numpy()).values())[:4]
    torch.testing.assert_close(torch.tensor(found), exact, atol=0.02, rtol=0.02)  # half precision


def test_training_a_student_leaves_the_teacher_as_it_is(pipe):
    before = {name: value.clone() for name, value in pipe.model.state_dict().items()}
    tokens = torch.randint(3, 300, (2000,)).numpy()
    student = train_student(pipe.model, tokens, pipe.tokenizer.eos_token_id, 2)
    for name, value in pipe.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in pipe.model.parameters())
    changed = {
        name.split(".")[0]
        for name, value in student.transformer.state_dict().items()
        if not torch.equal(value, pipe.model.transformer.state_dict()[name])
    }
    assert changed == {"layers", "norm", "proj_out"}
    assert student.reader.linear_2.weight.any()
