"""Laws of the excess nats over a teacher."""

import json

import numpy as np
import pytest
import torch
from helpers import build_model, seeded
from transformers import LlamaConfig, LlamaForCausalLM

from tokcom.evaluation.divergence import Teacher, TokComStudent, difference, tempered, truncate
from tokcom.evaluation.studies import blind_reading
from tokcom.pipeline_tokcom import TokComPipeline
from tokcom.processing_tokcom import text_ids, vocabulary_size
from tokcom.sampling_tokcom import TokComSampling
from tokcom.scheduling_tokcom import TokComFlowMatchScheduler


def test_truncation_keeps_what_top_k_and_min_p_keep_and_sums_to_one():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.04, 0.01]]))
    kept = truncate(logits, top_k=4, min_p=0.1).exp()
    expected = torch.tensor([[0.5, 0.3, 0.15, 0.0, 0.0]]) / 0.95
    torch.testing.assert_close(kept, expected)


@pytest.mark.parametrize("top_k", [0, 99])
def test_a_top_k_of_0_or_of_more_than_there_are_keeps_all(top_k):
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]]))
    kept = truncate(logits, top_k=top_k, min_p=0.5).exp()
    torch.testing.assert_close(kept, torch.tensor([[0.625, 0.375, 0.0]]))


@torch.no_grad()
def test_the_likelihood_at_a_temperature_is_that_of_samples_at_it(tokenizer):
    """Of many draws of the next token the mean of the nats is the entropy that the nats say."""
    model = build_model(vocabulary_size(tokenizer))
    # what an unknown token looks like depends on the frequencies, but not on the temperature
    model.token_head.bias.normal_()
    plain = model(torch.zeros(1, 8, dtype=torch.long)).token_losses
    with tempered(model, 1.0):
        torch.testing.assert_close(model(torch.zeros(1, 8, dtype=torch.long)).token_losses, plain)
    pipe = TokComPipeline(
        model, TokComFlowMatchScheduler.from_model_config(model.config), tokenizer
    )
    pipe.set_progress_bar_config(disable=True)
    student = TokComStudent(pipe)
    prompt = text_ids(tokenizer, "The pig")[:3]
    every = student.nats(
        [[*prompt, token] for token in range(vocabulary_size(tokenizer))], temperature=0.5
    )
    probabilities = torch.from_numpy(every[0] - every).float().softmax(0)
    _, blocks = pipe.continue_ids(
        [prompt] * 2000, 1, TokComSampling(temperature=0.5, generator=seeded())
    )
    drawn = torch.cat([ids for _, ids in blocks], dim=1)[:, 3]
    shares = torch.bincount(drawn, minlength=len(probabilities))[: len(probabilities)] / 2000
    assert (shares - probabilities).abs().max() < 0.03


@torch.no_grad()
def test_nats_of_a_text_do_not_depend_on_the_others(tokenizer):
    model = build_model(vocabulary_size(tokenizer))
    pipe = TokComPipeline(
        model, TokComFlowMatchScheduler.from_model_config(model.config), tokenizer
    )
    student = TokComStudent(pipe)
    rows = [
        text_ids(tokenizer, text)
        for text in ("A pig.", "There was a rabbit who ran home.", "Squinty")
    ]
    together = student.nats(rows)
    alone = [student.nats([row])[0] for row in rows]
    assert all(abs(a - b) < 1e-3 for a, b in zip(together, alone))


def test_the_standard_error_of_a_difference_is_that_of_texts_drawn_again():
    generator = np.random.default_rng(0)
    characters = generator.integers(300, 900, 80)
    first = characters * generator.normal(0.4, 0.1, 80)
    second = first + characters * generator.normal(0.02, 0.03, 80)
    mean, error = difference(first, second, characters)
    again = generator.integers(80, size=(4000, 80))
    means = (second - first)[again].sum(1) / characters[again].sum(1)
    assert mean == pytest.approx(means.mean(), abs=1e-3)
    assert error == pytest.approx(means.std(), rel=0.1)


def test_answers_of_blind_readers_are_counted_by_author(tmp_path, capsys):
    answer = {"ends": 1, "names": 0, "pronouns": 1, "happens": 0}
    (tmp_path / "key.json").write_text(json.dumps({"0": "a", "1": "b", "2": "a", "3": "b"}))
    first = {"0": {**answer, "sense": 2}, "1": {**answer, "sense": 5}}
    second = {"2": {**answer, "sense": 4}, "3": {**answer, "sense": 5}}
    (tmp_path / "answers_1.json").write_text(json.dumps(first))
    (tmp_path / "answers_2.json").write_text(json.dumps(second))
    blind_reading.main(["count", "--output_dir", str(tmp_path)])
    rows = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith(("| a", "| b"))
    ]
    assert rows[1].startswith("| a | 2 | 1.000 | 0.000 | 1.000 | 0.000 | 3.000 | 1.000")
    assert rows[2].startswith("| b | 2 | 1.000 | 0.000 | 1.000 | 0.000 | 5.000 | 0.000")


@pytest.fixture
def teacher_folder(tokenizer, tmp_path) -> str:
    size = vocabulary_size(tokenizer)
    shape = {"vocab_size": size, "hidden_size": 16, "intermediate_size": 16}
    shape |= {"num_hidden_layers": 1, "num_attention_heads": 2, "bos_token_id": None}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


def test_a_teacher_without_the_token_that_begins_its_texts_is_refused_by_name(teacher_folder):
    with pytest.raises(ValueError, match="has no BOS token"):
        Teacher(teacher_folder, 0, 0.0)


def test_a_teacher_is_scored_at_the_temperature_that_its_text_was_sampled_with(
    teacher_folder, tokenizer
):
    config = LlamaConfig.from_pretrained(teacher_folder)
    config.bos_token_id = tokenizer.eos_token_id
    config.save_pretrained(teacher_folder)
    found = [
        Teacher(teacher_folder, 0, 1e-9, temperature=value).nats(["Once upon"], [True], True)[0]
        for value in (1.0, 2.0)
    ]
    ids = [tokenizer.eos_token_id, *text_ids(tokenizer, "Once upon"), tokenizer.eos_token_id]
    logits = LlamaForCausalLM.from_pretrained(teacher_folder)(torch.tensor([ids])).logits[0, :-1]
    for value, nats in zip((1.0, 2.0), found):
        own = (logits / value).log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])
        assert float(nats[0]) == pytest.approx(-float(own.sum()), rel=1e-4)
