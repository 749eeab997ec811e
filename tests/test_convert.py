"""The published equations of TokCom v5.2, written down once more, against a converted checkpoint."""

import math

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from convert_tokcom import load_published_pipeline, main
from inference import main as inference
from pipeline_tokcom import TokComPipeline

D, LAYERS, HEADS, GROUPS, FF, V, K = 32, 2, 4, 2, 48, 51, 4
ARGS = dict(hidden_size=D, num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=GROUPS)
ARGS |= dict(intermediate_size=FF, rms_norm_eps=1e-6, rope_theta=1e6, vocab_size=V, omni_token_id=V - 1)


def block_weights(prefix: str, norms: tuple[str, str]) -> dict[str, torch.Tensor]:
    kv = D // HEADS * GROUPS
    shapes = {"self_attn.q_proj": (D, D), "self_attn.k_proj": (kv, D), "self_attn.v_proj": (kv, D)}
    state = {f"{prefix}{n}.bias": torch.randn(s[0]) * 0.1 for n, s in shapes.items()}
    shapes |= {"self_attn.o_proj": (D, D), "mlp.gate_proj": (FF, D), "mlp.up_proj": (FF, D), "mlp.down_proj": (D, FF)}
    state |= {f"{prefix}{n}.weight": torch.randn(s) / s[1] ** 0.5 for n, s in shapes.items()}
    state |= {f"{prefix}{n}.weight": 1 + 0.1 * torch.randn(D) for n in norms}
    return state | {f"{prefix}self_attn.rope.inv_freq": torch.zeros(4)}


@pytest.fixture(scope="module")
def checkpoint():
    torch.manual_seed(0)
    vae = {"embed_tokens.weight": torch.randn(V, D)}
    vae |= {
        "encoder.embed_tokens.weight": vae["embed_tokens.weight"],
        "decoder.lm_head.weight": vae["embed_tokens.weight"],
    }
    for side in ("encoder", "decoder"):
        for i in range(LAYERS):
            vae |= block_weights(f"{side}.layers.{i}.", ("input_layernorm", "post_attention_layernorm"))
        vae[f"{side}.norm.weight"] = 1 + 0.1 * torch.randn(D)
    denoiser = {"norm.weight": 1 + 0.1 * torch.randn(D)}
    linears = {"time_mlp.0": (4 * D, D), "time_mlp.2": (D, 4 * D), "output_proj": (D, D)}
    for i in range(LAYERS):
        denoiser |= block_weights(f"layers.{i}.", ("adaln_attn.norm", "adaln_mlp.norm"))
        linears |= {f"layers.{i}.adaln_{part}.scale_shift_mlp.1": (2 * D, D) for part in ("attn", "mlp")}
    for name, shape in linears.items():
        denoiser[f"{name}.weight"], denoiser[f"{name}.bias"] = (
            torch.randn(shape) / shape[1] ** 0.5,
            torch.randn(shape[0]),
        )
    config = dict(dataset_name="wikitext-2-raw-v1", tokenizer_path="nowhere/unreachable", max_length=64, chunk_size=K)
    return {
        **dict(epoch=3, stage="diffusion", val_loss=1.5, model_args=ARGS, config=config | {"noise_std": 0.05}),
        **dict(vae_model_state_dict=vae, denoised_model_state_dict=denoiser),
    }


# ---- the published equations ----


def rms(x, weight):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


def attention(x, s, p):
    size = D // HEADS
    angles = torch.arange(x.shape[1])[:, None] * 1e6 ** (-torch.arange(0, size, 2) / size)
    angles = torch.cat((angles, angles), -1)

    def rotate(u):
        half = torch.cat((-u[..., size // 2 :], u[..., : size // 2]), -1)
        return u * angles.cos() + half * angles.sin()

    q, k, v = (
        (x @ s[f"{p}{n}_proj.weight"].T + s[f"{p}{n}_proj.bias"]).unflatten(-1, (-1, size)).transpose(1, 2)
        for n in "qkv"
    )
    k, v = (u.repeat_interleave(HEADS // GROUPS, dim=1) for u in (rotate(k), v))
    weights = (rotate(q) @ k.transpose(2, 3) / math.sqrt(size)).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2) @ s[f"{p}o_proj.weight"].T


def mlp(x, s, p):
    gate, up = x @ s[f"{p}gate_proj.weight"].T, x @ s[f"{p}up_proj.weight"].T
    return (F.silu(gate) * up) @ s[f"{p}down_proj.weight"].T


def stack(x, s, side):
    for i in range(LAYERS):
        p = f"{side}.layers.{i}."
        x = x + attention(rms(x, s[f"{p}input_layernorm.weight"]), s, f"{p}self_attn.")
        x = x + mlp(rms(x, s[f"{p}post_attention_layernorm.weight"]), s, f"{p}mlp.")
    return rms(x, s[f"{side}.norm.weight"])


def published_encode(s, ids):
    chunks = ids.view(-1, K)
    return stack(s["embed_tokens.weight"][chunks], s, "encoder")[:, -1].view(len(ids), -1, D)


def published_decode(s, latents):
    flat = latents.reshape(-1, 1, D)
    omni = s["embed_tokens.weight"][ARGS["omni_token_id"]].expand(len(flat), K - 1, D)
    states = stack(torch.cat((flat, omni), 1), s, "decoder")
    return (states @ s["embed_tokens.weight"].T).view(len(latents), -1, V)


def published_denoise(s, x, t):
    angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(D // 2) / (D // 2))
    wave = torch.cat((angles.cos(), angles.sin()), -1)
    hidden = F.silu(wave @ s["time_mlp.0.weight"].T + s["time_mlp.0.bias"])
    cond = F.silu(hidden @ s["time_mlp.2.weight"].T + s["time_mlp.2.bias"])

    def modulated(x, p):
        scale, shift = (cond @ s[f"{p}scale_shift_mlp.1.weight"].T + s[f"{p}scale_shift_mlp.1.bias"]).chunk(2, -1)
        return rms(x, s[f"{p}norm.weight"]) * (1 + scale[:, None]) + shift[:, None]

    for i in range(LAYERS):
        x = x + attention(modulated(x, f"layers.{i}.adaln_attn."), s, f"layers.{i}.self_attn.")
        x = x + mlp(modulated(x, f"layers.{i}.adaln_mlp."), s, f"layers.{i}.mlp.")
    return rms(x, s["norm.weight"]) @ s["output_proj.weight"].T + s["output_proj.bias"]


def published_euler(s, x, steps, t0=0.0, keep=None):
    dt = 1 / steps
    for i in range(round(steps * (1 - t0))):
        t = t0 + i * dt
        full = x if keep is None else torch.cat((keep, x), 1)
        x1 = published_denoise(s, full, torch.full((len(x),), t))[:, -x.shape[1] :]
        x = x + (x1 - x) / (1 - t) * dt
    return x


# ---- the converted model ----


@pytest.fixture(scope="module")
def converted(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    torch.save(checkpoint, folder / "best_diffusion.pt")
    with pytest.warns(UserWarning, match="nowhere/unreachable.*--tokenizer"):
        main([str(folder / "best_diffusion.pt"), str(folder / "out")])
    pipe = TokComPipeline.from_pretrained(folder / "out")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def test_converted_model_computes_the_published_numbers(checkpoint, converted):
    vae, denoiser = checkpoint["vae_model_state_dict"], checkpoint["denoised_model_state_dict"]
    torch.manual_seed(1)
    ids = torch.randint(0, V - 1, (3, 24))
    latents = published_encode(vae, ids)
    close = dict(atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(converted.model.encode(ids).latents, latents, **close)
    torch.testing.assert_close(converted.model.decode(latents).logits, published_decode(vae, latents), **close)
    x, t = torch.randn(3, 6, D), torch.rand(3)
    torch.testing.assert_close(converted.model.denoise(x, t).latents, published_denoise(denoiser, x, t), **close)


@torch.no_grad()
def test_converted_modes_give_the_published_latents(checkpoint, converted):
    denoiser = checkpoint["denoised_model_state_dict"]
    torch.manual_seed(2)
    noise = 0.05 * torch.randn(2, 6, D)
    close = dict(atol=1e-3, rtol=1e-3)
    generated = converted.generate(6, 2, num_inference_steps=10, latents=noise, output_type="latent").latents
    torch.testing.assert_close(generated, published_euler(denoiser, noise, 10), **close)

    context = converted.model.encode(torch.randint(0, V - 1, (2, 8)))
    conditional = converted._sample(
        noise, context, 2 + torch.arange(6)[None, :, None].expand(2, -1, -1), num_inference_steps=10
    )
    torch.testing.assert_close(conditional, published_euler(denoiser, noise, 10, keep=context.latents), **close)

    mixed = 0.5 * noise + 0.5 * context.latents.repeat(1, 3, 1)
    denoised = converted._sample(mixed, num_inference_steps=5, sigma_start=0.5)
    torch.testing.assert_close(denoised, published_euler(denoiser, mixed, 10, t0=0.5), **close)


@pytest.fixture(scope="module")
def with_tokenizer(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("with_tokenizer")
    vocabulary = {"<pad>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, V - 1)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(folder / "tokenizer")
    config = checkpoint["config"] | {"tokenizer_path": str(folder / "tokenizer")}
    torch.save(checkpoint | {"config": config}, folder / "best_diffusion.pt")
    main([str(folder / "best_diffusion.pt"), str(folder / "out")])
    pipe = TokComPipeline.from_pretrained(folder / "out")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def test_text_modes_of_a_converted_model_are_the_published_ones(checkpoint, with_tokenizer):
    vae, denoiser = checkpoint["vae_model_state_dict"], checkpoint["denoised_model_state_dict"]
    pipe, ids = with_tokenizer, torch.tensor([[5, 9, 13, 2, 40, 41, 7]])
    text = " ".join(f"w{i}" for i in ids[0].tolist())
    padded = torch.cat((ids, torch.tensor([[1]])), dim=1)  # the published padding is EOS, at the end
    latents = published_encode(vae, padded)
    close = dict(atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(pipe.encode(text).latents, latents, **close)
    assert torch.equal(pipe.reconstruct(text).sequences, published_decode(vae, latents).argmax(-1))

    noise = 0.05 * torch.randn(1, 2, D, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    denoised = pipe.denoise_reconstruct(text, 0.5, num_inference_steps=10, generator=generator).latents
    torch.testing.assert_close(denoised, published_euler(denoiser, 0.5 * noise + 0.5 * latents, 10, t0=0.5), **close)

    prompt = " ".join(f"w{i}" for i in ids[0, :4].tolist())
    continued = pipe(prompt, gen_length=8, num_inference_steps=10, latents=noise, output_type="latent").latents
    keep = published_encode(vae, ids[:, :4])
    torch.testing.assert_close(continued, published_euler(denoiser, noise, 10, keep=keep), **close)


def test_noise_and_configuration_come_from_the_file(converted):
    config = converted.model.config
    assert config.noise_std == 0.05 and config.transformer_config.timestep_scale == 1.0
    assert config.transformer_config.max_position_embeddings == 16 and config.codec_config.mask_token_id == V - 1
    assert converted.prepare_latents(1, 4000, torch.Generator().manual_seed(0)).std().item() == pytest.approx(
        0.05, rel=0.05
    )
    assert converted.tokenizer is None


def test_command_line_reads_a_published_file(checkpoint, tmp_path, capsys):
    torch.save(checkpoint, tmp_path / "best.pt")
    with pytest.warns(UserWarning):
        inference(
            ["--checkpoint", str(tmp_path / "best.pt"), "--num_chunks", "3", "--num_steps", "2", "--device", "cpu"]
        )
    assert capsys.readouterr().out.startswith("[1] [")


def test_bad_files_are_named(checkpoint, tmp_path):
    path = tmp_path / "x.pt"
    with pytest.raises(FileNotFoundError, match="x.pt"):
        load_published_pipeline(path)
    torch.save(checkpoint, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated"):
        load_published_pipeline(path)
    for garbage in (b"hi", b"\x80\x02garbage" * 50, b""):
        path.write_bytes(garbage)
        with pytest.raises(ValueError, match="cannot be read"):
            load_published_pipeline(path)
    torch.save({"epoch": 1}, path)
    with pytest.raises(ValueError, match="lacks model_args"):
        load_published_pipeline(path)
    wrong = {**checkpoint, "model_args": {**ARGS, "intermediate_size": FF + 8}}
    torch.save(wrong, path)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="do not fit.*size mismatch"):
        load_published_pipeline(path)
    with pytest.raises(SystemExit, match="error: checkpoint"):
        main([str(tmp_path / "missing.pt"), str(tmp_path / "out")])


class _Evil:
    def __reduce__(self):
        return print, ("code ran",)


def test_pickled_code_is_refused(tmp_path, capsys):
    torch.save({"model_args": _Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="more than tensors"):
        load_published_pipeline(tmp_path / "evil.pt")
    assert "code ran" not in capsys.readouterr().out
