import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from tokcom import layers_tokcom
from tokcom.configuration_tokcom import TokComTransformerConfig
from tokcom.layers_tokcom import (
    apply_rotary,
    chunked_cross_entropy,
    expand_attention_mask,
    rotary_embedding,
)
from tokcom.transformer_tokcom import TokComTransformer

SMALL = dict(
    latent_channels=8,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    conditioning_size=16,
)
HEADS = dict(num_attention_heads=4, num_key_value_heads=2)


def test_rotary_scores_depend_on_relative_position_only():
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 24)
    scores = []
    for shift in (0.0, 7.0):
        positions = (
            torch.tensor([[[3.0, 1.0, 4.0]], [[1.0, 5.0, 9.0]]]) + shift
        )  # two points on three axes
        tables = rotary_embedding(positions, 24, 100.0)
        rotated = apply_rotary(torch.cat((query, key)), tables)
        scores.append((rotated[0] * rotated[1]).sum())
    torch.testing.assert_close(scores[0], scores[1])


def test_rotary_sees_every_axis():
    base = rotary_embedding(torch.zeros(1, 1, 3), 24, 100.0)[0]
    for axis in range(3):
        moved = torch.zeros(1, 1, 3)
        moved[..., axis] = 2.0
        changed = (rotary_embedding(moved, 24, 100.0)[0] != base).squeeze()
        assert changed.sum() == 24 // 3


def test_chunked_cross_entropy_equals_the_direct_one(monkeypatch):
    monkeypatch.setattr(layers_tokcom, "CROSS_ENTROPY_CHUNK", 7)
    torch.manual_seed(0)
    hidden, weight = torch.randn(20, 6, requires_grad=True), torch.randn(11, 6, requires_grad=True)
    targets = torch.randint(0, 11, (20,))
    chunked = chunked_cross_entropy(hidden, weight, targets)
    direct = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    torch.testing.assert_close(chunked, direct)
    for ours, theirs in zip(
        torch.autograd.grad(chunked.sum(), (hidden, weight)),
        torch.autograd.grad(direct.sum(), (hidden, weight)),
    ):
        torch.testing.assert_close(ours, theirs)


def test_training_never_holds_all_logits(monkeypatch):
    """Nothing that is kept for the backward pass is as large as the logits."""
    monkeypatch.setattr(layers_tokcom, "CROSS_ENTROPY_CHUNK", 16)
    hidden, weight = torch.randn(160, 6, requires_grad=True), torch.randn(500, 6)
    targets, kept = torch.zeros(160, dtype=torch.long), []

    def largest(loss) -> int:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.append(t.numel()) or t, lambda t: t
        ):
            loss()
        return max(kept)

    direct = largest(lambda: F.cross_entropy(hidden @ weight.T, targets).backward())
    chunked = largest(lambda: chunked_cross_entropy(hidden, weight, targets).mean())
    assert direct >= 160 * 500 and chunked < 16 * 500


def transformer(implementation="sdpa", **overrides) -> TokComTransformer:
    torch.manual_seed(0)
    config = TokComTransformerConfig(**{**SMALL, **HEADS, **overrides})
    return TokComTransformer._from_config(config, attn_implementation=implementation)


def test_gated_block_is_identity_at_initialization():
    model = transformer()
    x = torch.randn(2, 5, 32)
    tables = rotary_embedding(torch.arange(5)[None, :, None], 8, 1e4)
    assert torch.equal(model.layers[0](x, torch.randn(2, 5, 16), tables), x)


def randomize(model):
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
def test_attention_implementations_agree(implementation):
    torch.manual_seed(2)
    latents, time = torch.randn(2, 12, 8), torch.rand(2, 12)
    mask = torch.rand(2, 12, 12) > 0.5
    mask |= torch.eye(12, dtype=torch.bool)
    reference = randomize(transformer("sdpa"))(latents, time, attention_mask=mask).latents
    other = randomize(transformer(implementation))(latents, time, attention_mask=mask).latents
    torch.testing.assert_close(other, reference, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
def test_key_masks_work_with_a_cache_on_every_implementation(implementation):
    outputs = []
    for name in ("sdpa", implementation):
        torch.manual_seed(2)
        model, cache = randomize(transformer(name)), DynamicCache()
        model(torch.randn(1, 8, 8), torch.ones(1, 8), past_key_values=cache)
        keys = torch.tensor([[False, False] + [True] * 8])
        outputs.append(
            model(
                torch.randn(1, 2, 8), torch.ones(1, 2), attention_mask=keys, past_key_values=cache
            ).latents
        )
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("keys", [8, 24, 40])
def test_flex_attention_is_right_on_the_cpu_at_lengths_its_kernel_misreads(keys):
    latents, time = torch.randn(2, keys, 8), torch.rand(2, keys)
    results = [
        randomize(transformer(name))(latents, time).latents for name in ("sdpa", "flex_attention")
    ]
    torch.testing.assert_close(*results)
    results[1].sum().backward()


@pytest.mark.parametrize("shape", [(2, 10), (2, 3, 10)])
def test_the_block_mask_of_flex_attention_says_what_the_boolean_mask_says(shape, monkeypatch):
    monkeypatch.setattr(
        layers_tokcom, "attention_backend", lambda implementation, device: implementation
    )
    mask = torch.rand(shape) > 0.5
    block_mask = expand_attention_mask(mask, 3, "flex_attention", torch.float32)
    batch, query, key = torch.meshgrid(
        torch.arange(2), torch.arange(3), torch.arange(10), indexing="ij"
    )
    said = block_mask.mask_mod(batch, torch.zeros_like(batch), query, key)
    assert torch.equal(said, (mask[:, None] if mask.ndim == 2 else mask).expand(2, 3, 10))


def test_flash_attention_refuses_masks_it_cannot_express():
    mask = torch.ones(1, 4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="flash_attention_2.*sdpa"):
        expand_attention_mask(mask, 4, "flash_attention_2", torch.float32)
    assert expand_attention_mask(mask[:, 0], 4, "flash_attention_2", torch.float32).shape == (1, 4)


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = randomize(transformer()).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        model(torch.randn(2, 6, 8), torch.rand(2, 6)).latents.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, checkpointed in zip(*gradients):
        torch.testing.assert_close(plain, checkpointed)


def test_layer_outputs_are_recorded_on_request():
    output = transformer("eager")(torch.randn(1, 3, 8), torch.rand(1, 3), output_hidden_states=True)
    assert len(output.hidden_states) >= 2
