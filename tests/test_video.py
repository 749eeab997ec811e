"""Models of clips: codec, masks, schedules, pipeline and external autoencoders."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLWan, DDIMScheduler
from helpers import STOCK_SCHEDULERS, seeded
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from tiny_videos import FLOW, QUANTIZED, clips, films, model, pipeline

from tokcom.codec_video_tokcom import _device_of, decode_clips, encode_clips
from tokcom.pipeline_media_tokcom import TokComVideoPipeline
from tokcom.sampling_tokcom import TokComBlockSampler, TokComSampling
from tokcom.scheduling_tokcom import (
    TokComFlowMatchScheduler,
    diffusion_times,
    draw_known,
    generation_order,
)
from tokcom.tasks_tokcom import TokComTask
from tokcom.train_accelerate import main as train
from tokcom.training.presets import preset_config

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


def test_a_size_that_patches_do_not_fill_is_refused():
    pipe = pipeline()
    latents = pipe.encode(clips(1, frames=2)).latents
    with pytest.raises(ValueError, match="multiples of"):
        pipe.decode(latents, height=17, width=24)


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
    pipe.model.config.sampling_guidance_scale = 3.0
    assert torch.equal(pipe("a red ball", known, **options).latents, guided)
    assert torch.equal(pipe(None, known, guidance_scale=1.0, **options).latents, none)
    pipe(num_inference_steps=1)  # from nothing, which nothing guides


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
    with pytest.raises(ValueError, match=r"`batch_size` \(3\) does not fit 2 clips"):
        pipe(frames=clips(2, frames=1), batch_size=3)
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
