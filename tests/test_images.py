"""Models of pictures: codec, codebook, flow, processor and pipeline."""

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from tiny_images import CODEC, FLOW, codec, model, pictures, pipeline, randomized

from tokcom.codec_style_tokcom import TokComStyleCodec, gradient_loss
from tokcom.configuration_media_tokcom import TokComStyleCodecConfig
from tokcom.configuration_tokcom import TokComConfig
from tokcom.processing_tokcom import TokComImageProcessor
from tokcom.training.presets import preset_config

# ---- the codec ----


@pytest.mark.parametrize("size,patch,tokens", [(16, 4, 6), (32, 8, 2), (12, 3, 10)])
def test_images_of_any_size_become_tokens_and_images_again(size, patch, tokens):
    net = codec(image_size=size, patch_size=patch, num_tokens=tokens)
    encoded = net.encode(torch.zeros(2, 3, size, size))
    assert encoded.latents.shape == (2, tokens, 4) and encoded.position_ids.shape == (2, tokens, 1)
    assert net.decode(encoded.latents).pixel_values.shape == (2, 3, size, size)


def test_patches_return_to_where_they_were():
    net = codec()
    patches = torch.arange(16.0)[None, :, None].expand(1, 16, 48)
    net.decoder.norm = net.decoder.proj_out = torch.nn.Identity()
    net.decoder.positions = torch.nn.Parameter(patches)
    net.decoder.styled_layers = net.decoder.layers = torch.nn.ModuleList()
    image = net.decoder(torch.zeros(1, 6, 4))
    expected = torch.arange(16.0).view(4, 4).repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert torch.equal(image, expected.expand(1, 3, 16, 16))


@pytest.mark.parametrize("slot", [0, 3, 5])
def test_an_expert_of_the_last_layer_changes_only_its_own_token(slot):
    net, images = randomized(codec()), pictures()
    before = net.encode(images).latents
    with torch.no_grad():
        net.encoder.layers[-1].experts.down[slot] += 1
    changed = (net.encode(images).latents != before).any(-1)
    assert changed[:, slot].all() and changed.sum() == len(images)


def test_grouped_experts_are_one_network_for_each_place():
    experts = randomized(codec()).encoder.layers[-1].experts
    inputs = torch.randn(2, 6, 32)
    alone = []
    for k in range(6):
        inner = torch.nn.functional.gelu(inputs[:, k] @ experts.up[k] + experts.up_bias[k])
        alone.append(inner @ experts.down[k] + experts.down_bias[k])
    torch.testing.assert_close(experts(inputs), torch.stack(alone, dim=1))


@pytest.mark.parametrize("bottleneck", ["gaussian", "sphere", "cosine"])
def test_bottlenecks_are_not_collapsed_at_initialization(bottleneck):
    net = codec(bottleneck=bottleneck, latent_channels=16, num_tokens=36)
    tokens = torch.nn.functional.normalize(net.encode(pictures(8)).latents.flatten(0, 1), dim=-1)
    cosines = tokens @ tokens.T
    count = len(tokens)
    assert (cosines.sum() - count) / (count * (count - 1)) < 0.2


def test_the_published_soft_codebook_is_collapsed_and_ours_is_its_centred_form():
    soft, inputs = codec(bottleneck="cosine", latent_channels=64).soft_codebook, torch.randn(50, 64)
    weights = (
        torch.nn.functional.normalize(inputs, dim=-1)
        @ torch.nn.functional.normalize(soft.directions, dim=-1).T
        + 1
    )
    published = soft.norm(weights / weights.sum(-1, keepdim=True) @ soft.directions)
    similar = torch.nn.functional.cosine_similarity(published[1:], published[:-1]).mean()
    ours = torch.nn.functional.cosine_similarity(soft(inputs)[1:], soft(inputs)[:-1]).mean()
    assert similar > 0.8 and ours.abs() < 0.1


@pytest.mark.parametrize("linear_path", [False, True])
@pytest.mark.parametrize("bottleneck", ["gaussian", "sphere", "cosine"])
def test_codecs_work_in_bfloat16(bottleneck, linear_path):
    net, images = randomized(codec(bottleneck=bottleneck, linear_path=linear_path)), pictures()
    exact = net.decode(net.encode(images).latents).pixel_values
    net.to(torch.bfloat16)
    assert (net.decode(net.encode(images).latents).pixel_values.float() - exact).abs().mean() < 0.1


def test_a_linear_path_alone_is_a_linear_codec():
    net = randomized(codec(linear_path=True))
    with torch.no_grad():
        for silent in (net.to_tokens, net.decoder.norm):
            silent.weight.zero_()
    first, second = pictures(2).split(1)
    ends, middle = (
        net.decoder(net.encode(images).latents).mean(0)
        for images in (torch.cat((first, second)), (first + second) / 2)
    )
    assert middle.std() > 0.1  # a picture, not only a mean
    torch.testing.assert_close(middle, ends, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa_float32"])
def test_an_attention_function_that_is_chosen_later_reaches_the_codec(implementation):
    net = randomized(model())
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        wanted = net.codec.encode(images).latents
        net.set_attn_implementation(implementation)
        found = net.codec.encode(images).latents
    assert net.codec.config._attn_implementation == implementation
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_sphere_tokens_have_one_length():
    tokens = codec(bottleneck="sphere").encode(pictures()).latents
    torch.testing.assert_close(tokens.norm(dim=-1), torch.full((3, 6), 2.0))


def test_two_tokens_are_needed_for_every_styled_layer():
    with pytest.raises(StrictDataclassError, match="num_tokens.*5.*two tokens"):
        TokComStyleCodecConfig(**{**CODEC, "num_tokens": 5})


def test_a_decoder_layer_sees_no_later_token():
    net, latents = randomized(codec(num_decoder_layers=0)), torch.randn(1, 6, 4)
    seen = []
    net.decoder.styled_layers[1].register_forward_hook(
        lambda module, inputs, output: seen.append(output)
    )
    net.decode(latents)
    latents[:, 4:] += 1
    net.decode(latents)
    assert torch.equal(*seen)


def test_left_out_tokens_have_no_influence_and_tail_dropout_leaves_out_the_tail():
    net, latents = randomized(codec()), torch.randn(2, 6, 4)
    other = latents.clone()
    other[:, 2:] = 7
    assert torch.equal(
        net.decode(latents, num_tokens=2).pixel_values, net.decode(other, num_tokens=2).pixel_values
    )
    kept = []
    net.train()._decode = lambda tokens, mask: (
        kept.append(mask) or torch.zeros(len(tokens), 3, 16, 16)
    )
    net.set_loss(tail_dropout=0.5)
    net.training_loss(pictures(1).expand(2000, -1, -1, -1))
    count = kept[0].sum(-1)
    assert (kept[0] == (torch.arange(6) < count[:, None])).all() and count.min() == 1
    assert 0.4 < (count < 6).float().mean() * 6 / 5 < 0.6


@pytest.mark.parametrize("linear_path", [False, True])
def test_the_codec_learns_one_batch(linear_path):
    net, images = codec(linear_path=linear_path), pictures(4)
    net.set_loss(tail_dropout=0.0, kl_weight=0.0)
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    net.train()
    first = net.training_loss(images)[1]["mse_loss"]
    for _ in range(150):
        loss, parts = net.training_loss(images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert parts["mse_loss"] < 0.3 * first


def test_gradient_loss_sees_edges_and_not_brightness():
    image = torch.zeros(1, 3, 16, 16)
    assert gradient_loss(image + 0.5, image) == 0
    edge = image.clone()
    edge[..., 8:] = 0.5
    assert gradient_loss(edge, image) > 0.01


def test_published_presets_have_the_published_experts():
    published = {
        "style-768-128": 2365.8,
        "style-768-64": 2353.2,
        "style-512-128": 2241.5,
        "style-512-64": 2228.9,
    }
    for name, millions in published.items():
        config = preset_config(name).codec_config
        with torch.device("meta"):
            net = TokComStyleCodec._from_config(config)
        experts = sum(
            p.numel() for layer in net.encoder.layers if layer.experts for p in layer.parameters()
        )
        total = sum(p.numel() for p in net.parameters()) / 1e6
        assert round(experts / 1e9, 2) == 1.89 and 0.965 < total / millions < 1


# ---- codebook ----


def test_a_codebook_makes_codes_that_decode_to_their_centres():
    net = randomized(codec())
    net.set_latent_statistics(torch.randn(6, 4), torch.rand(6, 4) + 0.5)
    latents = net.encode(pictures(40)).latents.detach()
    facts = net.fit_codebook(latents, 16)
    encoded = net.encode(pictures(40))
    assert encoded.codes.shape == (40, 6, 1) and facts["usage"] == 1 and 0 < facts["distortion"] < 1
    tokens, centres = latents * net.latent_std + net.latent_mean, net.quantizer.codebook
    nearest = (tokens[:, :, None] - centres).square().sum(-1).argmin(-1, keepdim=True)
    assert torch.equal(nearest, encoded.codes)
    again = net.from_codes(encoded.codes) * net.latent_std + net.latent_mean
    torch.testing.assert_close(again, centres[encoded.codes[..., 0]])


def test_cosine_centres_have_the_length_of_their_tokens():
    net = randomized(codec(bottleneck="sphere"))
    net.fit_codebook(net.encode(pictures(40)).latents.detach(), 8, metric="cosine")
    assert torch.allclose(net.quantizer.codebook.norm(dim=-1), torch.full((8,), 2.0), atol=1e-4)


def test_codes_without_a_codebook_are_refused():
    with pytest.raises(ValueError, match="no codebook.*kmeans"):
        codec().from_codes(torch.zeros(1, 6, 1, dtype=torch.long))


# ---- the flow ----


def test_configurations_that_mix_images_and_tokens_are_refused():
    with pytest.raises(StrictDataclassError, match="latent_head"):
        codec = {"model_type": "tokcom_style_codec", **CODEC}
        TokComConfig(codec_config=codec, transformer_config=FLOW, latent_head="mlp")
    with pytest.raises(StrictDataclassError, match="condition_vocab_size"):
        preset_config("debug", condition_vocab_size=10)
    with pytest.raises(StrictDataclassError, match="max_position_embeddings"):
        fields = {**FLOW, "max_position_embeddings": 5}
        TokComConfig(
            codec_config={"model_type": "tokcom_style_codec", **CODEC}, transformer_config=fields
        )


def test_captions_that_are_padded_change_nothing():
    net, images = randomized(model(20)), pictures(2)
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    padded = torch.cat((ids, torch.full((2, 2), 19)), dim=1)
    mask = torch.tensor([[1, 1, 1, 0, 0]] * 2)
    latents, time = net.encode(pixel_values=images).latents, torch.full((2, 6), 0.3)
    first = net.predict(latents, time, prefix=net.condition(padded, mask)).latents
    torch.testing.assert_close(first, net.predict(latents, time, prefix=net.condition(ids)).latents)
    padded[:, 3:] = 2
    assert torch.equal(
        first, net.predict(latents, time, prefix=net.condition(padded, mask)).latents
    )
    padded[:, 0] = 9
    assert not torch.equal(
        first, net.predict(latents, time, prefix=net.condition(padded, mask)).latents
    )


def test_a_caption_that_is_dropped_is_no_caption():
    net, images = randomized(model(20)), pictures(2)
    latents, time = net.encode(pixel_values=images).latents, torch.full((2, 6), 0.3)
    ids, none = torch.tensor([[3, 4], [6, 7]]), torch.zeros(2, 2)
    dropped = net.predict(latents, time, prefix=net.condition(ids, none)).latents
    torch.testing.assert_close(dropped, net.predict(latents, time).latents)


def test_the_loss_of_the_flow_reaches_transformer_and_captions_only():
    net = randomized(model(20)).train()
    output = net(torch.tensor([[3, 4], [6, 7]]), torch.ones(2, 2), pixel_values=pictures(2))
    output.loss.backward()
    assert output.ce_loss is None and output.mse_loss > 0
    assert (
        net.condition_embedding.weight.grad.abs().sum() > 0
        and net.transformer.proj_out.weight.grad.abs().sum() > 0
    )
    assert all(parameter.grad is None for parameter in net.codec.parameters())


def test_known_latents_give_the_same_loss_as_the_images_they_are_of():
    net, images = randomized(model()), pictures(2)
    losses = []
    for inputs in ({"pixel_values": images}, {"latents": net.encode(pixel_values=images).latents}):
        torch.manual_seed(5)
        losses.append(net(**inputs, timestep=0.5).loss)
    torch.testing.assert_close(*losses)


def test_missing_inputs_are_named():
    with pytest.raises(ValueError, match="pixel_values.*missing"):
        model().encode(torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"pixel_values.*\(1, 3, 8, 8\).*16, 16"):
        model().encode(pixel_values=torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="without captions"):
        model().condition(torch.zeros(1, 2, dtype=torch.long))


# ---- processor and pipeline ----


def test_the_processor_lays_pictures_on_white_and_keeps_their_shape():
    processor = TokComImageProcessor(image_size=4)
    clear = Image.new("RGBA", (8, 4), (255, 0, 0, 0))
    assert (processor(clear)["pixel_values"] == 1).all()
    array = np.zeros((4, 4, 3), dtype=np.uint8)
    array[0, 0] = 255, 0, 51
    values = processor([array])["pixel_values"]
    assert values.shape == (1, 3, 4, 4) and values[0, :, 0, 0].tolist() == pytest.approx(
        [1, -1, -0.6]
    )
    assert np.array_equal(np.array(processor.postprocess(values)[0]), array)
    deep = Image.fromarray(np.full((4, 4), 128 * 256, dtype=np.uint16))
    assert processor(deep)["pixel_values"].unique().item() == pytest.approx(
        128 / 127.5 - 1, abs=1e-5
    )
    for wrong, message in (
        (np.zeros((4, 4, 3), dtype=np.int64), "int64"),
        (np.zeros((4, 4, 1), np.uint8), "4, 4, 1"),
        (Image.new("F", (4, 4)), "'F'"),
    ):
        with pytest.raises(ValueError, match=message):
            processor(wrong)


def test_pictures_are_drawn_for_captions_and_alike_for_one_seed():
    pipe = pipeline()
    pipe.set_progress_bar_config(disable=True)
    outputs = [
        pipe(
            ["a red ball", "a cat"],
            num_inference_steps=3,
            generator=torch.Generator().manual_seed(0),
        )
        for _ in range(2)
    ]
    assert len(outputs[0].images) == 2 and outputs[0].images[0].size == (16, 16)
    assert torch.equal(outputs[0].latents, outputs[1].latents)
    alone = pipe(
        "a red ball", num_inference_steps=1, latents=torch.ones(1, 6, 4), output_type="latent"
    ).latents
    company = pipe(
        ["a red ball", "a blue cat " * 4, ""],
        num_inference_steps=1,
        latents=torch.ones(3, 6, 4),
        output_type="latent",
    )
    torch.testing.assert_close(alone[0], company.latents[0], atol=1e-5, rtol=1e-5)
    free = pipe(num_inference_steps=1, latents=torch.ones(1, 6, 4), output_type="latent").latents
    torch.testing.assert_close(free[0], company.latents[2], atol=1e-5, rtol=1e-5)
    other = pipe(
        ["a blue cat", "a cat"], num_inference_steps=3, generator=torch.Generator().manual_seed(0)
    ).latents
    assert not torch.equal(other[0], outputs[0].latents[0])


def test_guidance_of_one_and_a_half_lies_beyond_the_captioned_prediction():
    pipe = pipeline()
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 6, 4)
    free, plain, guided = (
        pipe(
            prompt, num_inference_steps=1, latents=noise, output_type="latent", guidance_scale=g
        ).latents
        for prompt, g in ((None, 1.0), ("a red ball", 1.0), ("a red ball", 1.5))
    )
    torch.testing.assert_close(guided, free + 1.5 * (plain - free), atol=1e-4, rtol=1e-4)


def test_a_picture_follows_its_caption_as_closely_as_the_model_says():
    pipe = pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.model.config.sampling_guidance_scale = 3.0
    options = {"num_inference_steps": 1, "latents": torch.randn(1, 6, 4), "output_type": "latent"}
    own, asked, off = (
        pipe("a red ball", **options, **scale).latents
        for scale in ({}, {"guidance_scale": 3.0}, {"guidance_scale": 1.0})
    )
    assert torch.equal(own, asked) and not torch.equal(own, off)
    # without a caption there is nothing to follow, and that is no error
    free, plain = (pipe(**options, **scale).latents for scale in ({}, {"guidance_scale": 1.0}))
    assert torch.equal(free, plain)


def test_a_caption_gives_as_many_pictures_as_are_asked_for():
    pipe = pipeline()
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 1, "output_type": "latent"}
    three = pipe("a cat", 3, generator=torch.Generator().manual_seed(0), **options).latents
    listed = pipe(["a cat"] * 3, generator=torch.Generator().manual_seed(0), **options).latents
    assert torch.equal(three, listed) and not torch.equal(three[0], three[1])
    with pytest.raises(ValueError, match=r"`batch_size` \(3\) does not fit 2 captions"):
        pipe(["a cat", "a red ball"], 3, **options)


def test_pipelines_of_images_refuse_what_they_cannot_do():
    pipe = pipeline(captions=False)
    with pytest.raises(ValueError, match="output_type.*text.*pil"):
        pipe(output_type="text")
    with pytest.raises(ValueError, match="guidance_scale"):
        pipe(guidance_scale=2.0)
    with pytest.raises(ValueError, match="num_tokens.*9"):
        pipe.decode(torch.zeros(1, 6, 4), num_tokens=9)
    with pytest.raises(ValueError, match=r"latents.*\(1, 5, 4\).*6 tokens"):
        pipe.decode(torch.zeros(1, 5, 4))
    with pytest.raises(ValueError, match="codes.*99.*16"):
        pipe.model.codec.fit_codebook(torch.randn(8, 6, 4), 16)
        pipe.decode(torch.full((1, 6, 1), 99))
    with pytest.raises(ValueError, match="65 tokens.*64"):
        pipeline().model.condition(torch.zeros(1, 65, dtype=torch.long))
