"""Laws of students that draw several tokens of a chunk in one step."""

import pytest
import torch
from helpers import exact_pipe, seeded

from tokcom.evaluation.studies.joint_steps import (
    JointPipeline,
    Student,
    draw_ranked,
    later_places,
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
    for mode in ("turns", "checked"):
        pipe.mode = mode
        found[mode] = pipe(prompt, gen_length=24, generator=seeded()).sequences
        steps = pipe.sampler.evaluations
        assert steps <= 4 * pipe.sampler.chunks
    assert torch.equal(found["turns"], found["checked"])


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


def test_the_first_token_of_every_step_is_the_teachers():
    assert later_places(2, 4) == [(0, 1), (2, 3)]
    assert later_places(4, 4) == [(0, 1), (0, 2), (0, 3)]
    assert later_places(1, 4) == []


def test_training_a_student_leaves_the_teacher_as_it_is(pipe):
    before = {name: value.clone() for name, value in pipe.model.state_dict().items()}
    tokens = torch.randint(3, 300, (2000,)).numpy()
    student = train_student(pipe.model, tokens, pipe.tokenizer.eos_token_id, 2, later_places(2, 4))
    for name, value in pipe.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    fresh = Student(pipe.model).state_dict()
    changed = {
        name.split(".")[0] + "." + name.split(".")[1]
        for name, value in student.state_dict().items()
        if not torch.equal(value, fresh[name])
    }
    parts = {"transformer.layers", "transformer.norm", "transformer.proj_out"}
    assert parts <= changed
    assert changed - parts <= {"reader.linear_1", "reader.linear_2"}
