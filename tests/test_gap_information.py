"""Laws of what the text after a gap says about the gap."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tokcom.evaluation.studies.gap_information import boundaries, gain

VOCABULARY = 5


@pytest.fixture(scope="module")
def author() -> SimpleNamespace:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.4,
    )
    return SimpleNamespace(model=LlamaForCausalLM(config).eval(), top_k=4, min_p=0.02)


@torch.no_grad()
def row_log_probs(author: SimpleNamespace, rows: torch.Tensor, plain: bool = False) -> torch.Tensor:
    """Log-probabilities `(N, T - 1)` of the tokens of `rows` after the first, after top-k and
    min-p, or `plain`."""
    probabilities = author.model(input_ids=rows).logits[:, :-1].softmax(-1)
    if plain:
        return probabilities.gather(-1, rows[:, 1:, None])[..., 0].log()
    ranked = probabilities.sort(dim=-1, descending=True).values
    least = torch.maximum(ranked[..., author.top_k - 1], author.min_p * ranked[..., 0])
    probabilities = probabilities * (probabilities >= least[..., None])
    probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities.gather(-1, rows[:, 1:, None])[..., 0].log()


def possible_text(author: SimpleNamespace, length: int) -> torch.Tensor:
    """A text that the author draws."""
    torch.manual_seed(1)
    rows = torch.randint(VOCABULARY, (500, length))
    scores = row_log_probs(author, rows).sum(1)
    return rows[scores.argmax()]


def exact_gain(
    author: SimpleNamespace, ids: torch.Tensor, start: int, stop: int, plain: bool = False
) -> float:
    """The gain with every gap counted; `plain` without top-k and min-p on the right side."""
    gaps = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=stop - start)))
    rows = ids.repeat(len(gaps), 1)
    rows[:, start:stop] = gaps
    gap_given_left = row_log_probs(author, rows)[:, start - 1 : stop - 1].sum(1)
    right_given = row_log_probs(author, rows, plain)[:, stop - 1 :].sum(1)
    right_given_left = (gap_given_left + right_given).logsumexp(0)
    right_given_gap = row_log_probs(author, ids[None], plain)[0, stop - 1 :].sum()
    return float(right_given_gap - right_given_left)


def test_the_bounds_of_a_gap_of_one_token_are_its_gain(author):
    ids = possible_text(author, 9)
    for start in (1, 4):
        found = gain(author, ids, start, start + 1, draws=3)
        expected = exact_gain(author, ids, start, start + 1)
        left = -float(row_log_probs(author, ids[None])[0, start - 1])
        assert found.least == pytest.approx(expected, abs=1e-4)
        assert found.most == pytest.approx(expected, abs=1e-4)
        plain = exact_gain(author, ids, start, start + 1, plain=True)
        assert found.least_plain == pytest.approx(plain, abs=1e-4)
        assert found.most_plain == pytest.approx(plain, abs=1e-4)
        assert found.left == pytest.approx(left, abs=1e-4)


def test_with_many_draws_both_bounds_of_a_longer_gap_are_its_gain(author):
    torch.manual_seed(0)
    ids = possible_text(author, 9)
    found = gain(author, ids, 3, 6, draws=5000)
    expected = exact_gain(author, ids, 3, 6)
    assert found.least == pytest.approx(expected, abs=0.05)
    assert found.most == pytest.approx(expected, abs=0.05)
    plain = exact_gain(author, ids, 3, 6, plain=True)
    assert found.least_plain == pytest.approx(plain, abs=0.05)
    assert found.most_plain == pytest.approx(plain, abs=0.05)


@torch.no_grad()
def test_the_mean_gain_of_texts_that_the_author_draws_lies_between_the_bounds(author):
    torch.manual_seed(0)
    rows = torch.zeros(60, 1, dtype=torch.long)
    for _ in range(7):
        every = torch.arange(VOCABULARY).repeat(len(rows), 1)[..., None]
        longer = torch.cat((rows[:, None].expand(-1, VOCABULARY, -1), every), dim=2)
        log_probs = row_log_probs(author, longer.flatten(0, 1))[:, -1].view(len(rows), -1)
        rows = torch.cat((rows, log_probs.exp().multinomial(1)), dim=1)
    found = [gain(author, row, 2, 5, draws=2) for row in rows]
    exact = sum(exact_gain(author, row, 2, 5) for row in rows)
    assert sum(one.least for one in found) < exact < sum(one.most for one in found)
    assert all(one.most <= one.left + 1e-4 for one in found)


def test_a_gap_that_the_author_could_not_write_has_no_gain(author):
    torch.manual_seed(1)
    rows = torch.randint(VOCABULARY, (500, 9))
    impossible = rows[row_log_probs(author, rows)[:, 4:].sum(1).isinf()][0]
    assert gain(author, impossible, 4, 6, draws=4) is None


def test_boundaries_are_where_no_token_of_a_character_is_cut(tokenizer):
    text = "A pig 😀 ran."
    places = boundaries(tokenizer, text)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for place, index in places.items():
        assert tokenizer.decode(ids[:index]) == text[:place]
