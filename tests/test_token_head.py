"""The laws of `prediction_type="tokens"`: Bayes' rule, exact sampling, places with times of their
own."""

import pytest
import torch
from helpers import build_model, seeded, tiny_config

from tokcom.heads_tokcom import TokComChoice, nucleus
from tokcom.modeling_tokcom import TokComModel
from tokcom.sampling_tokcom import TokComSampling
from tokcom.scheduling_tokcom import sample_times
from tokcom.tasks_tokcom import TokComTask

TOKENS = {"prediction_type": "tokens", "codec_config": {"encoder_type": "token"}}


def token_model(**overrides) -> TokComModel:
    torch.manual_seed(0)
    split = {"num_context_layers": 1, "block_size": 1}
    model = TokComModel(tiny_config(**TOKENS, transformer_config=split, **overrides)).eval()
    with torch.no_grad():
        model.codec.embed_tokens.weight.normal_()
        model.codec.to_posterior.weight.normal_(std=0.1)
        model.token_head.bias.normal_()
        latents = model.encode(torch.arange(320).view(1, -1)).latents[0]
        model.codec.set_latent_statistics(latents.mean(0), latents.std(0))
    return model


@torch.no_grad()
def test_clean_latents_are_read_as_their_tokens():
    model, ids = token_model(), torch.randint(0, 320, (2, 8))
    symbols, clean, chunks = model.symbols(), model.encode(ids), ids.view(2, 2, 4)
    read = model.token_head.read(symbols, clean.latents, torch.ones(2, 2, 4))
    torch.testing.assert_close(
        read, model.token_head.read(symbols, clean.latents, torch.ones(2, 2, 4), chunks)
    )
    expected = model.token_head.embedding(chunks).flatten(2) * 128**0.5
    torch.testing.assert_close(read, expected, atol=1e-4, rtol=1e-4)
    noise = [
        model.token_head.read(symbols, torch.randn(2, 2, 16), torch.zeros(2, 2, 4))
        for _ in range(2)
    ]
    assert torch.equal(*noise)  # pure noise says nothing


@torch.no_grad()
def test_expected_latent_of_certain_tokens_is_their_encoding():
    model, ids = token_model(), torch.randint(0, 320, (2, 8))
    latents, symbols, head = model.encode(ids).latents, model.symbols(), model.token_head
    states = 1000 * head.embedding(ids).view(2, 2, -1)
    sure = head.mean_latents(states, symbols, torch.randn_like(latents), torch.zeros(2, 2, 4))
    torch.testing.assert_close(sure, latents, atol=1e-4, rtol=1e-4)
    # and when the network expects nothing, nearly clean latents are recognised by their likelihood
    recognised = head.mean_latents(
        torch.zeros_like(states), symbols, 0.99 * latents, torch.full((2, 2, 4), 0.98)
    )
    torch.testing.assert_close(recognised, latents, atol=1e-3, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("stagger", [0.0, 0.5])
def test_token_probabilities_are_bayes_rule(stagger):
    model, ids = token_model(noise_std=0.7, token_stagger=stagger), torch.randint(0, 320, (2, 8))
    head, symbols = model.token_head, model.symbols()
    states, noisy, time = (
        torch.randn(2, 2, 4 * 128),
        torch.randn(2, 2, 16),
        torch.tensor([[0.1, 0.3], [0.35, 0.2]]),
    )
    chosen = torch.ones(2, 2, 4, dtype=torch.bool)
    times = head.place_times(time)
    mean, nll = head.nll(states, symbols, noisy, times, ids.view(2, 2, 4), chosen)
    torch.testing.assert_close(mean, nll.mean())
    prior = (states.view(2, 2, 4, 128) @ head.embedding.weight.T + head.prior).log_softmax(
        -1
    )  # (B, N, K, V)
    t = times[..., None, None]
    normal = torch.distributions.Normal(t * symbols.table, (1 - t) * 0.7)
    posterior = (prior + normal.log_prob(noisy.view(2, 2, 4, 1, 4)).sum(-1)).log_softmax(-1)
    expected = -posterior.gather(-1, ids.view(2, 2, 4, 1))[..., 0]
    torch.testing.assert_close(nll, expected, atol=2e-3, rtol=1e-3)
    chosen[:, 0] = False
    _, some = head.nll(states, symbols, noisy, times, ids.view(2, 2, 4), chosen)
    assert not some[:, 0].any()
    torch.testing.assert_close(some[:, 1], nll[:, 1])


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 3, 16])
@pytest.mark.parametrize("stagger", [0.0, 1.0])
def test_sampling_draws_tokens_with_the_probabilities_that_the_network_expects(
    build, stagger, steps
):
    """Tokens that do not depend on each other are drawn with the network's probabilities, however
    few the steps."""
    overrides = dict(TOKENS)
    split = {"num_context_layers": 1, "block_size": 1}
    pipe = build(
        **overrides, token_stagger=stagger, timestep_sampling="uniform", transformer_config=split
    )
    model = token_model(token_stagger=stagger, timestep_sampling="uniform")
    pipe.model.load_state_dict(model.state_dict())
    torch.nn.init.zeros_(pipe.model.transformer.proj_out.weight)
    torch.nn.init.zeros_(pipe.model.transformer.proj_out.bias)
    bias = torch.full((321,), -30.0)
    bias[[3, 50, 200]] = torch.tensor([0.6, 0.3, 0.1]).log()
    pipe.model.token_head.bias.copy_(bias)
    noise = torch.randn(3000, 1, 16, generator=torch.Generator().manual_seed(0))
    sampling = TokComSampling(steps, generator=torch.Generator().manual_seed(1))
    latents, ids = pipe.sample_latents(TokComTask(noise), sampling)
    latents = latents[:, 0].view(3000, 4, 4)
    table = pipe.model.codec.symbol_table()
    for place in range(4):
        drawn = torch.cdist(latents[:, place], table[place]).argmin(-1)
        assert torch.equal(drawn, ids[:, place])
        shares = torch.bincount(drawn, minlength=321)[[3, 50, 200]] / 3000
        torch.testing.assert_close(shares, torch.tensor([0.6, 0.3, 0.1]), atol=0.03, rtol=0)


def test_places_take_their_turns():
    together, turns = (
        token_model().token_head,
        token_model(token_stagger=1.0, token_shift=1.0).token_head,
    )
    time = torch.linspace(0, 1, 9)
    assert (together.place_times(time)[:, :1] == together.place_times(time)).all()
    times = turns.place_times(time)
    expected = [
        [0, 0, 0, 0],
        [0.5, 0, 0, 0],
        [1, 0, 0, 0],
        [1, 0.5, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 0.5, 0],
    ]
    torch.testing.assert_close(times[:6], torch.tensor(expected))
    assert (times[0] == 0).all() and (times[-1] == 1).all()


def test_draws_of_one_text_are_spread_over_time():
    model = token_model(timestep_sampling="uniform")
    times = sample_times(model.config, torch.zeros(50, 8, dtype=torch.long), 4)  # (B, M, N)
    assert torch.equal((times[..., 0] * 4).long(), torch.arange(4).expand(50, -1))
    assert (times == times[..., :1]).all()  # one block


@torch.no_grad()
def test_nucleus_keeps_the_fewest_tokens_that_reach_top_p():
    kept = nucleus(torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.97, 0.01, 0.01, 0.01]]), 0.7)
    assert torch.equal(
        kept > 0, torch.tensor([[False, True, False, True], [True, False, False, False]])
    )


def test_only_tokens_whose_turn_it_is_are_trained():
    model = token_model(token_stagger=1.0)
    losses = model(
        torch.randint(0, 320, (2, 32)), timestep=0.375
    ).token_losses  # the second of four is half done
    assert (losses[..., 1] > 0).all() and not losses[..., [0, 2, 3]].any()


def test_loss_ignores_padding_and_reaches_every_trained_parameter():
    model = token_model(token_stagger=0.5).train()
    model.set_stage("flow", noise_draws=2)
    ids, mask = torch.randint(0, 320, (2, 32)), torch.ones(2, 32, dtype=torch.long)
    mask[0, :3] = 0
    model(ids, mask).loss.backward()
    missing = [
        n
        for n, p in model.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    # adaLN-zero: nothing behind a closed gate is reached at initialisation, nor what those layers
    # read
    assert not [n for n in missing if "layers" not in n and "time_embedding" not in n]
    model.eval()
    torch.manual_seed(0)
    first = model(ids, mask, timestep=0.0)
    ids[0, :3] = 7
    torch.manual_seed(0)
    assert torch.equal(first.token_losses, model(ids, mask, timestep=0.0).token_losses)
    assert not first.token_losses[0, 0, :3].any()


@torch.no_grad()
def test_temperature_sharpens_what_the_network_expects_and_not_the_likelihood():
    model, states, ids = (
        token_model(token_shift=1.0),
        torch.randn(1, 2, 4 * 128),
        torch.randint(0, 320, (1, 8)),
    )
    head, symbols, latents = model.token_head, model.symbols(), model.encode(ids).latents
    best = (states.view(1, 8, -1) @ head.embedding.weight.T + head.bias)[..., :320].argmax(-1)
    assert (best != ids).all()
    times, uniform = torch.full((1, 2, 4), 0.97), torch.rand(1, 2, 4)
    chosen = TokComChoice.of(times > 0)
    sharp = head.draw(states, symbols, 0 * latents, 0 * times, chosen, uniform, temperature=1e-4)
    assert torch.equal(sharp.flatten(1), best)
    flat = head.draw(states, symbols, 0.97 * latents, times, chosen, uniform, temperature=1e4)
    assert torch.equal(flat.flatten(1), ids)  # a tempered likelihood would have forgotten them


def test_tokens_need_an_encoder_per_token():
    with pytest.raises(Exception, match="encoder_type"):
        tiny_config(prediction_type="tokens")
    with pytest.raises(Exception, match="token_stagger"):
        tiny_config(**TOKENS, token_stagger=1.5)


def test_a_draw_of_pure_noise_is_the_same_with_and_without_its_constant_likelihood():
    model = build_model()
    head, config = model.token_head, model.config.transformer_config
    with torch.no_grad():
        symbols = model.symbols()
        states = torch.randn(2, 3, config.feature_size, generator=seeded())
        times = torch.zeros(2, 3, head.num_symbols)
        uniform = torch.rand(times.shape, generator=seeded(1))
        noise = torch.randn(2, 3, config.latent_channels, generator=seeded(2))
        drawn = [
            head.draw(states, symbols, noise, times, TokComChoice.of(times == 0, blank), uniform)
            for blank in (False, True)
        ]
    assert torch.equal(*drawn)


def test_embeddings_are_read_alike_with_and_without_a_gradient():
    model = build_model()
    head = model.token_head
    noise = torch.randn(2, 3, model.config.transformer_config.latent_channels, generator=seeded())
    times = torch.rand(2, 3, head.num_symbols, generator=seeded(1)).round(decimals=1)
    times[0] = 1.0
    with torch.no_grad():
        quick = head.read(model.symbols(), noise, times)
    assert torch.equal(quick, head.read(model.symbols(), noise, times).detach())
