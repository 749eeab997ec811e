"""Clips as patches of space and time: codec, attention, schedules, pipeline, data, training, distillation."""

import io
import json
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLWan, DDIMScheduler
from helpers import ROOT, STOCK_SCHEDULERS, seeded
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors.torch import load_file

from tokcom.cli.main import call
from tokcom.codec_video_tokcom import _device_of, decode_clips, encode_clips
from tokcom.configuration_tokcom import TokComVideoCodecConfig
from tokcom.context_tokcom import TokComTask
from tokcom.evaluation.memory import activations, operations, resized, run_step, saved_bytes
from tokcom.evaluation.videos import main as measure_videos
from tokcom.inference import main as infer
from tokcom.modeling_tokcom import TokComModel
from tokcom.pictures_tokcom import Frames
from tokcom.pipeline_media_tokcom import TokComVideoPipeline
from tokcom.pipeline_tokcom import TokComPipeline
from tokcom.processing_tokcom import vocabulary_size
from tokcom.quantization_tokcom import code_statistics
from tokcom.sampling_tokcom import TokComBlockSampler, TokComSampling
from tokcom.scheduling_tokcom import TokComFlowMatchScheduler, diffusion_times
from tokcom.train_accelerate import main as train
from tokcom.training.config import DataConfig
from tokcom.training.data import load_documents, train_tokenizer
from tokcom.training.denoiser import ModelDenoiser
from tokcom.training.films import write_film
from tokcom.training.images import ImageDataset
from tokcom.training.presets import preset_config
from tokcom.transformer_tokcom import draw_known, generation_order

CODEC = dict(num_frames=4, height=16, width=24, patch_size=8)
FLOW = dict(
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
)
QUANTIZED = dict(
    hidden_size=32, intermediate_size=32, latent_channels=8, quantizer="vq", num_codes=16
)


def model(codec=None, transformer=None, vocab_size=None, **overrides) -> TokComModel:
    torch.manual_seed(0)
    parts = dict(
        codec_config={**CODEC, **(codec or {})}, transformer_config={**FLOW, **(transformer or {})}
    )
    net = TokComModel(preset_config("video-tiny", vocab_size, **parts, **overrides)).eval()
    for name, parameter in net.transformer.named_parameters():
        if (
            "modulation" in name
        ):  # a block at initialisation is the identity, which would hide mistakes
            torch.nn.init.normal_(parameter, std=0.3)
    return net


def pipeline(*args, captions: bool = False, **kwargs) -> TokComVideoPipeline:
    tokenizer = train_tokenizer(["a red ball", "a blue cat"], 300) if captions else None
    net = model(*args, vocab_size=vocabulary_size(tokenizer) if captions else None, **kwargs)
    pipe = TokComVideoPipeline(
        net, TokComFlowMatchScheduler.from_model_config(net.config), tokenizer
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def clips(count=2, frames=4, height=16, width=24, channels=3) -> torch.Tensor:
    return torch.rand(count, channels, frames, height, width, generator=seeded(3)) * 2 - 1


# ---- the codec ----


@pytest.mark.parametrize("frames,height,width", [(4, 16, 24), (1, 8, 8), (7, 40, 16)])
@pytest.mark.parametrize("time", [1, 2])
def test_patches_hold_a_clip_of_any_size_exactly_and_say_where_they_stand(
    frames, height, width, time
):
    codec = model(codec=dict(frames_per_patch=time)).codec
    frames *= time
    clip = clips(2, frames, height, width)
    encoded = codec.encode(clip)
    assert encoded.latents.shape == (2, frames // time * height // 8 * width // 8, 192 * time)
    back = codec.decode(encoded.latents, height, width).pixel_values
    torch.testing.assert_close(back, clip, atol=1e-6, rtol=0)
    f, y, x = encoded.position_ids[0, -1].tolist()
    assert (f, y, x) == (frames // time - 1, height // 8 - 1, width // 8 - 1)
    patch = clip[0, :, f * time : (f + 1) * time, y * 8 : y * 8 + 8, x * 8 : x * 8 + 8]
    torch.testing.assert_close(encoded.latents[0, -1], patch.flatten())


def test_positions_of_a_clip_of_the_trained_size_are_those_of_its_index():
    codec = model().codec
    torch.testing.assert_close(codec.positions(torch.arange(24)), codec.grid(4, 16, 24))


@pytest.mark.parametrize(
    "shape", [(2, 3, 4, 16, 20), (2, 3, 4, 12, 24), (2, 4, 4, 16, 24), (2, 3, 16, 24)]
)
def test_clips_that_patches_do_not_divide_are_refused(shape):
    with pytest.raises(ValueError, match="patch_size|shape"):
        model().encode(pixel_values=torch.zeros(shape))


@pytest.mark.parametrize(
    "overrides,named",
    [
        ({"codec": {"width": 20}}, "patch_size"),
        ({"codec": {"latent_channels": 8}}, "hidden_size"),
        ({"codec": {"quantizer": "vq"}}, "hidden_size"),
        ({"codec": {"num_frames": 0}}, "num_frames"),
        ({"transformer": {"block_size": 4}}, "multiple of the 6 latents"),
        ({"transformer": {"max_position_embeddings": 23}}, "max_position_embeddings"),
        ({"transformer": {"attention_type": "windowed"}}, "windowed"),
        ({"transformer": {"attention_type": "factorized", "block_size": 6}}, "block_size=None"),
        ({"transformer": {"attention_type": "factorized"}, "vocab_size": 30}, "captions"),
        ({"quantize_prediction": True}, "quantize_prediction"),
        ({"timestep_sampling": "sqrt"}, "sqrt"),
        ({"timestep_sampling": "cosine", "noise_std": 0.5}, "noise_std"),
    ],
)
def test_impossible_configurations_are_named(overrides, named):
    with pytest.raises((StrictDataclassError, ValueError), match=named):
        model(**overrides)


def test_factorized_attention_is_refused_for_texts():
    with pytest.raises(StrictDataclassError, match="factorized"):
        flow = {"attention_type": "factorized", "block_size": None, "num_position_axes": 3}
        preset_config("debug", transformer_config=flow)


@pytest.mark.parametrize("kind", ["vq", "fsq"])
def test_codes_become_latents_and_codes_again(kind):
    levels = [8, 7] * 4 if kind == "fsq" else None
    codec = model(codec={**QUANTIZED, "quantizer": kind, "fsq_levels": levels}).codec
    with torch.no_grad():
        codec.encoder[-1].weight.mul_(20)  # to the ends of FSQ's levels
    codec.set_latent_statistics(torch.full((8,), 0.3), torch.full((8,), 2.0))
    encoded = codec.encode(clips())
    torch.testing.assert_close(codec.from_codes(encoded.codes), encoded.latents)
    assert torch.equal(codec.to_codes(encoded.latents), encoded.codes)
    torch.testing.assert_close(codec.snap(encoded.latents), encoded.latents)


def test_quantized_predictions_are_codes_whose_gradient_is_that_of_the_prediction():
    net = model(codec=QUANTIZED, quantize_prediction=True)
    x = torch.randn(2, 24, 8, requires_grad=True)
    snapped = net.quantize(x)
    snapped.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x))
    torch.testing.assert_close(snapped, net.codec.from_codes(net.codec.to_codes(x)))
    estimate = net.denoise(x.detach(), 0.5).latents
    torch.testing.assert_close(estimate, net.codec.snap(estimate))
    pipe = TokComVideoPipeline(net, TokComFlowMatchScheduler.from_model_config(net.config))
    pipe.set_progress_bar_config(disable=True)
    made = pipe(num_inference_steps=2, output_type="latent", generator=seeded()).latents
    torch.testing.assert_close(made, net.codec.snap(made), atol=1e-5, rtol=1e-5)


def test_the_codec_learns_clips_and_uses_its_codebook():
    net = model(codec=QUANTIZED)
    net.set_stage("codec")
    net.train()
    optimizer = torch.optim.Adam(net.codec.parameters(), 3e-3)
    flat = (
        torch.rand(64, 3, 4, 2, 3, generator=seeded())
        .repeat_interleave(8, 3)
        .repeat_interleave(8, 4)
        * 2
        - 1
    )
    losses = []
    for _ in range(60):
        output = net(pixel_values=flat[torch.randperm(64)[:16]])
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.mse_loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert not any("codebook" in name for name, _ in net.codec.named_parameters())
    used = net.eval().encode(pixel_values=flat).codes.unique().numel()
    assert used >= 0.75 * 16


# ---- what may see what ----


@pytest.mark.parametrize("attention", ["full", "factorized"])
def test_frame_0_influences_other_frames_and_order_matters(attention):
    net = model(transformer=dict(attention_type=attention, num_hidden_layers=4))
    positions = net.codec.grid(4, 16, 24)[None]
    x = torch.randn(1, 24, 192, generator=seeded())
    with torch.no_grad():
        plain = net.denoise(x, 0.5, positions).latents
        changed = x.clone()
        changed[:, 0] += 1
        moved = (net.denoise(changed, 0.5, positions).latents - plain).abs().amax(-1)[0].view(4, 6)
        assert (moved[1:].amax(1) > 1e-5).all() and (moved[0] > 1e-5).all()
        for order in (
            torch.arange(24).view(4, 6).flip(0).flatten(),
            torch.arange(24).view(4, 6).flip(1).flatten(),
        ):
            permuted = net.denoise(x[:, order], 0.5, positions).latents
            assert (permuted - plain[:, order]).abs().max() > 1e-4


def test_factorized_attention_is_attention_within_a_moment_and_then_along_time():
    net = model(transformer=dict(attention_type="factorized"))
    x, positions = (
        torch.randn(2, 24, 192, generator=seeded()),
        net.codec.grid(4, 16, 24).expand(2, -1, -1),
    )
    moment, place = positions[0, :, 0], positions[0, :, 1] * 3 + positions[0, :, 2]
    masks = [(a[:, None] == a).expand(2, -1, -1) for a in (moment, place)]
    with torch.no_grad():
        found = net.transformer(x, torch.full((2, 24), 0.5), positions).latents
        net.transformer.config.attention_type = "full"
        hidden = net.transformer.proj_in(x)
        conditioning = torch.nn.functional.silu(
            net.transformer.time_embedding(torch.full((2, 24), 0.5))
        )
        from tokcom.layers_tokcom import rotary_embedding

        tables = rotary_embedding(positions, 24, net.config.transformer_config.rope_theta)
        for layer, mask in zip(net.transformer.layers, masks):
            hidden = layer(hidden, conditioning, tables, mask[:, None])
        torch.testing.assert_close(
            found, net.transformer.proj_out(net.transformer.norm(hidden)), atol=1e-5, rtol=1e-4
        )


def test_known_parts_and_blocks_are_whole_moments():
    valid = torch.ones(200, 24, dtype=torch.bool)
    known = draw_known(valid, 0.3, group_size=6).view(200, 4, 6)
    assert (known.all(2) == known.any(2)).all() and not known.all(2).all(1).any()
    assert {int(n) for n in known.any(2).sum(1)} == {0, 1, 2, 3}
    order = generation_order(valid, 6, 0.3, group_size=6).view(200, 4, 6)
    assert (order.amin(2) == order.amax(2)).all()
    assert (order[0, :, 0] == torch.arange(4)).all() or len(order[:, :, 0].unique()) > 4


# ---- schedules and samplers ----


def analytic(net, mean=1.5, std=0.5):
    """Replace what a model predicts by E[x1 | x_t] of N(mean, std^2)."""

    def predict(x, time, *args, **kwargs):
        t = torch.as_tensor(time)[..., None].expand(x.shape)
        latents = mean + t * std**2 / (t**2 * std**2 + (1 - t) ** 2) * (x - t * mean)
        return type("Output", (), {"latents": latents})()

    net.predict = predict


@pytest.mark.parametrize(
    "schedule", ["uniform", "logit_normal", "linear", "cosine", *STOCK_SCHEDULERS]
)
def test_every_sampler_recovers_a_gaussian_in_fifty_steps(schedule):
    named = isinstance(schedule, str)
    net = model(timestep_sampling=schedule if named else "uniform")
    scheduler = TokComFlowMatchScheduler.from_model_config(net.config)
    scheduler = scheduler if named else schedule.from_config(scheduler.config)
    assert isinstance(scheduler, DDIMScheduler) == (schedule in ("linear", "cosine"))
    analytic(net)
    sampler = TokComBlockSampler(net, scheduler, TokComSampling(50))
    noise = torch.randn(64, 24, 192, generator=seeded())
    drawn = torch.cat([x for x, _ in sampler.blocks(TokComTask(noise))])
    assert abs(drawn.mean().item() - 1.5) < 0.02 and abs(drawn.std().item() - 0.5) < 0.03


def test_a_diffusion_that_predicts_noise_is_refused():
    scheduler = DDIMScheduler(prediction_type="epsilon")
    with pytest.raises(ValueError, match="epsilon.*'sample'"):
        TokComBlockSampler(model(), scheduler, TokComSampling(4))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_training_times_are_those_of_the_diffusion(schedule):
    betas = {"linear": "linear", "cosine": "squaredcos_cap_v2"}[schedule]
    remains = DDIMScheduler(beta_schedule=betas).alphas_cumprod.double()
    shares = (torch.arange(1000, dtype=torch.double) + 1) / 1000
    wanted = remains.sqrt() / (remains.sqrt() + (1 - remains).sqrt())
    torch.testing.assert_close(diffusion_times(shares, schedule), wanted, atol=2e-3, rtol=0)


# ---- the pipeline ----


@pytest.mark.parametrize("block_size", [None, 6])
def test_given_frames_stay_and_the_others_depend_on_them(block_size):
    pipe = pipeline(transformer=dict(block_size=block_size))
    known = clips(2, frames=2)
    one, other = (
        pipe(frames=given, num_inference_steps=2, generator=seeded(), output_type="pt").videos
        for given in (known, -known)
    )
    assert one.shape == (2, 3, 4, 16, 24)
    torch.testing.assert_close(one[:, :, :2], known, atol=1e-6, rtol=0)
    assert (one[:, :, 2:] - other[:, :, 2:]).abs().max() > 1e-4


def test_a_cache_changes_nothing_and_a_clip_may_be_longer_than_the_window():
    pipe = pipeline(transformer=dict(block_size=6))
    pipe.model.config.transformer_config.max_position_embeddings = 24
    known = clips(1, frames=2)
    frames = pipe(
        frames=known, num_inference_steps=3, generator=seeded(), output_type="latent"
    ).latents
    net, codec = pipe.model, pipe.model.codec
    noise = pipe.prepare_latents(1, 12, seeded())
    done = codec.encode(known).latents
    pipe.scheduler.set_timesteps(3)
    sigmas = pipe.scheduler.sigmas.tolist()
    with torch.no_grad():
        for block in range(2):  # the same without a cache
            x = noise[:, 6 * block : 6 * block + 6]
            count = done.shape[1]
            order = torch.arange(count + 6) // 6
            sees = (order[None] <= order[:, None])[None]
            for now, then in zip(sigmas, sigmas[1:]):
                times = torch.cat((torch.ones(1, count), torch.full((1, 6), 1 - now)), dim=1)
                places = codec.positions(torch.arange(count + 6))[None]
                estimate = net.denoise(torch.cat((done, x), dim=1), times, places, sees).latents[
                    :, -6:
                ]
                x = x + (then - now) * (x - estimate) / now
            done = torch.cat((done, x), dim=1)
    torch.testing.assert_close(frames, done, atol=1e-4, rtol=1e-3)
    long = pipe(num_frames=11, num_inference_steps=1, generator=seeded()).videos
    assert len(long[0]) == 11 and long[0][0].size == (24, 16)


def test_captions_and_frames_guide_together():
    pipe = pipeline(captions=True)
    torch.nn.init.normal_(pipe.model.condition_embedding.weight)
    options = dict(
        num_inference_steps=2,
        output_type="latent",
        latents=torch.randn(1, 18, 192, generator=seeded()),
    )
    known = clips(1, frames=1)
    red, blue, none, guided = (
        pipe(prompt, known, guidance_scale=g, **options).latents
        for prompt, g in (
            ("a red ball", 1.0),
            ("a blue cat", 1.0),
            (None, 1.0),
            ("a red ball", 3.0),
        )
    )
    assert (
        min((red - blue).abs().max(), (red - none).abs().max(), (red - guided).abs().max()) > 1e-4
    )
    assert len(pipe(["a red ball", "a blue cat"], num_inference_steps=1).videos) == 2


def test_bidirectional_models_make_other_sizes_and_everything_else_is_refused():
    pipe = pipeline(transformer=dict(max_position_embeddings=64))
    made = pipe(num_frames=6, height=24, width=16, num_inference_steps=1, output_type="pt").videos
    assert made.shape == (1, 3, 6, 24, 16)
    with pytest.raises(ValueError, match="maximum of 64"):
        pipe(num_frames=6, height=32, width=32)
    with pytest.raises(ValueError, match="nothing is left"):
        pipe(frames=clips(1), num_inference_steps=1)
    with pytest.raises(ValueError, match="patch_size"):
        pipe(height=20, width=16)
    with pytest.raises(ValueError, match="guidance_scale"):
        pipe(guidance_scale=2.0)
    with pytest.raises(ValueError, match="one length"):
        pipe(frames=[])
    with pytest.raises(ValueError, match="size it was trained with"):
        pipeline(transformer=dict(block_size=6))(height=24, width=16)


def test_clips_are_encoded_decoded_and_saved_with_their_pipeline(tmp_path):
    pipe = pipeline(codec=QUANTIZED)
    shown = [Image.new("RGB", (24, 16), (60 * i, 0, 0)) for i in range(4)]
    encoded = pipe.encode(shown)
    assert encoded.codes.shape == (1, 24, 1)
    one, other = (pipe.decode(x, "pt").videos for x in (encoded.latents, encoded.codes))
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(pipe.reconstruct(shown, "pt").videos, one)
    pipe.save_pretrained(tmp_path)
    loaded = TokComVideoPipeline.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.decode(encoded.codes, "pt").videos, one)
    assert "image-to-video" in (tmp_path / "README.md").read_text()


# ---- external autoencoders ----


def test_an_autoencoder_reads_where_offloading_computes():
    vae = autoencoder("pictures")
    vae._hf_hook = SimpleNamespace(execution_device="meta")
    assert _device_of(vae).type == "meta"
    del vae._hf_hook
    assert encode_clips(vae, clips(1)).device.type == "cpu"


def autoencoder(kind: str):
    torch.manual_seed(0)
    if kind == "pictures":
        blocks = dict(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2
        )
        return AutoencoderKL(
            **blocks, block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4
        ).eval()
    return AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[True, False]
    ).eval()


@pytest.mark.parametrize("kind,spatial,temporal", [("pictures", 2, 1), ("clips", 4, 2)])
def test_a_model_learns_the_latents_of_an_external_autoencoder_and_shows_pixels(
    kind, spatial, temporal, tmp_path
):
    vae = autoencoder(kind)
    vae.save_pretrained(tmp_path / "vae")
    pixels = clips(1, frames=1 + 2 * temporal, height=32, width=32)
    latents = encode_clips(vae, pixels)
    assert latents.shape == (1, 4, 3, 32 // spatial, 32 // spatial)
    assert decode_clips(vae, latents).shape == pixels.shape
    size = 32 // spatial
    shape = dict(num_channels=4, num_frames=3, height=size, width=size, patch_size=size // 2)
    shape |= dict(spatial_compression=spatial, temporal_compression=temporal)
    overrides = [f"model.codec_config.{name}={value}" for name, value in shape.items()]
    overrides += [f"model.transformer_config.{name}={value}" for name, value in FLOW.items()]
    overrides += [
        "flow.max_steps=1",
        "flow.batch_size=2",
        "flow.eval_batches=1",
        "report_to=none",
        "num_samples=1",
    ]
    overrides += [
        f"data.train={films(tmp_path / 'films')}",
        "data.validation_fraction=0.3",
        "data.caption_column=none",
    ]
    train(
        [
            "--preset",
            "video-tiny",
            *overrides,
            f"autoencoder={tmp_path / 'vae'}",
            f"output_dir={tmp_path / 'out'}",
        ]
    )
    pipe = TokComVideoPipeline.from_pretrained(tmp_path / "out")
    assert type(pipe.vae) is type(vae) and float(pipe.model.codec.latent_std.min()) > 0
    pipe.set_progress_bar_config(disable=True)
    made = pipe(
        frames=[[Image.new("RGB", (32, 32))]], num_inference_steps=1, output_type="pt"
    ).videos
    assert made.shape == pixels.shape
    with pytest.raises(SystemExit, match="shape.*codec reads"):
        train(
            [
                "--preset",
                "video-tiny",
                *overrides,
                f"autoencoder={tmp_path / 'vae'}",
                "model.codec_config.num_channels=8",
            ]
            + [f"output_dir={tmp_path / 'other'}"]
        )
    with pytest.raises(SystemExit, match="give its directory as `autoencoder`"):
        train(["--preset", "video-tiny", *overrides, f"output_dir={tmp_path / 'none'}"])


# ---- data ----


def moving(count: int = 6) -> list[Image.Image]:
    frames = []
    for i in range(count):
        pixels = np.zeros((32, 32, 3), np.uint8)
        pixels[8:24, 3 * i : 3 * i + 8] = (250, 30 * i, 40)
        frames.append(Image.fromarray(pixels))
    return frames


def films(folder, count: int = 6):
    folder.mkdir()
    for i in range(count):
        write_film(moving(), folder / f"{i}.gif")
    return folder


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".mp4"])
def test_films_are_written_and_read_again(suffix, tmp_path):
    write_film(moving(), tmp_path / f"film{suffix}", fps=8)
    read = Frames(str(tmp_path / f"film{suffix}"))
    assert len(read) == 6
    for i, frame in enumerate(read.clip(0, 6)):
        error = np.asarray(frame.convert("RGB"), float) - np.asarray(moving()[i], float)
        assert np.abs(error).mean() < 12, f"frame {i}"
    as_bytes = Frames((tmp_path / f"film{suffix}").read_bytes())
    assert len(as_bytes) == 6 and as_bytes.clip(5, 3)[2].size == (32, 32)


def test_films_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x20ftypisom" + bytes(100))
    with pytest.raises(ValueError, match="record 3 holds no film"):
        Frames(str(tmp_path / "a.mp4"), "record 3")
    with pytest.raises(ValueError, match="record 4 has no frames"):
        Frames([], "record 4")
    with pytest.raises(ValueError, match=r"\.xyz.*\.gif"):
        write_film(moving(), tmp_path / "a.xyz")


@pytest.mark.parametrize("kind", ["mp4", "gif", "folders", "parquet"])
def test_clips_come_from_folders_of_films_of_frames_and_from_parquet(kind, tmp_path):
    source, config = tmp_path / "data", DataConfig(train="x")
    for label in ("left", "right"):
        for i in range(2):
            place = source / label / str(i)
            place.mkdir(parents=True)
            if kind == "folders":
                for j, frame in enumerate(moving()):
                    frame.save(place / f"{j:03}.png")
            elif kind != "parquet":
                write_film(moving(), place.parent / f"{i}.{kind}")
    if kind == "parquet":
        buffer = io.BytesIO()
        moving()[0].save(buffer, "WEBP", save_all=True, append_images=moving()[1:], lossless=True)
        rows = {"image": [buffer.getvalue()] * 4, "caption": ["left", "left", "right", "right"]}
        source = tmp_path / "data.parquet"
        datasets.Dataset.from_dict(rows).to_parquet(source)
    config.frame_folders = kind == "folders"
    records = load_documents(str(source), config, "train")
    assert len(records) == 4 and set(records["caption"]) == {"left", "right"}
    dataset = ImageDataset(records, "image", "caption", None, 0, True).fit(
        TokComVideoCodecConfig(num_frames=4)
    )
    dataset.set_epoch(0)
    item = dataset[0]["pixel_values"]
    assert item.shape == (3, 4, 32, 32) and torch.equal(item, dataset[0]["pixel_values"])
    starts = set()
    for epoch in range(20):
        dataset.set_epoch(epoch)
        clip = dataset[0]["pixel_values"]
        place = (clip[0] > 0).float().sum(1).argmax(-1)  # the left edge of what moves
        assert (place.diff() == 3).all()
        starts.add(int(place[0]))
    assert starts == {0, 3, 6}


# ---- training, distillation, evaluation ----

TINY = [f"model.transformer_config.{name}={value}" for name, value in FLOW.items()]
TINY += ["report_to=tensorboard", "num_samples=1", "codec.batch_size=4", "flow.batch_size=4"]
for stage in ("codec", "flow"):
    TINY += [
        f"{stage}.{name}={value}"
        for name, value in (("max_steps", 2), ("eval_batches", 1), ("warmup_steps", 1))
    ]


@pytest.mark.parametrize("kind", ["captions", "blocks", "quantized"])
def test_one_command_trains_a_model_of_the_shipped_clips_and_its_student(kind, tmp_path):
    overrides = list(TINY)
    if kind == "blocks":
        overrides += ["model.transformer_config.block_size=16", "data.caption_column=none"]
    if kind == "quantized":
        overrides += [f"model.codec_config.{name}={value}" for name, value in QUANTIZED.items()]
        overrides += ["model.quantize_prediction=true", "model.timestep_sampling=linear"]
    output = tmp_path / "out"
    train(["--preset", "video-tiny", *overrides, f"output_dir={output}"])
    pipe = TokComVideoPipeline.from_pretrained(output)
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe(num_inference_steps=2, generator=seeded()).videos[0]) == 8
    assert (output / "run/flow/samples-2.png").is_file()
    stages = {"codec", "flow"} if kind == "quantized" else {"flow"}
    assert {p.parent.name for p in output.glob("run/*/summary.json")} == stages
    facts = json.loads((output / "run/flow/summary.json").read_text())
    assert facts["tokens"] == 2 * 4 * 128
    data = [f"data.train={ROOT / 'sample_data/clips_train.parquet'}"]
    data += ["data.caption_column=none"] if kind == "blocks" else []
    small = ["max_steps=1", "batch_size=2", "num_pairs=4", "pair_steps=2", "num_inference_steps=2"]
    small = [f"distill.{option}" for option in small]
    student = [
        "stage=distill",
        f"init_from={output}",
        f"output_dir={tmp_path / 'student'}",
        "report_to=none",
    ]
    train([*student, *small, *data])
    before, after = (
        load_file(tmp_path / name / "model.safetensors") for name in ("out", "student")
    )
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert (
        moved or kind == "quantized"
    )  # whose student and teacher round to the same codes so early
    assert all(name.startswith(("transformer.", "condition_embedding")) for name in moved)
    student = TokComVideoPipeline.from_pretrained(tmp_path / "student")
    assert (
        student.scheduler.config.stochastic_sampling
        and student.model.config.num_inference_steps == 2
    )
    given = Image.new("RGB", (32, 32), (200, 0, 0))
    assert np.array_equal(np.asarray(student(frames=[[given]]).videos[0][0]), np.asarray(given))


def test_the_next_frame_is_measured_beside_copying_it(tmp_path):
    pipeline(codec=dict(num_frames=8, height=32, width=32)).save_pretrained(tmp_path / "model")
    source = str(ROOT / "sample_data/clips_validation.parquet")
    arguments = [
        "--model",
        str(tmp_path / "model"),
        "--data",
        source,
        "--num_samples",
        "3",
        "--steps",
        "1",
        "2",
    ]
    rows = measure_videos(
        [*arguments, "--students", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out")]
    )
    assert [row["system"] for row in rows] == ["copy of the last frame", "model", "model", "model"]
    records = ImageDataset(
        datasets.load_dataset("parquet", data_files=source, split="train"),
        "image",
        "",
        None,
        0,
        False,
    )
    clips = torch.stack(
        [records.fit(TokComVideoCodecConfig())[i]["pixel_values"] for i in range(3)]
    )
    error = (clips[:, :, 0] - clips[:, :, 1]).square().flatten(1).mean(1) / 4
    assert abs(rows[0]["1 known"] - float((-10 * error.log10()).mean())) < 1e-3
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "results.json",
        "results.md",
        "strips.png",
        "clips.gif",
    }
    with pytest.raises(SystemExit, match="use TokComPipeline"):
        measure_videos(
            ["--model", str(ROOT), "--data", source, "--output_dir", str(tmp_path / "out")]
        )


def test_the_codes_of_held_out_clips_are_counted_and_shown(tmp_path):
    pipe = pipeline(codec={**QUANTIZED, "num_frames": 8, "height": 32, "width": 32})
    pipe.save_pretrained(tmp_path / "model")
    source = str(ROOT / "sample_data/clips_validation.parquet")
    options = ["--data", source, "--output_dir", str(tmp_path)]
    facts = call("evaluate", "codebook", "--model", str(tmp_path / "model"), *options)
    assert facts["latents"] == 16 * 128
    level = facts["levels"][0]
    assert (
        level["codes"] == 16
        and 0 < level["usage"] <= 1
        and level["dead_codes"] == round(16 * (1 - level["usage"]))
    )
    assert Image.open(tmp_path / "codes.png").size[0] > 0 and (tmp_path / "usage.png").is_file()
    with pytest.raises(SystemExit, match="no quantiser"):
        call("evaluate", "codebook", "--model", str(ROOT), *options)


def test_the_command_line_animates_a_picture(tmp_path, capsys):
    pipeline(transformer=dict(block_size=6)).save_pretrained(tmp_path / "model")
    Image.new("RGB", (40, 30), (10, 200, 10)).save(tmp_path / "first.png")
    arguments = [
        "--checkpoint",
        str(tmp_path / "model"),
        "--mode",
        "animate",
        "--num_steps",
        "1",
        "--seed",
        "0",
    ]
    infer(
        [
            *arguments,
            "--input_image",
            str(tmp_path / "first.png"),
            "--video_file",
            str(tmp_path / "a.mp4"),
        ]
    )
    infer([*arguments, "--video_file", str(tmp_path / "b.gif"), "--num_frames", "9"])
    assert "4 frames written" in capsys.readouterr().out
    assert len(Frames(str(tmp_path / "a.mp4"))) == 4 and len(Frames(str(tmp_path / "b.gif"))) == 9
    with pytest.raises(SystemExit, match="bad.png. holds no picture"):
        (tmp_path / "bad.png").write_text("no")
        infer(
            [
                *arguments,
                "--input_image",
                str(tmp_path / "bad.png"),
                "--video_file",
                str(tmp_path / "c.gif"),
            ]
        )


def test_memory_of_a_larger_model_is_foretold_by_smaller_ones():
    for attention in ("full", "factorized"):
        config = preset_config("video-tiny", transformer_config={"attention_type": attention})
        config = resized(config, layers=6, frames=6, side=8)
        for checkpointing in (False, True):
            wanted = saved_bytes(config, checkpointing)
            assert abs(activations(config, checkpointing) - wanted) < 0.02 * wanted
    full, factorized = (
        operations(preset_config("video-large", transformer_config={"attention_type": kind}), 10**9)
        for kind in ("full", "factorized")
    )
    assert full > 3 * factorized


@pytest.mark.slow
def test_small_takes_a_training_step_of_its_published_size():
    found = run_step(preset_config("video-small"))
    assert 0 < found["loss"] < 10


@pytest.mark.parametrize(
    "name,millions",
    [("video-small", 22.3), ("video-medium", 164.6), ("video-large", 1257), ("video-dmd", 164.6)],
)
def test_published_presets_have_their_published_size(name, millions):
    with torch.device("meta"):
        net = TokComModel(preset_config(name))
    assert abs(sum(p.numel() for p in net.parameters()) / 1e6 - millions) < 0.02 * millions


def test_a_bidirectional_teacher_is_distilled_at_the_positions_of_its_patches():
    net, seen = model(transformer={"attention_type": "factorized"}), []
    net.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    x = torch.randn(2, 24, 192)
    estimate = ModelDenoiser(net)(x, torch.tensor([0.3, 0.7]), {})
    assert torch.equal(seen[0][1], net.codec.grid(4, 16, 24))
    wanted = net.denoise(
        x, torch.tensor([0.3, 0.7]), net.codec.grid(4, 16, 24).expand(2, -1, -1)
    ).latents
    torch.testing.assert_close(estimate, wanted)


@pytest.mark.parametrize("attention", ["full", "factorized"])
def test_a_guided_teacher_of_clips_leaves_out_what_the_pipeline_leaves_out(attention):
    net = model(transformer={"attention_type": attention})
    latents, x, known = (
        torch.randn(2, 24, 192),
        torch.randn(2, 24, 192),
        torch.zeros(2, 24, dtype=torch.bool),
    )
    known[:, :12] = True
    t, where = torch.tensor([0.3, 0.7]), net.codec.grid(4, 16, 24).expand(2, -1, -1)
    given = {"known": known, "latents": latents}
    plain, double = (ModelDenoiser(net, scale)(x, t, given)[:, 12:] for scale in (1.0, 2.0))
    free = net.denoise(x[:, 12:], t, where[:, 12:]).latents
    torch.testing.assert_close(2 * plain - double, free, atol=1e-4, rtol=1e-4)


def test_codes_are_counted_without_room_for_those_that_never_occur():
    codes = torch.tensor([5**20, 5**20, 3])
    found = code_statistics(codes, 5**24)
    assert found["dead_codes"] == 5**24 - 2 and abs(found["entropy_bits"] - 0.918) < 1e-3


def test_a_text_model_with_the_schedule_of_a_diffusion_trains_and_shows_samples(tmp_path):
    small = [
        f"{stage}.{key}=2"
        for stage in ("codec", "flow")
        for key in ("max_steps", "batch_size", "eval_batches")
    ]
    small += [f"{stage}.sequence_length=32" for stage in ("codec", "flow")]
    options = [
        "--preset",
        "debug",
        f"output_dir={tmp_path}",
        "model.timestep_sampling=linear",
        "num_samples=1",
    ]
    train([*options, *small, "report_to=none"])
    assert TokComPipeline.from_pretrained(tmp_path).scheduler.config.prediction_type == "sample"
