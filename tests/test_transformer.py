import torch
from transformers import DynamicCache

from tokcom.configuration_tokcom import TokComTransformerConfig
from tokcom.transformer_tokcom import TokComTransformer, block_causal_mask

FIELDS = dict(
    latent_channels=6,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    conditioning_size=16,
)
FIELDS |= dict(num_attention_heads=4, num_key_value_heads=2)


def transformer(**overrides) -> TokComTransformer:
    torch.manual_seed(0)
    model = TokComTransformer(TokComTransformerConfig(**{**FIELDS, **overrides})).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def sees(model, latents, mask, time) -> torch.Tensor:
    """`(S, S)`: does output i change when input j changes?"""
    base = model(latents, time, attention_mask=mask).latents
    rows = []
    for j in range(latents.shape[1]):
        changed = latents.clone()
        changed[0, j] += 1.0
        moved = (model(changed, time, attention_mask=mask).latents - base).abs().sum(-1)[0] > 1e-6
        rows.append(moved)
    return torch.stack(rows, dim=1)


@torch.no_grad()
def test_training_sequence_has_no_leak_from_a_blocks_own_clean_copy_or_its_future():
    n, order = 6, torch.tensor([[0, 0, 1, 1, 2, 2]])
    mask = block_causal_mask(order, torch.ones(1, n, dtype=torch.bool))
    influence = sees(transformer(), torch.randn(1, 2 * n, 6), mask, torch.rand(1, 2 * n))
    block = order[0]
    noisy_to_clean, noisy_to_noisy = influence[n:, :n], influence[n:, n:]
    assert torch.equal(noisy_to_clean, block[None, :] < block[:, None])
    assert torch.equal(noisy_to_noisy, block[None, :] == block[:, None])
    assert (
        torch.equal(influence[:n, :n], block[None, :] <= block[:, None])
        and not influence[:n, n:].any()
    )


@torch.no_grad()
def test_a_gap_generated_last_sees_both_sides():
    order = torch.tensor([[0, 0, 9, 9, 1, 1]])
    mask = block_causal_mask(order, torch.ones(1, 6, dtype=torch.bool))[0]
    assert mask[6 + 2, :6].tolist() == [True, True, False, False, True, True]
    assert mask[6 + 4, :6].tolist() == [True, True, False, False, False, False]


def test_padding_is_never_seen_and_no_row_is_empty():
    valid = torch.tensor([[False, True, True, True]])
    mask = block_causal_mask(torch.tensor([[0, 0, 1, 1]]), valid)[0]
    off_diagonal = mask & ~torch.eye(8, dtype=torch.bool)
    assert not off_diagonal[:, [0, 4]].any() and mask.any(-1).all()


def test_dropped_context_leaves_the_block_only():
    mask = block_causal_mask(
        torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.bool), torch.tensor([False])
    )[0]
    assert mask[3].tolist() == [False, False, False, True]


@torch.no_grad()
def test_timestep_is_per_latent():
    model, latents, time = (
        transformer(self_conditioning=False),
        torch.randn(1, 4, 6),
        torch.full((1, 4), 0.5),
    )
    changed = time.clone()
    changed[0, 2] = 0.501
    mask = torch.eye(4, dtype=torch.bool)[
        None
    ]  # no attention: only the position's own time can matter
    difference = (
        model(latents, time, attention_mask=mask).latents
        - model(latents, changed, attention_mask=mask).latents
    )
    assert (difference.abs().sum(-1)[0] > 1e-6).tolist() == [False, False, True, False]


@torch.no_grad()
def test_cached_blocks_equal_one_pass():
    model = transformer()
    latents, time = torch.randn(2, 8, 6), torch.ones(2, 8)
    order = torch.arange(8)[None].expand(2, -1) // 4
    mask = block_causal_mask(order, torch.ones(2, 8, dtype=torch.bool))[:, :8, :8]
    positions = torch.arange(8)[None, :, None].expand(2, -1, -1)
    whole = model(latents, time, positions, mask).latents
    cache, parts = DynamicCache(), []
    for block in (slice(0, 4), slice(4, 8)):
        parts.append(
            model(
                latents[:, block], time[:, block], positions[:, block], past_key_values=cache
            ).latents
        )
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_three_axes_need_no_other_class():
    model = transformer(num_position_axes=2)
    positions = torch.cartesian_prod(torch.arange(2), torch.arange(3))[None]
    latents, time = torch.randn(1, 6, 6), torch.rand(1, 6)
    order = torch.randperm(6)
    straight = model(latents, time, positions).latents[:, order]
    shuffled = model(latents[:, order], time[:, order], positions[:, order]).latents
    torch.testing.assert_close(
        straight, shuffled, atol=1e-5, rtol=1e-4
    )  # positions, not order, tell places apart
    assert not torch.allclose(model(latents, time, positions.flip(-1)).latents[:, order], straight)


def test_draws_of_the_noise_see_the_same_text_and_not_each_other():
    order, valid = torch.tensor([[0, 0, 1, 1]]), torch.ones(1, 4, dtype=torch.bool)
    single, triple = block_causal_mask(order, valid)[0], block_causal_mask(order, valid, draws=3)[0]
    assert triple.shape == (16, 16) and torch.equal(triple[:4, :4], single[:4, :4])
    for draw in (4, 8, 12):
        rows = triple[draw : draw + 4]
        assert torch.equal(rows[:, :4], single[4:, :4]) and torch.equal(
            rows[:, draw : draw + 4], single[4:, 4:]
        )
        assert rows.sum() == single[4:].sum()  # nothing else


@torch.no_grad()
def test_noisy_latents_enter_after_the_context_layers():
    model = transformer(num_context_layers=1, num_hidden_layers=3)
    latents, time = torch.randn(1, 8, 6), torch.rand(1, 8)
    order, valid = torch.arange(4)[None], torch.ones(1, 4, dtype=torch.bool)
    mask = block_causal_mask(order, valid)
    whole = model(latents, time, attention_mask=mask, num_context=4).latents
    calls = []
    model.layers[0].register_forward_hook(
        lambda module, args, output: calls.append(output.shape[1])
    )
    torch.testing.assert_close(
        model(latents, time, attention_mask=mask, num_context=4).latents, whole
    )
    assert calls == [4]  # the noisy half did not pass
    positions = torch.arange(4)[None, :, None]
    positions = torch.cat((positions, positions), dim=1)
    whole = model(latents, time, positions, mask, num_context=4).latents
    cache = DynamicCache()
    model(
        latents[:, :2],
        time[:, :2],
        positions[:, :2],
        mask[:, :2, :2],
        past_key_values=cache,
        num_context=2,
    )
    block = model(latents[:, 6:7], time[:, 6:7], positions[:, 6:7], past_key_values=cache).latents
    torch.testing.assert_close(
        block, whole[:, 6:7], atol=1e-5, rtol=1e-4
    )  # a cached context gives the same
