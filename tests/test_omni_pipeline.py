"""Several streams: the pipeline, its commands, and sounds."""

import numpy as np
import pytest
import torch
from helpers import ROOT, seeded
from PIL import Image
from tiny_streams import SUBSETS, build_pipe, content, tone, train_words

from tokcom.cli.main import call
from tokcom.codec_composite_tokcom import names_to_make
from tokcom.evaluation.codebook import main as codebook
from tokcom.inference import main as infer
from tokcom.interface_tokcom import most_alike
from tokcom.pipeline_media_tokcom import TokComOmniPipeline
from tokcom.processing_tokcom import (
    TokComAudioProcessor,
    TokComImageProcessor,
    read_sound,
    read_wav,
    write_wav,
)
from tokcom.training.presets import preset_config


@pytest.fixture(scope="module")
def words():
    return train_words()


@pytest.fixture
def pipe(words) -> TokComOmniPipeline:
    return build_pipe(words)


# ---- pipeline ----


@pytest.mark.parametrize("given", SUBSETS[:-1])
def test_any_streams_make_any_others_and_given_ones_come_back_as_they_were(pipe, given):
    others = [name for name in pipe.model.codec.names if name not in given]
    values = {name: content(name) for name in given}
    for size in range(1, len(others) + 1):
        made = others[:size]
        output = pipe(values, made, batch_size=2, num_inference_steps=2, generator=seeded())
        assert set(output.streams) == {*given, *made} and all(
            len(v) == 2 for v in output.streams.values()
        )
        for name in given:
            assert all(a is b for a, b in zip(output.streams[name], values[name]))
            read = pipe.model.codec.contents[name].read(values[name], name, pipe.tokenizer)
            encoded = pipe.model.encode(streams={name: read}).latents
            codec = pipe.model.codec
            assert torch.equal(
                codec.stream_of(output.latents, name), codec.stream_of(encoded, name)
            )
        for name in set(others) - set(made):
            assert not output.latents[:, pipe.model.codec.places[name]].any()
    kinds = {"text": str, "image": Image.Image, "audio": np.ndarray}
    assert all(isinstance(value, kinds[name]) for name in made for value in output.streams[name])


def test_the_pipeline_takes_streams_by_name(pipe):
    output = pipe(
        {"text": "a red cat"}, ["image", "audio"], num_inference_steps=2, generator=seeded()
    )
    assert output.texts == ["a red cat"] and output.images[0].size == (16, 16)
    assert output.audios[0].shape == (15 * 64,) and pipe.sampling_rates == {"audio": 8000}
    again = pipe(
        given={"text": ["a red cat"]},
        generate=["image", "audio"],
        num_inference_steps=2,
        generator=seeded(),
    )
    assert torch.equal(again.latents, output.latents)
    assert len(pipe(num_inference_steps=1).streams) == 3
    seen = []
    pipe(
        {"text": "a cat"},
        "image",
        num_inference_steps=3,
        callback_on_step_end=lambda p, i, t, k: seen.append(i) or k,
    )
    assert seen == [0, 1, 2]


def test_streams_are_made_in_turn_each_for_those_before_it(pipe):
    codec = pipe.model.codec
    noise = torch.randn(2, codec.num_latents, codec.num_channels, generator=seeded())

    def made(names, noise, **options):
        latents = noise[:, codec.index_of(names)]
        options |= dict(num_inference_steps=2, latents=latents, output_type="latent")
        return pipe(generate=names, batch_size=2, **options).latents

    def stream(latents, name):
        return codec.stream_of(latents, name)

    both = made(["image", "audio"], noise)
    # nothing that comes later changes what was made before
    assert torch.equal(stream(both, "image"), stream(made(["image"], noise), "image"))
    # what comes later is made for what came before
    other = noise.clone()
    other[:, codec.places["image"]] *= -1
    assert not torch.equal(stream(both, "audio"), stream(made(["image", "audio"], other), "audio"))
    assert torch.equal(
        stream(made(["audio", "image"], noise), "audio"),
        stream(made(["audio", "image"], other), "audio"),
    )
    # a text is seen as if it had been given, not as it was drawn
    drawn = made(["text", "image"], noise)
    texts = codec.streams["text"]
    ids = texts.to_ids(stream(drawn, "text"))
    again = codec.read_back("text", drawn, None)
    assert torch.equal(stream(again, "text"), texts.encode(ids).latents)
    ended = codec.read_back("text", drawn, int(ids[0, 1]))
    ids[0, 1:] = ids[0, 1]
    assert torch.equal(stream(ended, "text")[0], texts.encode(ids).latents[0])
    assert torch.equal(codec.read_back("image", drawn, None), drawn)
    # a first stream has nothing to move towards
    guided = made(["image", "audio"], noise, guidance_scale=3.0)
    assert torch.equal(stream(guided, "image"), stream(both, "image"))
    assert not torch.equal(stream(guided, "audio"), stream(both, "audio"))
    assert names_to_make(codec, None, [], 1) == ["text", "audio", "image"]


def test_of_candidates_the_text_most_like_the_others_is_kept(pipe):
    assert (
        most_alike([[7, 8, 9], [1, 2], [1, 2, 3]]) == 1
        and most_alike([[4], [], []]) == 1
        and most_alike([[]]) == 0
    )
    settings = dict(generate=["text", "audio"], num_inference_steps=2)
    pictures = content("image")
    codec = pipe.model.codec
    count = len(codec.index_of(settings["generate"], "cpu"))
    latents = torch.randn(6, count, codec.num_channels, generator=seeded())
    every = pipe({"image": [p for p in pictures for _ in range(3)]}, latents=latents, **settings)
    kept = pipe({"image": pictures}, latents=latents, num_candidates=3, **settings)
    ids = codec.streams["text"].to_ids(codec.stream_of(every.latents, "text")).tolist()
    eos = pipe.tokenizer.eos_token_id
    assert len(kept.texts) == len(kept.audios) == 2 and all(
        a is b for a, b in zip(kept.images, pictures)
    )
    for i in range(2):
        rows = [[*row, eos][: [*row, eos].index(eos)] for row in ids[3 * i : 3 * i + 3]]
        assert torch.equal(kept.latents[i], every.latents[3 * i + most_alike(rows)])


def test_streams_follow_what_they_are_made_for_as_closely_as_the_model_says(pipe):
    def made(*arguments, **scale):
        options = {"num_inference_steps": 1, "generator": seeded(), "output_type": "latent"}
        return pipe(*arguments, **options, **scale).latents

    given = {"text": content("text")}
    asked = made(given, "image", guidance_scale=3.0)
    off = made(given, "image", guidance_scale=1.0)
    alone = made(None, "image")
    pipe.model.config.sampling_guidance_scale = 3.0
    assert torch.equal(made(given, "image"), asked) and not torch.equal(asked, off)
    for scale in (1.0, {"text": 1.0}):
        assert torch.equal(made(given, "image", guidance_scale=scale), off)
    # one stream from nothing has nothing to follow
    assert torch.equal(made(None, "image"), alone)


def test_guidance_moves_away_from_the_estimate_without_each_given_stream(pipe):
    values = {"text": content("text"), "audio": content("audio")}

    def made(scale):
        return pipe(
            values,
            "image",
            num_inference_steps=1,
            guidance_scale=scale,
            generator=seeded(),
            output_type="latent",
        ).latents[:, pipe.model.codec.places["image"]]

    alone = {
        name: pipe(
            {name: values[name]} if name else {},
            "image",
            2,
            1,
            generator=seeded(),
            output_type="latent",
        ).latents[:, pipe.model.codec.places["image"]]
        for name in ("text", "audio", None)
    }
    both = made(1.0)
    torch.testing.assert_close(made(3.0), both + 2 * (both - alone[None]), atol=1e-4, rtol=1e-4)
    wanted = both + 1 * (both - alone["audio"]) + 2 * (both - alone["text"])
    torch.testing.assert_close(made({"text": 2.0, "audio": 3.0}), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "arguments,named",
    [
        (dict(given={"text": "a cat"}, generate=["text"]), "generate"),
        (dict(given={"text": "a cat"}, generate=[]), "generate"),
        (dict(given={"smell": "a cat"}), "smell"),
        (dict(given={"text": "a cat"}, generate=["smell"]), "smell"),
        (dict(given={"text": ["a", "b"], "image": [Image.new("RGB", (8, 8))]}), "one number"),
        (dict(given={"text": []}), "one number"),
        (dict(given={"text": "a cat " * 30}), "text_latents"),
        (dict(given={"text": "a cat"}, guidance_scale={"image": 2.0}), "guidance_scale"),
        (dict(generate=["text", "image"], guidance_scale={"image": 2.0}), "guidance_scale"),
        (dict(generate="text", guidance_scale=2.0), "guidance_scale"),
        (dict(generate=["text", "text"]), "twice"),
        (dict(given={"text": "a cat"}, output_type="pil"), "output_type"),
        (dict(given={"audio": np.zeros((2, 3, 4))}), "a sound must be a path"),
        (dict(given={"text": "a cat"}, num_inference_steps=0), "num_inference_steps"),
        (dict(given={"text": "a cat"}, batch_size=2), r"`batch_size` \(2\) does not fit 1 of each"),
        (dict(given={"text": "a cat"}, generate="image", output_type="codes"), "output_type"),
        (dict(given={"text": "a cat"}, generate=["image"], num_candidates=2), "num_candidates"),
        (dict(generate=["text"], num_candidates=0), "num_candidates"),
        (dict(given={"text": "a cat"}, callback_on_step_end_tensor_inputs=["noise"]), "noise"),
    ],
)
def test_bad_arguments_are_named(pipe, arguments, named):
    with pytest.raises(ValueError, match=named):
        pipe(**arguments)


def test_codecs_give_streams_back_without_the_transformer(pipe):
    values = {name: content(name) for name in ("image", "audio", "text")}
    output, look = pipe.reconstruct(values), TokComImageProcessor((16, 16))
    torch.testing.assert_close(
        look(output.images)["pixel_values"], look(values["image"])["pixel_values"]
    )
    assert [len(sound) for sound in output.audios] == [15 * 64] * 2 and list(
        output.streams
    ) == pipe.model.codec.names
    text = pipe.reconstruct({"text": values["text"][0]})
    assert (
        text.texts == output.texts[:1]
        and not text.latents[:, pipe.model.codec.places["image"]].any()
    )
    with pytest.raises(ValueError, match="give some of"):
        pipe.reconstruct({})


def test_a_saved_pipeline_of_several_streams_makes_the_same(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = TokComOmniPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    a, b = (
        p({"text": "a cat"}, "image", num_inference_steps=2, generator=seeded()).latents
        for p in (pipe, again)
    )
    assert torch.equal(a, b)
    assert "any-to-any" in (tmp_path / "README.md").read_text()


def test_the_command_line_makes_streams_for_others(pipe, tmp_path, capsys):
    pipe.save_pretrained(tmp_path / "model")
    content("image")[0].save(tmp_path / "a.png")
    options = [
        "--checkpoint",
        str(tmp_path / "model"),
        "--mode",
        "any_to_any",
        "--num_steps",
        "1",
        "--device",
        "cpu",
    ]
    image, audio = tmp_path / "b.png", tmp_path / "b.wav"
    infer(
        [
            *options,
            "--input_text",
            "a red cat",
            "--image_file",
            str(image),
            "--audio_file",
            str(audio),
        ]
    )
    assert Image.open(image).size == (16, 16) and len(read_wav(audio)[0]) == 15 * 64
    infer(
        [
            *options,
            "--input_audio",
            str(audio),
            "--input_image",
            str(tmp_path / "a.png"),
            "--seed",
            "1",
        ]
    )
    assert "[1]" in capsys.readouterr().out
    infer([*options, "--input_audio", str(audio), "--batch_size", "3"])
    assert "[3]" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="batch_size 3"):
        infer(
            [*options, "--input_audio", str(audio), "--image_file", str(image), "--batch_size", "3"]
        )
    with pytest.raises(SystemExit, match="c.wav"):
        infer([*options, "--input_audio", str(tmp_path / "c.wav")])
    with pytest.raises(SystemExit, match="several|Omni"):
        infer([*options[:2], "--mode", "conditional", "--prompt", "a red", "--device", "cpu"])


def test_scripts_for_texts_name_a_model_of_several_streams(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    text = str(ROOT / "sample_data/held_out.jsonl")
    with pytest.raises(SystemExit, match="several streams"):
        output = ["--output_dir", str(tmp_path / "out")]
        call(
            "evaluate", "--checkpoint", str(tmp_path), "--data", text, "--train_data", text, *output
        )
    with pytest.raises(SystemExit, match="several"):
        codebook(["--data", text, "--model", str(tmp_path)])


# ---- sounds ----


def test_a_tone_keeps_its_pitch_on_the_way_to_log_mel_and_back(pipe):
    config = preset_config("omni-tiny").codec_config.stream_configs()["audio"]
    processor = TokComAudioProcessor(config)
    for pitch in (440.0, 1500.0):
        (sound,) = processor.postprocess(
            processor(tone(pitch, config.num_samples))["input_features"]
        )
        spectrum = np.abs(np.fft.rfft(sound * np.hanning(len(sound))))
        found = np.fft.rfftfreq(len(sound), 1 / 8000)[spectrum.argmax()]
        assert abs(found / pitch - 1) < 0.08, (pitch, found)


def test_loudness_does_not_matter_and_a_sound_is_cut_or_ends_in_silence():
    processor = TokComAudioProcessor(
        preset_config("omni-tiny").codec_config.stream_configs()["audio"]
    )
    long, quiet = tone(440, 20000), 0.1 * tone(440, 20000)
    a, b = processor([long, quiet])["input_features"]
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    short = processor(tone(440, 1000))["input_features"][0]
    assert short.shape == (40, 64) and float(short[:, 20:].max()) == -3.0


def test_what_is_cut_off_does_not_change_the_loudness(pipe):
    processor = TokComAudioProcessor(
        preset_config("omni-tiny").codec_config.stream_configs()["audio"]
    )
    quiet = 0.05 * tone(440, 16000)
    loud_end = np.where(np.arange(16000) > 12000, 20 * quiet, quiet)
    torch.testing.assert_close(
        processor(quiet)["input_features"], processor(loud_end)["input_features"]
    )


def test_wav_files_round_trip_and_another_rate_is_resampled(tmp_path):
    sound = 0.5 * tone(440)
    write_wav(sound, tmp_path / "a.wav", 8000)
    again, rate = read_wav(tmp_path / "a.wav")
    assert rate == 8000 and np.abs(again - sound).max() < 1e-4
    processor = TokComAudioProcessor(
        preset_config("omni-tiny").codec_config.stream_configs()["audio"]
    )
    assert processor(tmp_path / "a.wav")["input_features"].shape == (1, 40, 64)
    write_wav(0.5 * tone(440, 16000, 16000), tmp_path / "b.wav", 16000)
    same = processor([tmp_path / "b.wav", 0.5 * tone(440, 8000)])["input_features"]
    assert float((same[0] - same[1]).abs().mean()) < 0.05
    (tmp_path / "c.wav").write_text("no sound")
    with pytest.raises(ValueError, match="c.wav"):
        processor(tmp_path / "c.wav")


def test_recordings_of_another_rate_are_resampled(tmp_path):
    write_wav(tone(440, 16000, 16000), tmp_path / "a.wav", 16000)
    sound = read_sound({"bytes": (tmp_path / "a.wav").read_bytes(), "path": None}, 8000)
    assert len(sound) == 8000
    assert np.abs(sound[100:-100] - tone(440, 8000)[100:-100]).max() < 0.02
    with pytest.raises(ValueError, match="record 3"):
        read_sound({"bytes": b"nothing", "path": None}, 8000, "record 3 (audio)")
