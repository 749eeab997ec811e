"""Images as ordered tokens: codec, bottlenecks, flow with captions, pipeline, training, codebook."""

import io
import json
import signal

import datasets
import gradio
import numpy as np
import pytest
import torch
from helpers import ROOT
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers import ResNetConfig, ResNetModel

from tokcom.cli import app
from tokcom.cli.main import main as convert
from tokcom.codec_style_tokcom import TokComStyleCodec, gradient_loss
from tokcom.configuration_media_tokcom import TokComStyleCodecConfig
from tokcom.configuration_tokcom import TokComConfig
from tokcom.evaluation.images import PCA, frechet, jpeg, main, order_facts, psnr, ssim
from tokcom.inference import main as infer
from tokcom.modeling_tokcom import TokComModel
from tokcom.pipeline_media_tokcom import TokComImagePipeline
from tokcom.pipeline_tokcom import TokComPipeline
from tokcom.processing_tokcom import TokComImageProcessor, vocabulary_size
from tokcom.scheduling_tokcom import TokComFlowMatchScheduler
from tokcom.train_accelerate import main as train
from tokcom.training.config import DataConfig, TrainConfig
from tokcom.training.corpora import read_data
from tokcom.training.data import train_tokenizer
from tokcom.training.images import ImageDataset, pad_captions, picture_grid
from tokcom.training.perceptual import FeatureLoss
from tokcom.training.presets import preset_config, preset_names
from tokcom.training.trainer import Trainer

CODEC = dict(
    image_size=16,
    patch_size=4,
    num_tokens=6,
    latent_channels=4,
    hidden_size=32,
    intermediate_size=48,
)
CODEC |= dict(
    num_attention_heads=2, num_hidden_layers=1, num_expert_layers=1, expert_intermediate_size=16
)
CODEC |= dict(decoder_hidden_size=24, decoder_intermediate_size=32, decoder_num_attention_heads=2)
CODEC |= dict(num_decoder_layers=1)
FLOW = dict(
    latent_channels=4,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
)
FLOW |= dict(
    num_key_value_heads=2, max_position_embeddings=6, conditioning_size=16, block_size=None
)
FLOW |= dict(per_latent_timestep=False)
EMOJI = str(ROOT / "sample_data/emoji_train.parquet")


def codec(**overrides) -> TokComStyleCodec:
    torch.manual_seed(0)
    return TokComStyleCodec._from_config(TokComStyleCodecConfig(**{**CODEC, **overrides})).eval()


def model(condition_vocab_size: int = 0, **overrides) -> TokComModel:
    torch.manual_seed(0)
    fields = dict(
        codec_config={"model_type": "tokcom_style_codec", **CODEC, **overrides},
        transformer_config=FLOW,
    )
    config = TokComConfig(**fields, condition_vocab_size=condition_vocab_size)
    return TokComModel(config).eval()


def randomized(module):
    torch.manual_seed(1)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module.eval()


def pictures(count: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1


def pipeline(captions: bool = True) -> TokComImagePipeline:
    tokenizer = train_tokenizer(["a red ball", "a blue cat"], 300) if captions else None
    net = randomized(model(vocabulary_size(tokenizer) + 1 if captions else 0))
    return TokComImagePipeline(
        net, TokComFlowMatchScheduler.from_model_config(net.config), tokenizer
    )


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


@pytest.mark.parametrize("bottleneck", ["gaussian", "sphere", "cosine"])
def test_codecs_work_in_bfloat16(bottleneck):
    net, images = randomized(codec(bottleneck=bottleneck)), pictures()
    exact = net.decode(net.encode(images).latents).pixel_values
    net.to(torch.bfloat16)
    assert (net.decode(net.encode(images).latents).pixel_values.float() - exact).abs().mean() < 0.1


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


def test_the_codec_learns_one_batch():
    net, images = codec(), pictures(4)
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


# ---- data and training ----


def animated(frames: int = 5) -> bytes:
    buffer = io.BytesIO()
    images = [Image.new("RGB", (16, 16), (40 * i, 0, 0)) for i in range(frames)]
    images[0].save(buffer, "WEBP", save_all=True, append_images=images[1:], lossless=True)
    return buffer.getvalue()


def test_an_animated_picture_gives_another_frame_in_other_epochs():
    dataset = ImageDataset(
        datasets.Dataset.from_dict({"image": [animated()]}), "image", "", None, 0, training=True
    )
    seen = set()
    for epoch in range(20):
        dataset.set_epoch(epoch)
        seen.add(round(float(dataset[0]["pixel_values"][0, 0, 0]), 2))
    assert len(seen) > 2


def test_broken_pictures_are_named():
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "PNG")
    for value in (b"not a picture", buffer.getvalue()[:-400]):
        dataset = ImageDataset(
            datasets.Dataset.from_dict({"image": [value]}), "image", "", None, 0, training=True
        )
        with pytest.raises(ValueError, match="record 0 .* holds no picture"):
            dataset[0]


def test_captions_are_padded_to_the_longest():
    padded = pad_captions([[1, 2, 3], [], [4]], 9)
    assert padded["input_ids"].tolist() == [[1, 2, 3], [9, 9, 9], [4, 9, 9]]
    assert padded["attention_mask"].sum(1).tolist() == [3, 0, 1]


def test_grids_hold_every_picture():
    grid = picture_grid(
        [[Image.new("RGB", (4, 4), "red")] * 3, [Image.new("RGB", (4, 4), "blue")]], scale=2
    )
    assert (
        grid.size == (28, 18)
        and grid.getpixel((27, 0)) == (255, 0, 0)
        and grid.getpixel((0, 17)) == (0, 0, 255)
    )


def test_feature_distance_is_zero_for_equal_images_and_reaches_the_output(tmp_path):
    ResNetModel(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ).save_pretrained(tmp_path)
    distance, images = FeatureLoss(str(tmp_path), 1.0), pictures(2)
    assert distance(images, images) == 0
    output = (images + 0.1 * torch.randn_like(images)).requires_grad_()
    distance(output, images).backward()
    assert output.grad.abs().sum() > 0 and all(
        p.grad is None for p in distance.network.parameters()
    )
    with pytest.raises(ValueError, match="perceptual_model.*nowhere"):
        FeatureLoss(str(tmp_path / "nowhere"), 1.0)


def test_a_picture_is_read_as_its_camera_was_held():
    held = Image.new("L", (8, 8))
    held.paste(255, (0, 0, 8, 4))  # its upper half is white
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    held.save(file := io.BytesIO(), "JPEG", exif=exif)
    pixels = TokComImageProcessor(8)(Image.open(file))["pixel_values"][0, 0]
    assert pixels[:3].mean() < -0.9 and pixels[-3:].mean() > 0.9


SMALL = [f"model.codec_config.{k}={v}" for k, v in CODEC.items()]
SMALL += [
    f"model.transformer_config.{k}={'null' if v is None else str(v).lower()}"
    for k, v in FLOW.items()
]
SMALL += [
    "codec.max_steps=2",
    "flow.max_steps=2",
    "codec.batch_size=4",
    "flow.batch_size=4",
    "report_to=none",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("images") / "model"
    train(["--preset", "style-tiny", "--output_dir", str(directory), *SMALL, "num_samples=1"])
    return directory


def test_training_on_the_sample_pictures_gives_a_repository_that_draws(trained):
    from transformers import AutoImageProcessor, AutoModel

    assert (trained / "run/codec/samples-2.png").is_file() and (
        trained / "run/flow/samples-2.png"
    ).is_file()
    processor = AutoImageProcessor.from_pretrained(trained, trust_remote_code=True)
    pixel_values = processor(Image.new("RGB", (30, 40)))["pixel_values"]
    net = AutoModel.from_pretrained(trained, trust_remote_code=True)
    assert net.encode(pixel_values=pixel_values).latents.shape == (1, 6, 4)
    pipe = TokComImagePipeline.from_pretrained(trained)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("an emoji of a llama", num_inference_steps=2).images[0].size == (16, 16)
    card = (trained / "README.md").read_text()
    assert "text-to-image" in card and '.images[0].save("picture.png")' in card
    latents = net.encode(pixel_values=pixel_values).latents
    assert net.codec.latent_std.shape == (6, 4) and not torch.equal(
        net.codec.latent_std, torch.ones(6, 4)
    )
    assert latents.isfinite().all()


def test_the_command_line_draws_and_rebuilds(trained, tmp_path, capsys):
    files = [str(tmp_path / name) for name in ("drawn.png", "rebuilt.png")]
    here = ["--checkpoint", str(trained), "--num_steps", "2"]
    infer(
        [
            *here,
            "--image_file",
            files[0],
            "--mode",
            "draw",
            "--prompt",
            "a cat",
            "--guidance_scale",
            "2",
        ]
    )
    rebuild = ["--mode", "reconstruct_image", "--input_image", files[0], "--num_tokens", "3"]
    infer([*here, *rebuild, "--image_file", files[1]])
    assert [Image.open(file).size for file in files] == [
        (16, 16)
    ] * 2 and "written" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="pictures, not text: use `tokcom draw`"):
        infer(["--checkpoint", str(trained), "--mode", "reconstruct", "--input_text", "a cat"])


def test_the_page_draws_captions_and_rebuilds_pictures(trained):
    demo = app.Demo(
        TokComPipeline.from_pretrained(ROOT), images=TokComImagePipeline.from_pretrained(trained)
    )
    assert app.build_page(demo) is not None
    shown = demo.draw("a cat", 2, 2.0, 0)
    assert [text for _, text in shown] == [
        "6 of 6 tokens",
        "4 of 6 tokens",
        "2 of 6 tokens",
        "1 of 6 tokens",
    ]
    assert demo.rebuild(Image.new("RGB", (40, 30)))[0][0].size == (192, 192)
    with pytest.raises(gradio.Error, match="no picture"):
        demo.rebuild(None)


def test_kmeans_writes_a_model_that_gives_codes(trained, tmp_path, capsys):
    convert(["kmeans", str(trained), str(tmp_path / "coded"), "--data", EMOJI, "--num_codes", "8"])
    assert "8 codes of 56 pictures" in capsys.readouterr().out
    pipe = TokComImagePipeline.from_pretrained(tmp_path / "coded")
    codes = pipe.encode(Image.new("RGB", (16, 16))).codes
    assert codes.shape == (1, 6, 1) and codes.max() < 8
    assert pipe.decode(codes).images[0].size == (16, 16)
    with pytest.raises(SystemExit, match="TokComPipeline"):
        convert(["kmeans", str(ROOT), str(tmp_path / "x"), "--data", EMOJI])


def test_images_are_evaluated_by_one_command(trained, tmp_path):
    convert(["kmeans", str(trained), str(tmp_path / "coded"), "--data", EMOJI, "--num_codes", "8"])
    arguments = [
        "--model",
        str(trained),
        "--train",
        EMOJI,
        "--test",
        EMOJI.replace("train", "validation"),
    ]
    arguments += [
        "--codebook",
        str(tmp_path / "coded"),
        "--unordered",
        str(trained),
        "--label_columns",
        "caption",
    ]
    settings = [
        "--num_samples",
        "4",
        "--classifier_epochs",
        "1",
        "--num_inference_steps",
        "2",
        "--limit",
        "40",
    ]
    arguments[5] = arguments[
        3
    ]  # classes of the test pictures must be those of the training pictures
    settings += ["--steps", "1", "2", "--students", str(trained)]
    main([*arguments, *settings, "--output_dir", str(tmp_path / "results")])
    facts = json.loads((tmp_path / "results/results.json").read_text())
    assert len(facts["curve"]) == 7 and facts["curve"] == facts["unordered_curve"]
    assert {row["codec"] for row in facts["rows"]} >= {
        "style",
        "PCA",
        "style, 8 codes",
        "JPEG scan",
    }
    assert [row["steps"] for row in facts["steps"]] == [1, 2, 32]
    for name in (
        "results.md",
        "order.png",
        "steps.png",
        "codebook.png",
        "prefixes.png",
        "reconstructions.png",
        "drawn.png",
    ):
        assert (tmp_path / "results" / name).stat().st_size > 100


def test_a_codec_is_reused_for_a_new_flow(trained, tmp_path):
    options = [*SMALL[len(CODEC) :], "stage=flow", f"codec_from={trained}", "num_samples=0"]
    train(["--preset", "style-tiny", "--output_dir", str(tmp_path / "flow"), *options])
    weights = [
        TokComModel.from_pretrained(path).codec.to_tokens.weight
        for path in (trained, tmp_path / "flow")
    ]
    assert torch.equal(*weights)


def test_folders_name_the_classes_of_the_pictures_in_them(tmp_path):
    for name, color in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (20, 20), color).save(tmp_path / "data" / name / f"{i}.png")
    config = TrainConfig(
        output_dir=str(tmp_path / "out"), data=DataConfig(train=str(tmp_path / "data"))
    )
    config.data.validation_fraction = 0.25
    corpus = read_data(config)
    train, captions = corpus.train, corpus.train.captions["input_ids"]
    words = [corpus.tokenizer.decode(row[row < len(corpus.tokenizer)]) for row in captions]
    assert set(words) == {"red", "blue"} and len(train) == 6 and len(corpus.validation) == 2
    train.fit(TokComStyleCodecConfig(**CODEC))
    colors = {"red": [1, -1, -1], "blue": [-1, -1, 1]}
    assert all(train[i]["pixel_values"][:, 0, 0].tolist() == colors[words[i]] for i in range(6))


def test_text_for_a_model_of_images_and_the_reverse_are_refused(tmp_path):
    text = f"data.train={ROOT / 'sample_data/stories_validation.jsonl'}"
    with pytest.raises(SystemExit, match="reads pictures"):
        train(["--preset", "style-tiny", "--output_dir", str(tmp_path / "a"), text, *SMALL])
    with pytest.raises(SystemExit, match="data are pictures"):
        train(
            [
                "--preset",
                "debug",
                "--output_dir",
                str(tmp_path / "b"),
                f"data.train={EMOJI}",
                "codec.max_steps=1",
            ]
        )


def test_training_on_pictures_that_was_stopped_ends_with_the_same_weights(
    tmp_path, monkeypatch, capsys
):
    options = [option for option in SMALL if "max_steps" not in option]
    options += ["stage=codec", "num_samples=0", "codec.max_steps=4", "codec.warmup_steps=1"]
    ask = Trainer._stop_if_told

    def stop_at_two(self):
        self.signals.number = signal.SIGTERM if self.progress.step == 2 else 0
        ask(self)

    weights = []
    for name, runs in (("once", 1), ("twice", 2)):
        for run in range(runs):
            monkeypatch.setattr(Trainer, "_stop_if_told", stop_at_two if run < runs - 1 else ask)
            train(["--preset", "style-tiny", "--output_dir", str(tmp_path / name), *options])
        weights.append(TokComModel.from_pretrained(tmp_path / name).codec.state_dict())
    assert "stopped by SIGTERM after codec step 2" in capsys.readouterr().out
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


# ---- measures ----


def test_psnr_and_ssim_are_those_of_their_definitions():
    image = pictures(1)
    assert psnr(image, image) == 100 and ssim(image, image).item() == pytest.approx(1)
    assert psnr(image, image + 0.2).item() == pytest.approx(20, abs=1e-3)
    assert ssim(image, pictures(2)[1:]).item() < 0.2


def test_pca_is_exact_with_all_components_and_best_in_order():
    images = pictures(6)
    pca = PCA(images)
    torch.testing.assert_close(pca.reconstruct(images, 6), images, atol=1e-4, rtol=1e-4)
    errors = [(pca.reconstruct(images, k) - images).square().sum() for k in range(6)]
    assert all(a > b for a, b in zip(errors, errors[1:]))


def test_the_scan_of_a_jpeg_is_less_than_its_file():
    image = Image.new("RGB", (32, 32), "white")
    assert jpeg(image, 1, 50)[1] < 60
    noisy = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    assert jpeg(noisy, 1, 90)[1] > 10 * jpeg(noisy, 4, 10)[1] > 0


def test_frechet_distance_of_gaussians_is_that_of_their_means_and_covariances():
    torch.manual_seed(0)
    one, other = torch.randn(20000, 3), 2 * torch.randn(20000, 3) + torch.tensor([1.0, 0, 0])
    assert frechet(one, one) == pytest.approx(0, abs=1e-6)
    assert frechet(one, other) == pytest.approx(1 + 3 * (1 + 4 - 2 * 2), rel=0.05)


def test_order_is_the_share_of_the_gain():
    facts = order_facts([10.0, 18.0, 17.5, 20.0], 1)
    assert facts["share_of_gain"] == pytest.approx(0.8) and facts["largest_fall"] == pytest.approx(
        0.5
    )


def test_every_style_preset_is_listed():
    assert {name for name in preset_names() if name.startswith("style-")} >= {
        "style-tiny",
        "style-768-128",
    }
