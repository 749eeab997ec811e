"""A converted checkpoint against the published equations of TokCom v5.2."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tokcom.cli.convert import load_published_pipeline
from tokcom.cli.main import call
from tokcom.evaluation.published import PublishedTokCom
from tokcom.inference import main as inference
from tokcom.pipeline_tokcom import TokComPipeline
from tokcom.sampling_tokcom import TokComSampling
from tokcom.tasks_tokcom import TokComTask

D, LAYERS, HEADS, GROUPS, FF, V, K = 32, 2, 4, 2, 48, 51, 4
ARGS = dict(
    hidden_size=D, num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=GROUPS
)
ARGS |= dict(
    intermediate_size=FF, rms_norm_eps=1e-6, rope_theta=1e6, vocab_size=V, omni_token_id=V - 1
)


@pytest.fixture(scope="module")
def published():
    torch.manual_seed(0)
    return PublishedTokCom.random(D, FF, LAYERS, HEADS, GROUPS, V)


@pytest.fixture(scope="module")
def checkpoint(published):
    config = dict(
        dataset_name="wikitext-2-raw-v1",
        tokenizer_path="nowhere/unreachable",
        max_length=64,
        chunk_size=K,
    )
    return {
        **dict(
            epoch=3,
            stage="diffusion",
            val_loss=1.5,
            model_args=ARGS,
            config=config | {"noise_std": 0.05},
        ),
        **dict(vae_model_state_dict=published.vae, denoised_model_state_dict=published.denoiser),
    }


# ---- the converted model ----


@pytest.fixture(scope="module")
def converted(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    torch.save(checkpoint, folder / "best_diffusion.pt")
    with pytest.warns(UserWarning, match="nowhere/unreachable.*--tokenizer"):
        call("convert", str(folder / "best_diffusion.pt"), str(folder / "out"))
    pipe = TokComPipeline.from_pretrained(folder / "out")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def test_converted_model_computes_the_published_numbers(published, converted):
    torch.manual_seed(1)
    ids = torch.randint(0, V - 1, (3, 24))
    latents = published.encode(ids)
    close = dict(atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(converted.model.encode(ids).latents, latents, **close)
    torch.testing.assert_close(
        converted.model.decode(latents).logits, published.decode(latents), **close
    )
    x, t = torch.randn(3, 6, D), torch.rand(3)
    torch.testing.assert_close(
        converted.model.denoise(x, t).latents, published.denoise(x, t), **close
    )


@torch.no_grad()
def test_converted_modes_give_the_published_latents(published, converted):
    torch.manual_seed(2)
    noise = 0.05 * torch.randn(2, 6, D)
    close = dict(atol=1e-3, rtol=1e-3)
    generated = converted.generate(
        6, 2, num_inference_steps=10, latents=noise, output_type="latent"
    ).latents
    torch.testing.assert_close(generated, published.euler(noise, 10), **close)

    context = converted.model.encode(torch.randint(0, V - 1, (2, 8)))
    task = TokComTask(noise, context, 2 + torch.arange(6)[None, :, None].expand(2, -1, -1))
    conditional, _ = converted.sample_latents(task, TokComSampling(10))
    torch.testing.assert_close(
        conditional, published.euler(noise, 10, keep=context.latents), **close
    )

    mixed = 0.5 * noise + 0.5 * context.latents.repeat(1, 3, 1)
    denoised, _ = converted.sample_latents(TokComTask(mixed, sigma_start=0.5), TokComSampling(5))
    torch.testing.assert_close(denoised, published.euler(mixed, 10, start=0.5), **close)


@pytest.fixture(scope="module")
def with_tokenizer(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("with_tokenizer")
    vocabulary = {"<pad>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, V - 1)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(
        folder / "tokenizer"
    )
    config = checkpoint["config"] | {"tokenizer_path": str(folder / "tokenizer")}
    torch.save(checkpoint | {"config": config}, folder / "best_diffusion.pt")
    call("convert", str(folder / "best_diffusion.pt"), str(folder / "out"))
    pipe = TokComPipeline.from_pretrained(folder / "out")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def test_text_modes_of_a_converted_model_are_the_published_ones(published, with_tokenizer):
    pipe, ids = with_tokenizer, torch.tensor([[5, 9, 13, 2, 40, 41, 7]])
    text = " ".join(f"w{i}" for i in ids[0].tolist())
    padded = torch.cat(
        (ids, torch.tensor([[1]])), dim=1
    )  # the published padding is EOS, at the end
    latents = published.encode(padded)
    close = dict(atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(pipe.encode(text).latents, latents, **close)
    assert torch.equal(pipe.reconstruct(text).sequences, published.decode(latents).argmax(-1))

    noise = pipe.prepare_latents(1, 2, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    denoised = pipe.denoise_reconstruct(
        text, 0.5, num_inference_steps=10, generator=generator
    ).latents
    torch.testing.assert_close(
        denoised, published.euler(0.5 * noise + 0.5 * latents, 10, start=0.5), **close
    )

    prompt = " ".join(f"w{i}" for i in ids[0, :4].tolist())
    continued = pipe(
        prompt, gen_length=8, num_inference_steps=10, latents=noise, output_type="latent"
    ).latents
    keep = published.encode(ids[:, :4])
    torch.testing.assert_close(continued, published.euler(noise, 10, keep=keep), **close)


def test_noise_and_configuration_come_from_the_file(converted):
    config = converted.model.config
    assert config.noise_std == 0.05 and config.transformer_config.timestep_scale == 1.0
    assert (
        config.transformer_config.max_position_embeddings == 16
        and config.codec_config.mask_token_id == V - 1
    )
    assert converted.prepare_latents(
        1, 4000, torch.Generator().manual_seed(0)
    ).std().item() == pytest.approx(0.05, rel=0.05)
    assert converted.tokenizer is None


def test_command_line_reads_a_published_file(checkpoint, tmp_path, capsys):
    torch.save(checkpoint, tmp_path / "best.pt")
    with pytest.warns(UserWarning):
        inference(
            [
                "--checkpoint",
                str(tmp_path / "best.pt"),
                "--num_chunks",
                "3",
                "--num_steps",
                "2",
                "--device",
                "cpu",
            ]
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
        call("convert", str(tmp_path / "missing.pt"), str(tmp_path / "out"))


class _Evil:
    def __reduce__(self):
        return print, ("code ran",)


def test_pickled_code_is_refused(tmp_path, capsys):
    torch.save({"model_args": _Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="more than tensors"):
        load_published_pipeline(tmp_path / "evil.pt")
    assert "code ran" not in capsys.readouterr().out
