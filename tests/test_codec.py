import math

import pytest
import torch

from tokcom.codec_chunk_tokcom import TokComChunkCodec
from tokcom.configuration_codec_tokcom import TokComChunkCodecConfig

FORMS = {
    "mlp": {},
    "attention": dict(
        layer_type="attention", embedding_size=32, num_attention_heads=4, num_key_value_heads=2
    ),
    "published": dict(
        layer_type="attention",
        variational=False,
        latent_channels=32,
        embedding_size=32,
        num_attention_heads=4,
    ),
}


def codec(form="mlp", **overrides) -> TokComChunkCodec:
    torch.manual_seed(0)
    fields = dict(
        vocab_size=61,
        mask_token_id=60,
        pad_token_id=60,
        chunk_size=4,
        latent_channels=12,
        embedding_size=16,
    )
    fields |= (
        dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1) | FORMS[form] | overrides
    )
    return TokComChunkCodec(TokComChunkCodecConfig(**fields))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk_size", [1, 2, 4, 8])
def test_shapes_follow_chunk_size(form, chunk_size):
    model = codec(form, chunk_size=chunk_size)
    ids = torch.randint(0, 60, (3, 16))
    output = model.encode(ids)
    assert output.latents.shape == (3, 16 // chunk_size, model.config.latent_channels)
    assert output.position_ids.shape == (3, 16 // chunk_size, 1)
    assert model.decode(output.latents).logits.shape == (3, 16, 61)
    assert model.to_ids(output.latents).shape == (3, 16)


@pytest.mark.parametrize("form", FORMS)
def test_chunks_are_encoded_independently(form):
    model = codec(form).eval()
    ids = torch.randint(0, 60, (1, 12))
    changed = ids.clone()
    changed[0, 5] = (ids[0, 5] + 1) % 60
    difference = (model.encode(ids).latents - model.encode(changed).latents).abs().sum(-1)[0]
    assert (difference > 1e-6).tolist() == [False, True, False]


def test_length_that_is_no_multiple_of_k_is_an_error_with_a_remedy():
    with pytest.raises(ValueError, match=r"\(10\).*`chunk_size` \(4\).*12"):
        codec().encode(torch.zeros(1, 10, dtype=torch.long))


def test_padding_content_cannot_leak():
    model = codec().eval()
    ids = torch.randint(0, 60, (1, 8))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
    other = ids.clone()
    other[0, :2] = torch.tensor([7, 8])
    assert torch.equal(model.encode(ids, mask).latents, model.encode(other, mask).latents)


def test_training_loss_averages_over_real_tokens_only():
    model = codec().eval()
    ids = torch.randint(0, 60, (1, 8))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0]])
    _, parts = model.training_loss(ids, mask)
    states = model._token_states(model.encode(ids, mask).latents.flatten(0, 1)).flatten(0, 1)
    nll = torch.nn.functional.cross_entropy(
        states @ model.embed_tokens.weight[:-1].T, ids[0], reduction="none"
    )
    torch.testing.assert_close(parts["ce_loss"], nll[:6].mean().detach())
    assert not torch.isclose(parts["ce_loss"], nll.mean())


def test_latent_mask_marks_chunks_with_a_real_token():
    mask = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1]])
    assert codec().encode(torch.zeros(1, 12, dtype=torch.long), mask).mask.tolist() == [
        [False, True, True]
    ]


def test_statistics_standardize_and_decode_undoes_them():
    model = codec().eval()
    ids = torch.randint(0, 60, (64, 16))
    raw = model.encode(ids).latents
    logits = model.decode(raw).logits
    model.set_latent_statistics(raw.flatten(0, 1).mean(0), raw.flatten(0, 1).std(0))
    latents = model.encode(ids).latents
    torch.testing.assert_close(latents.mean((0, 1)), torch.zeros(12), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.flatten(0, 1).std(0), torch.ones(12), atol=1e-4, rtol=0)
    torch.testing.assert_close(model.decode(latents).logits, logits, atol=1e-4, rtol=1e-4)


def test_kl_is_clipped_from_below():
    model = codec().eval()
    model.set_loss(kl_free_nats=0.5)
    torch.nn.init.zeros_(model.to_posterior.weight)
    torch.nn.init.zeros_(
        model.to_posterior.bias
    )  # the posterior equals the prior: KL 0, clipped to 0.5 a channel
    _, parts = model.training_loss(torch.randint(0, 60, (2, 8)))
    assert parts["kl_loss"].item() == pytest.approx(0.5 * 12)


def test_dropout_and_sampling_act_in_training_only():
    model = codec()
    ids = torch.randint(0, 60, (2, 8))
    model.eval()
    assert torch.equal(model.training_loss(ids)[0], model.training_loss(ids)[0])
    model.train()
    assert not torch.equal(model.training_loss(ids)[0], model.training_loss(ids)[0])


@pytest.mark.parametrize(
    "settings", [{"token_dropout": 1.0}, {"kl_weight": -1.0}, {"kl_wait": 1.0}]
)
def test_impossible_settings_of_the_loss_are_named(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        codec().set_loss(**settings)


QUANTIZERS = [
    dict(quantizer="vq", num_codes=32),
    dict(quantizer="vq", num_codes=16, num_quantizers=3),
    dict(quantizer="fsq", fsq_levels=[5] * 12),
]


@pytest.mark.parametrize("options", QUANTIZERS)
def test_codes_store_exactly_what_is_decoded(options):
    model = codec(**options).train()
    ids = torch.randint(0, 60, (3, 16))
    model.training_loss(ids)[0].backward()  # the first batch makes the codebook
    model.eval().set_latent_statistics(torch.randn(12), torch.rand(12) + 0.5)
    encoded = model.encode(ids)
    torch.testing.assert_close(model.from_codes(encoded.codes), encoded.latents)
    assert torch.equal(model.to_ids(model.from_codes(encoded.codes)), model.to_ids(encoded.latents))
    levels = options.get("fsq_levels") or [options["num_codes"]] * options.get("num_quantizers", 1)
    assert model.config.bits_per_token == pytest.approx(sum(map(math.log2, levels)) / 4)


@pytest.mark.parametrize("options", QUANTIZERS)
def test_a_quantised_codec_learns_and_its_codebook_is_no_parameter(options):
    model = codec(**options).train()
    model.set_loss(token_dropout=0.0, latent_dropout=0.0)
    ids = torch.randint(0, 6, (8, 16))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        loss, parts = model.training_loss(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(parts["ce_loss"].item())
    assert losses[-1] < 0.5 * losses[0]
    kept = {id(p) for p in optimizer.state}
    assert all(id(buffer) not in kept for buffer in model.buffers())
    assert not any("codebook" in name for name, _ in model.named_parameters())


def test_a_frozen_codec_keeps_its_codes_in_training_mode():
    model = codec(quantizer="vq", num_codes=32).train()
    model.training_loss(torch.randint(0, 60, (3, 16)))
    before = model.quantizer.levels[0].codebook.clone()
    model.encode(torch.randint(0, 60, (3, 16)))
    assert torch.equal(model.quantizer.levels[0].codebook, before)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(quantizer="lookup"), "'fsq'"),
        (dict(quantizer="fsq", fsq_levels=[3, 3]), "12 `latent_channels`"),
        (dict(quantizer="fsq", latent_channels=64, fsq_levels=[5] * 64), "64 bits"),
    ],
)
def test_impossible_quantisers_are_named(options, message):
    with pytest.raises(Exception, match="architecture") as error:
        codec(**options)
    assert message in str(error.value.__cause__ or error.value)
    with pytest.raises(ValueError, match="no quantiser"):
        codec().from_codes(torch.zeros(1, 2, 1, dtype=torch.long))
