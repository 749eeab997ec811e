"""Laws of chunks that are known in part: one alignment, gaps that see both sides, exact
likelihoods."""

import pytest
import torch
from helpers import build_model, seeded

from tokcom.layers_tokcom import ContextPlan
from tokcom.scheduling_tokcom import draw_gaps


def test_gaps_begin_and_end_anywhere_and_have_the_lengths_that_were_asked_for():
    known = draw_gaps(400, 96, torch.device("cpu"))
    text = ["".join("x" if k else "_" for k in row) for row in known.tolist()]
    inner = [gap for row in text for gap in row.strip("_").replace("x", " ").split()]
    lengths = [len(gap) for gap in inner]
    assert min(lengths) == 1 and 20 <= max(lengths) <= 24
    starts = {row.index("x_") % 4 for row in text if "x_" in row}
    assert starts == {0, 1, 2, 3}  # inside chunks, too
    assert any(row.startswith("_") for row in text) and any(row.startswith("x") for row in text)
    assert max(row.strip("_").replace("x", " ").count(" _") for row in text) > 4  # several gaps


def test_the_state_before_a_gap_is_read_after_what_follows_the_gap():
    given = torch.ones(1, 6, 4, dtype=torch.bool)
    given[0, 2, 1:] = False  # a gap from the middle of chunk 2 ...
    given[0, 3, :2] = False  # ... to the middle of chunk 3
    plan = ContextPlan.of(given, torch.tensor([True]))
    assert plan.partial.tolist() == [[False, False, False, True, False, False]]
    order = plan.order[0].tolist()  # of the start and the chunks
    before_gap, in_gap, gap_end, after = order[2], order[3], order[4], order[5:]
    assert max(after) < before_gap < in_gap and gap_end < before_gap
    sees = plan.mask(torch.ones(1, 6, dtype=torch.bool))[0]
    assert sees[2].tolist() == [True, True, True, False, True, True, True]
    assert not sees[5, 2] and not sees[5, 3]  # what follows the gap was read without it


def test_rows_without_gaps_are_read_in_order():
    plan = ContextPlan.of(torch.zeros(2, 5, 4, dtype=torch.bool), torch.tensor([False, False]))
    assert plan.order.tolist() == [list(range(6))] * 2 and not plan.partial.any()
    assert torch.equal(
        plan.mask(torch.ones(2, 5, dtype=torch.bool))[0], torch.ones(6, 6).tril().bool()
    )


@torch.no_grad()
def test_likelihood_in_eval_mode_is_exact_and_needs_no_noise():
    model, ids = build_model(), torch.randint(0, 320, (2, 32), generator=seeded())
    first, second = model(ids), model(ids)
    assert torch.equal(first.loss, second.loss)
    torch.testing.assert_close(first.token_losses.mean(), first.loss)
    # each token's loss is that of its own turn
    for turn in range(4):
        alone = model(ids, timestep=turn / 4).token_losses[..., turn]
        torch.testing.assert_close(alone, first.token_losses[..., turn], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_follows_never_changes_the_likelihood_of_a_prefix():
    model, ids = build_model(), torch.randint(0, 320, (1, 32), generator=seeded())
    other = ids.clone()
    other[0, 18:] = (other[0, 18:] + 7) % 320
    one, two = model(ids).token_losses.flatten(), model(other).token_losses.flatten()
    torch.testing.assert_close(one[:18], two[:18])
    assert not torch.allclose(one[18:], two[18:])


@torch.no_grad()
def test_known_tokens_of_a_chunk_are_not_predicted_and_change_nothing_before_them():
    model, ids = build_model(), torch.randint(0, 320, (1, 32), generator=seeded())
    known = torch.zeros_like(ids)
    known[0, :10] = 1
    losses = model(ids, known_mask=known).token_losses.flatten()
    assert not losses[:10].any() and (losses[10:] > 0).all()
    torch.testing.assert_close(
        losses[10:], model(ids).token_losses.flatten()[10:]
    )  # the prompt comes first anyway


@torch.no_grad()
def test_the_start_of_a_text_differs_from_the_start_of_a_window():
    model, ids = build_model(), torch.randint(0, 320, (1, 32), generator=seeded())
    start, inside = (
        model(ids, text_start=torch.tensor([kind])).token_losses for kind in (True, False)
    )
    assert not torch.allclose(start[0, 0], inside[0, 0])


def test_padding_before_a_text_is_refused_and_padding_behind_it_is_not():
    model = build_model()
    ids, mask = torch.ones(3, 16, dtype=torch.long), torch.ones(3, 16)
    mask[1, 8:] = 0
    mask[2] = 0  # a row of padding alone
    assert model(ids, attention_mask=mask).loss.isfinite()
    mask[1] = mask[1].flip(0)
    with pytest.raises(ValueError, match="row 1 of the batch begins with padding"):
        model(ids, attention_mask=mask)


@pytest.mark.parametrize("turn_share", [0.0, 1.0])
def test_training_reaches_every_weight_with_gaps_and_without(turn_share):
    model = build_model().train()
    model.set_stage("flow", noise_draws=4, infill_rate=0.5, turn_share=turn_share)
    ids = torch.randint(0, 320, (16, 64))
    model(ids).loss.backward()
    missing = [
        n
        for n, p in model.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert missing == []


def test_gradient_of_the_fused_loss_is_that_of_autograd():
    model = build_model(noise_std=0.7)
    head, symbols = model.token_head, model.symbols()
    states = torch.randn(1, 6, 4 * 128, requires_grad=True)
    noisy, ids = torch.randn(1, 6, 16), torch.randint(0, 320, (1, 6, 4))
    times = torch.tensor([0.0, 0.1, 0.5, 0.0]).expand(1, 6, 4)
    mean, _ = head.nll(states, symbols, noisy, times, ids, torch.ones(1, 6, 4, dtype=torch.bool))
    found = torch.autograd.grad(3 * mean, (states, head.embedding.weight, head.bias))
    logits = states.view(1, 6, 4, 128) @ head.embedding.weight.T + head.prior
    t = times[..., None, None]
    normal = torch.distributions.Normal(t * symbols.table, (1 - t) * 0.7)
    logits = logits + normal.log_prob(noisy.view(1, 6, 4, 1, 4)).sum(-1)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 2), ids.flatten())
    torch.testing.assert_close(mean, expected, atol=1e-4, rtol=1e-4)
    wanted = torch.autograd.grad(3 * expected, (states, head.embedding.weight, head.bias))
    for one, other in zip(found, wanted):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_the_pad_token_is_never_predicted_and_never_drawn():
    model = build_model()
    head = model.token_head
    head.bias[320] = 100.0
    states = 10 * head.embedding.weight[320].expand(1, 50, 4, 128).flatten(2)
    symbols, noise = model.symbols(), torch.randn(1, 50, 16)
    times = torch.zeros(1, 50, 4)
    assert not (head.most_likely(states, symbols, noise, times) == 320).any()
    assert model.decode(torch.randn(1, 5, 16)).logits[..., 320].isinf().all()
    assert head.prior[320] == float("-inf")
