"""The color codec: exact ids <-> pixels in both layouts, the nearest valid id for anything else,
one model class."""

from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import get_scheduler

from tokcom.codec_color_tokcom import TokComColorCodec
from tokcom.configuration_codec_tokcom import TokComColorCodecConfig
from tokcom.modeling_tokcom import TokComModel
from tokcom.pipeline_tokcom import TokComPipeline
from tokcom.processing_tokcom import vocabulary_size
from tokcom.sampling_tokcom import TokComBlockSampler, TokComSampling, join_blocks
from tokcom.scheduling_tokcom import TokComFlowMatchScheduler
from tokcom.tasks_tokcom import TokComTask
from tokcom.training.modalities import Texts
from tokcom.training.optimizer import build_optimizer
from tokcom.training.presets import preset_config, preset_names

VOCABULARY = 151665


def codec(vocab_size: int = VOCABULARY, **options) -> TokComColorCodec:
    tokens = {"vocab_size": vocab_size + 1, "mask_token_id": vocab_size, "pad_token_id": vocab_size}
    return TokComColorCodec(TokComColorCodecConfig(**tokens, **options))


def pixel_model(vocab_size: int = 320, digits: str = "color", **overrides) -> TokComModel:
    torch.manual_seed(0)
    digits, _, symbols = digits.partition(" of ")
    code = {
        "digits": digits,
        "symbols": symbols or "digits",
        "patch_size": 2,
        "image_size": 8,
        **overrides.pop("codec_config", {}),
    }
    channels = 4 * (3 if digits == "color" else (vocab_size).bit_length())
    shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    shape |= dict(
        num_key_value_heads=4,
        conditioning_size=32,
        latent_channels=channels,
        max_position_embeddings=32,
    )
    shape |= overrides.pop("transformer_config", {})
    overrides.setdefault("token_stagger", 0.0)
    config = preset_config(
        "pixel-tiny", vocab_size, codec_config=code, transformer_config=shape, **overrides
    )
    return TokComModel(config)


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("digits", ["color", "bits"])
@pytest.mark.parametrize("layout", ["contiguous", "raster"])
def test_every_id_survives_the_round_trip(layout, digits, standardize):
    size = VOCABULARY + -VOCABULARY % 256
    ids = (torch.arange(size) % VOCABULARY).view(1, -1)
    model = codec(digits=digits, layout=layout, standardize=standardize)
    latents = model.encode(ids).latents
    assert latents.shape == (1, size // 16, model.config.latent_channels)
    assert torch.equal(model.to_ids(latents), ids)
    symbols, real = model.symbols(ids, None)
    assert torch.equal(model.from_symbols(symbols), ids) and real.all()
    table = model.symbol_table()
    looked_up = table[torch.arange(model.config.num_symbols), symbols][..., 0]
    torch.testing.assert_close(looked_up, latents)


def test_standardised_digits_have_mean_zero_and_deviation_one():
    model = codec(4096)
    latents = model.encode(torch.arange(4096).view(1, -1)).latents.view(-1, 3)
    torch.testing.assert_close(latents.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        latents.std(0, correction=0), torch.tensor([1.0, 1.0, 0.0]), atol=1e-4, rtol=0
    )
    published = codec(4096, standardize=False).encode(torch.tensor([[255] * 16])).latents
    assert published.view(-1, 3)[0].tolist() == [1.0, -1.0, -1.0]


def test_impossible_colors_decode_to_the_nearest_valid_id():
    model = codec(1000, patch_size=1, image_size=1)
    latents = torch.randn(1, 64, 3, generator=torch.Generator().manual_seed(0)) * 3
    table = model.encode(torch.arange(1000).view(1, -1)).latents[0]
    assert torch.equal(model.to_ids(latents), torch.cdist(latents, table[None]).argmin(-1))
    assert torch.equal(model.decode(latents).logits.argmax(-1)[0, :5], model.to_ids(latents)[0, :5])
    assert model.from_symbols(torch.full((1, 1, 3), 255)).item() < 1000


def test_raster_patches_hold_runs_of_the_rows():
    model = codec(4096, layout="raster", image_size=8)
    ids = torch.arange(64).view(1, 64)
    assert model.to_patches(ids)[0, 0].tolist() == [
        0,
        1,
        2,
        3,
        8,
        9,
        10,
        11,
        16,
        17,
        18,
        19,
        24,
        25,
        26,
        27,
    ]
    assert torch.equal(model.from_patches(model.to_patches(ids)), ids)
    with pytest.raises(ValueError, match="32"):
        model.encode(ids[:, :40])


def test_digits_have_cross_entropies_that_see_the_distance():
    model = codec(4096)
    ids = torch.randint(0, 4096, (2, 32))
    latents = model.encode(ids).latents
    assert model.loss(latents, ids).max() < 0.01
    assert model.loss(latents + 0.5, ids).min() > 1


@pytest.mark.parametrize("name", [n for n in preset_names() if n.startswith("pixel")])
def test_presets_are_models(name):
    with torch.device("meta"):
        model = TokComModel(preset_config(name))
    published = {"pixel-b4": 127.68, "pixel-b16": 129.34, "pixel-b32": 134.64, "pixel-l16": 455.73}
    published |= {"pixel-l32": 462.79, "pixel-h16": 947.28, "pixel-h32": 956.11}
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert name not in published or abs(millions / published[name] - 1) < 0.06


@pytest.mark.parametrize("length", [1, 64, 128, 129])
def test_texts_of_every_length_have_a_gradient(length):
    model = pixel_model(transformer_config={"max_position_embeddings": 64}).train()
    ids, mask = torch.randint(0, 320, (1, 132)), torch.zeros(1, 132, dtype=torch.long)
    mask[:, :length] = 1
    model(ids, mask).loss.backward()
    assert model.transformer.proj_out.weight.grad.norm() > 0


@torch.no_grad()
def test_what_a_masked_prefix_holds_changes_no_output():
    model = pixel_model().eval()
    for parameter in model.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    ids, mask = torch.randint(0, 320, (2, 32)), torch.ones(2, 8, dtype=torch.bool)
    mask[:, :4] = False
    latents = model.encode(ids).latents
    other = latents.clone()
    other[:, :4] = torch.randn(2, 4, 12)
    first, second = (
        model.predict(x, 0.5, attention_mask=mask).latents[:, 4:] for x in (latents, other)
    )
    assert (first - second).abs().max() == 0


def test_known_tokens_are_given_and_not_predicted():
    model, ids = pixel_model().eval(), torch.randint(0, 320, (2, 32))
    known = torch.zeros_like(ids)
    known[:, :16] = 1
    losses = model(ids, timestep=0.5, known_mask=known).token_losses
    assert not losses[:, :4].any() and (losses[:, 4:] > 0).any()


def test_raster_models_take_whole_rows_of_patches(tokenizer, monkeypatch):
    raster = {"layout": "raster"}
    with pytest.raises(StrictDataclassError, match=r"`block_size` \(3\).*4 patches"):
        pixel_model(codec_config=raster, transformer_config={"block_size": 3})
    model = pixel_model(
        vocabulary_size(tokenizer), codec_config=raster, transformer_config={"block_size": 4}
    ).eval()
    pipe = TokComPipeline(
        model, TokComFlowMatchScheduler.from_model_config(model.config), tokenizer
    )
    with pytest.raises(ValueError, match=r"`num_chunks` \(3\).*multiple of 4"):
        pipe.generate(num_chunks=3)
    assert pipe.generate(num_chunks=8, num_inference_steps=1).sequences.shape == (1, 32)
    # whole rows, also where a row is longer than the samples of other texts
    monkeypatch.setattr(type(model.config.codec_config), "latents_multiple", 24)
    lengths = []
    made = SimpleNamespace(texts=["a text"])
    pipe.generate = lambda chunks, **options: lengths.append(chunks) or made
    Texts().card_samples(pipe)
    assert set(lengths) == {24}


@pytest.mark.parametrize("digits", ["color", "bits"])
@pytest.mark.parametrize("width", [None, 7, 4000])
def test_a_text_survives_as_a_png_of_any_width(tokenizer, tmp_path, digits, width):
    model = pixel_model(vocabulary_size(tokenizer), digits)
    pipe = TokComPipeline(
        model, TokComFlowMatchScheduler.from_model_config(model.config), tokenizer
    )
    text = "Squinty was a little pig. " * 40 + tokenizer.eos_token
    image = pipe.text_to_image(text, width)
    assert image.width == (width or model.config.codec_config.image_size)
    image.save(tmp_path / "text.png")
    assert pipe.image_to_text(tmp_path / "text.png") == text == pipe.image_to_text(image)


def test_every_id_of_a_large_vocabulary_is_a_pixel_and_other_pixels_are_near_ids():
    model = codec(151_665)
    ids = torch.arange(151_665)
    assert torch.equal(model.from_image(model.to_image(ids, 333)), ids)
    pixels = model.to_image(torch.tensor([5, 77_777]), 2)
    pixels[0, 1, 2] = 200  # blue goes to 2 only
    found = model.from_image(pixels)
    assert found[0] == 5 and found[1] % 65_536 == 77_777 % 65_536 and found[1] < 151_665


def test_the_mask_token_is_never_decoded_to():
    model = codec(320, digits="bits", symbols="tokens", patch_size=2, image_size=8)
    assert int(model.from_symbols(torch.tensor([[[320, 3, 319, 0]]])).max()) < 320


def test_texts_are_no_pictures_of_other_models(tokenizer):
    from tokcom.modeling_tokcom import TokComModel as Model

    other = Model(preset_config("debug", vocabulary_size(tokenizer)))
    pipe = TokComPipeline(
        other, TokComFlowMatchScheduler.from_model_config(other.config), tokenizer
    )
    with pytest.raises(ValueError, match="load a pixel model"):
        pipe.text_to_image("Squinty")


@pytest.mark.parametrize(
    "digits, steps, share",
    [
        pytest.param("bits", 400, 0.85, marks=pytest.mark.slow),
        pytest.param("color", 400, 0.85, marks=pytest.mark.slow),
        pytest.param("bits of tokens", 800, 0.95, marks=pytest.mark.slow),
    ],
)
def test_pixel_model_learns_one_batch_and_writes_it_from_noise(tokenizer, digits, steps, share):
    size = vocabulary_size(tokenizer)
    model = pixel_model(size, digits).train()
    ids = torch.randint(0, size, (4, 32), generator=torch.Generator().manual_seed(3))
    prompt, rest = ids[:, :16], ids[:, 16:]
    optimizer = build_optimizer(model, 3e-3, 1e-2, weight_decay=0.0)
    schedule = get_scheduler("cosine", optimizer, 20, steps)
    for _ in range(steps):
        model(ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    pipe = TokComPipeline(
        model.eval(), TokComFlowMatchScheduler.from_model_config(model.config), tokenizer
    )
    pipe.set_progress_bar_config(disable=True)
    context = model.encode(prompt)
    known = context.mask.shape[1]
    noise = pipe.prepare_latents(4, 4, torch.Generator().manual_seed(0))
    with torch.no_grad():
        positions = model.codec.positions(torch.arange(known, known + 4).expand(4, -1))
        _, written = pipe.sample_latents(TokComTask(noise, context, positions), TokComSampling(20))
    assert (written == rest).float().mean() > share  # by chance 1 in 320
    assert isinstance(pipe("Squinty", gen_length=20, num_inference_steps=2).texts[0], str)


def test_a_context_network_samples_at_the_positions_that_training_showed():
    """The last token of a greedy text costs least of all tokens, by the loss of training."""
    context = dict(num_context_layers=1, block_size=1, head_attention=False, start_latents=True)
    net = pixel_model(
        30,
        "bits of tokens",
        codec_config={"position_axes": 1},
        transformer_config={**context, "num_position_axes": 1},
        token_stagger=1.0,
        num_inference_steps=4,
    ).eval()
    torch.manual_seed(1)
    for name, parameter in net.named_parameters():
        if "modulation" in name or "start" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    prompt = torch.randint(30, (1, 12))
    known = net.encode(prompt)
    noise = torch.randn(1, 2, net.config.codec_config.latent_channels)
    task = TokComTask(noise, known, net.codec.positions(torch.tensor([[3, 4]])))
    sampler = TokComBlockSampler(
        net,
        TokComFlowMatchScheduler.from_model_config(net.config),
        TokComSampling(top_p=1e-6, generator=torch.Generator().manual_seed(0)).resolve(net.config),
    )
    _, ids = join_blocks(sampler.blocks(task), known.latents)
    rows = torch.cat((prompt, ids), dim=1).repeat(30, 1)
    rows[:, -1] = torch.arange(30)
    net.set_stage("flow")
    nats = net(input_ids=rows).token_losses.flatten(1)[:, -1]
    assert nats.argmin() == ids[0, -1] and nats.std() > 1e-3


def test_a_context_network_needs_patches_in_reading_order():
    context = dict(num_context_layers=1, block_size=1, head_attention=False, start_latents=True)
    with pytest.raises(StrictDataclassError, match="position_axes"):
        pixel_model(30, "bits of tokens", transformer_config=context)
    with pytest.raises(StrictDataclassError, match="position_axes"):
        codec(position_axes=3)
