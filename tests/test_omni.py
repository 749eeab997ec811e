"""Several streams in one sequence: codec, tasks, transformer, pipeline, sounds, data, training."""

import itertools
import json
import shutil

import datasets
import numpy as np
import pytest
import torch
import yaml
from helpers import ROOT, same_weights, seeded
from huggingface_hub.errors import StrictDataclassError
from PIL import Image

from examples.several_streams import main as join_streams
from tokcom.cli.main import call
from tokcom.codec_composite_tokcom import read_stream
from tokcom.configuration_tokcom import TokComConfig
from tokcom.evaluation.codebook import main as codebook
from tokcom.evaluation.omni import main as measure_streams
from tokcom.inference import main as infer
from tokcom.modeling_tokcom import TokComModel
from tokcom.pipeline_media_tokcom import TokComOmniPipeline
from tokcom.processing_tokcom import (
    TokComAudioProcessor,
    TokComImageProcessor,
    read_sound,
    read_wav,
    vocabulary_size,
    write_wav,
)
from tokcom.sampling_tokcom import most_alike
from tokcom.scheduling_tokcom import TokComFlowMatchScheduler
from tokcom.train_accelerate import main as train
from tokcom.training.build import build_model
from tokcom.training.config import DataConfig, load_train_config
from tokcom.training.data import load_documents, train_tokenizer
from tokcom.training.presets import preset_config
from tokcom.training.streams import OmniDataset

STREAMS = {
    "text": dict(
        chunk_size=2, latent_channels=8, embedding_size=16, hidden_size=32, intermediate_size=32
    ),
    "image": dict(height=16, width=16),
    "audio": dict(num_frames=16, num_channels=10, fft_length=128, hop_length=64),
}
FLOW = dict(
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
)
SUBSETS = [
    names for size in range(4) for names in itertools.combinations(("audio", "image", "text"), size)
]


@pytest.fixture(scope="module")
def words():
    return train_tokenizer(["a red ball", "a blue cat"], 300)


def model(vocab_size=300, codec=None, **overrides) -> TokComModel:
    torch.manual_seed(0)
    parts = dict(
        codec_config={"text_latents": 4, "streams": STREAMS, **(codec or {})},
        transformer_config=FLOW,
    )
    net = TokComModel(preset_config("omni-tiny", vocab_size, **{**parts, **overrides})).eval()
    for name, parameter in net.transformer.named_parameters():
        if (
            "modulation" in name
        ):  # a block at initialisation is the identity, which would hide mistakes
            torch.nn.init.normal_(parameter, std=0.3)
    return net


@pytest.fixture
def pipe(words) -> TokComOmniPipeline:
    net = model(vocabulary_size(words))
    pipe = TokComOmniPipeline(net, TokComFlowMatchScheduler.from_model_config(net.config), words)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs(batch=3, seed=1) -> dict[str, torch.Tensor]:
    g = seeded(seed)
    return {
        "text": torch.randint(0, 300, (batch, 8), generator=g),
        "image": torch.rand(batch, 3, 16, 16, generator=g) * 2 - 1,
        "audio": torch.rand(batch, 10, 16, generator=g) * 4 - 3,
    }


def content(kind: str, count: int = 2) -> list:
    made = {
        "text": [f"a {color} cat" for color in ("red", "blue", "pink")],
        "image": [Image.new("RGB", (16, 16), color) for color in ("red", "blue", "pink")],
        "audio": [tone(f) for f in (300, 700, 1100)],
    }
    return made[kind][:count]


def tone(frequency: float, samples: int = 960, rate: int = 8000) -> np.ndarray:
    return np.sin(2 * np.pi * frequency * np.arange(samples) / rate).astype(np.float32)


# ---- codec ----


def test_every_stream_has_places_and_channels_of_its_own_and_comes_back():
    net, given = model(), inputs()
    encoded = net.encode(streams=given)
    assert encoded.latents.shape == (3, 4 + 4 + 4, 8 + 192 + 40)
    assert encoded.position_ids.shape == (3, 12, 4) and encoded.mask.all()
    for name, codec in net.codec.streams.items():
        alone = codec.encode(net.codec._inputs(name, given[name])).latents
        torch.testing.assert_close(net.codec.stream_of(encoded.latents, name), alone)
    assert encoded.latents.count_nonzero() <= 3 * (4 * 8 + 4 * 192 + 4 * 40)
    torch.testing.assert_close(
        net.decode_stream("image", encoded.latents).pixel_values[:, :, 0], given["image"]
    )
    torch.testing.assert_close(
        net.decode_stream("audio", encoded.latents).input_features, given["audio"]
    )


def test_streams_stand_in_the_order_of_their_names_which_saving_keeps(tmp_path):
    net = model()
    assert net.codec.names == ["audio", "image", "text"]
    net.save_pretrained(tmp_path)
    again = TokComModel.from_pretrained(tmp_path).eval()
    a, b = (m.encode(streams=inputs()) for m in (net, again))
    torch.testing.assert_close(a.latents, b.latents)
    noisy = torch.randn(3, 12, 240, generator=seeded())
    torch.testing.assert_close(
        net.denoise(noisy, 0.5, a.position_ids).latents,
        again.denoise(noisy, 0.5, b.position_ids).latents,
    )


def test_an_estimate_is_zero_in_the_channels_of_other_streams_and_reads_only_its_own():
    net = model()
    clean = net.encode(streams=inputs())
    noisy = torch.randn(clean.latents.shape, generator=seeded())
    estimate = net.denoise(noisy, 0.5, clean.position_ids).latents
    assert (estimate[(clean.latents == 0)] == 0).all() and estimate.count_nonzero() > 0
    own = noisy.clone()
    for name in net.codec.names:
        mine = torch.zeros_like(noisy, dtype=torch.bool)
        mine[:, net.codec.places[name], net.codec.channels[name]] = True
        own = torch.where(
            mine | ~torch.isin(torch.arange(12), net.codec.index_of([name]))[None, :, None],
            own,
            7.0,
        )
    assert torch.equal(net.denoise(own, 0.5, clean.position_ids).latents, estimate)


@pytest.mark.parametrize(
    "overrides,named",
    [
        ({"codec": {"streams": {**STREAMS, "text": {"chunk": 2}}}}, "streams.text.chunk"),
        (
            {"codec": {"streams": {**STREAMS, "text": {"model_type": "tokcom_smell_codec"}}}},
            "smell",
        ),
        ({"codec": {"streams": {"my image": {"model_type": "tokcom_style_codec"}}}}, "my image"),
        (
            {
                "codec": {
                    "streams": {
                        **STREAMS,
                        "more": {"vocab_size": 20, "mask_token_id": 1, "pad_token_id": 1},
                    }
                },
                "vocab_size": None,
            },
            "vocab_size",
        ),
        ({"codec": {"text_latents": 0}}, "text_latents"),
        ({"codec": {"streams": {**STREAMS, "audio": {"hop_length": 1024}}}}, "hop_length"),
        ({"condition_vocab_size": 10}, "captions"),
        ({"prediction_type": "tokens"}, "prediction_type"),
    ],
)
def test_impossible_configurations_are_named(overrides, named):
    with pytest.raises((StrictDataclassError, ValueError), match=named):
        model(**overrides)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"stream_weights": {"smell": 1.0}}, "stream_weights"),
        ({"generation_rates": {"smell": 0.5}}, "generation_rates"),
        ({"generation_rates": {"text": 0.0}}, "generation_rates"),
        ({"infill_rate": 0.1}, "no setting flow.objective.infill_rate"),
    ],
)
def test_impossible_settings_of_the_objective_are_named(settings, named):
    with pytest.raises(ValueError, match=named):
        model().set_stage("flow", **settings)


def test_a_sound_alone_is_a_composite_of_one_stream():
    with pytest.raises(StrictDataclassError, match="composite"):
        TokComConfig(codec_config={"model_type": "tokcom_audio_codec"})
    streams = {"text": None, "image": None, "audio": STREAMS["audio"]}
    net = model(codec={"streams": streams})
    assert net.codec.names == ["audio"] and torch.isfinite(
        net(streams={"audio": inputs()["audio"]}).loss
    )


def test_bad_streams_are_named():
    net = model()
    with pytest.raises(ValueError, match="smell"):
        net.encode(streams={"smell": torch.zeros(1)})
    with pytest.raises(ValueError, match="8 ids"):
        net.encode(streams={"text": torch.zeros(1, 6, dtype=torch.long)})
    with pytest.raises(ValueError, match="vocabulary"):
        net.encode(streams={"text": torch.full((1, 8), 1000)})
    with pytest.raises(ValueError, match="audio processor"):
        net.encode(streams={"audio": torch.zeros(1, 3, 16)})
    with pytest.raises(ValueError, match="'image'.*4"):
        net.encode(streams={"image": torch.zeros(1, 3, 32, 32)})
    with pytest.raises(ValueError, match="batch size"):
        net.encode(streams={"image": torch.zeros(1, 3, 16, 16), "audio": torch.zeros(3, 10, 16)})
    with pytest.raises(ValueError, match="position_ids"):
        net.denoise(torch.zeros(1, 12, 240), 0.5)
    with pytest.raises(ValueError, match="streams"):
        net(input_ids=torch.zeros(1, 8, dtype=torch.long))


def test_a_stream_may_get_another_codec_than_the_preset_names():
    style = dict(model_type="tokcom_style_codec", image_size=16, num_tokens=4, hidden_size=32)
    style |= dict(decoder_hidden_size=32, expert_intermediate_size=32, intermediate_size=32)
    flow = {**FLOW, "max_position_embeddings": 60}
    net = model(codec={"streams": {**STREAMS, "image": style}}, transformer_config=flow)
    assert (
        net.codec.places["image"] == slice(4, 8)
        and net.codec.streams["image"].config.num_tokens == 4
    )
    config = preset_config(
        "omni-tiny", 300, codec_config={"streams": {"title": {}}}, transformer_config=flow
    )
    assert config.codec_config.stream_configs()["title"].vocab_size == 301


# ---- tasks ----


@pytest.mark.parametrize("present", [s for s in SUBSETS if s])
def test_given_streams_are_at_time_1_generated_ones_at_t_and_absent_ones_hidden(present):
    """A table over all subsets that exist and all that are given, of what the transformer is told."""
    net, seen = model(), {}
    handle = net.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(time=args[1], x=args[0], mask=args[3]),
        with_kwargs=True,
    )
    clean = net.encode(streams=inputs())
    # the last row has all streams, so that none is left out of the sequence
    rows = {
        name: torch.tensor([name in present, name in present, True]) for name in net.codec.names
    }
    for given in SUBSETS:
        if set(given) >= set(present) or not set(given) <= set(present):
            continue
        net(streams=inputs(), present=rows, given=list(given), timestep=0.25)
        for name in net.codec.names:
            place = net.codec.places[name]
            assert bool((seen["mask"][:2, place] == (name in present)).all())
            assert bool((seen["time"][:2, place] == (1.0 if name in given else 0.25)).all())
            kept = torch.equal(
                net.codec.stream_of(seen["x"], name)[:2],
                net.codec.stream_of(clean.latents, name)[:2],
            )
            assert kept == (name in given)
    handle.remove()


def test_every_row_draws_a_task_of_its_streams_and_all_tasks_occur():
    net = model()
    exists = net.codec.spread(
        torch.tensor([[True, True, True], [True, False, True], [False, True, False]]).repeat(400, 1)
    )
    given, used = net.codec.draw_task(exists, dropout=0.3)
    made, starts = used & ~given, [net.codec.places[name].start for name in net.codec.names]
    assert bool((used <= exists).all() and (given <= used).all() and made.any(1).all())
    tasks = {
        (i % 3, *row) for i, row in enumerate((given.int() + 2 * made.int())[:, starts].tolist())
    }
    whole = {(0, *t) for t in itertools.product(range(3), repeat=3) if 2 in t}
    assert {t for t in tasks if t[0] == 0} == whole
    assert {t[1:] for t in tasks if t[0] == 2} == {(0, 2, 0)}
    for name in net.codec.names:  # whole streams
        part = given[:, net.codec.places[name]]
        assert bool((part == part[:, :1]).all())
    assert not bool((exists & ~net.codec.draw_task(exists, dropout=0.0)[1]).any())


def test_all_choices_of_what_is_generated_are_as_likely():
    net = model()
    given, used = net.codec.draw_task(torch.ones(7000, 12, dtype=torch.bool), dropout=0.0)
    made = (used & ~given)[:, [net.codec.places[name].start for name in net.codec.names]]
    counts = torch.bincount(made.long() @ torch.tensor([1, 2, 4]), minlength=8)
    assert counts[0] == 0 and ((counts[1:] - 1000).abs() < 150).all()


def test_generation_rates_say_how_often_each_stream_is_generated():
    net = model()
    rates = {"text": 0.9, "image": 0.2}
    given, used = net.codec.draw_task(torch.ones(7000, 12, dtype=torch.bool), 0.0, rates)
    made, share = used & ~given, 1 - 0.1 * 0.8 * 0.5  # of the draws that generate anything
    for name, rate in {"text": 0.9, "image": 0.2, "audio": 0.5}.items():
        found = made[:, net.codec.places[name].start].float().mean()
        assert abs(found - rate / share) < 0.03


def test_streams_that_no_row_has_are_not_computed_and_the_loss_is_the_same(monkeypatch):
    net, lengths = model().eval(), []
    net.transformer.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    net.config.noise_std = 0.0  # else noise differs with the length
    settings = dict(given=["text"], timestep=0.5)
    absent = net(streams=inputs(), present={"audio": torch.tensor([False] * 3)}, **settings)
    streams = {name: value for name, value in inputs().items() if name != "audio"}
    unnamed = net(streams=streams, **settings)
    predict = net.objective._predict
    net(streams=inputs(), present={"audio": torch.tensor([False, True, False])}, **settings)
    monkeypatch.setattr(
        net.objective, "_predict", lambda *args: predict(*args[:-1], net.codec.names)
    )
    whole = net(streams=streams, **settings)
    shorter = 12 - net.codec.lengths["audio"]
    assert lengths == [shorter, shorter, 12, 12]
    torch.testing.assert_close(absent.loss, whole.loss)
    torch.testing.assert_close(unnamed.loss, whole.loss)


def test_a_codec_without_data_for_what_it_trains_is_named():
    net = model()
    net.set_stage("codec")
    with pytest.raises(ValueError, match="nothing to train"):
        net.codec.training_loss({"image": inputs()["image"]})


def test_the_loss_counts_generated_streams_only_each_by_its_weight():
    net = model()
    net.set_stage("flow", stream_weights={"audio": 0.0, "image": 2.0})
    losses = {}
    for made in net.codec.names:
        torch.manual_seed(0)
        output = net(
            streams=inputs(), given=[name for name in net.codec.names if name != made], timestep=0.3
        )
        losses[made] = output.mse_loss
        assert (output.ce_loss > 0) == (made == "text")
    assert losses["audio"] == 0 and losses["image"] > 0 and losses["text"] > 0
    net = model()
    torch.manual_seed(0)
    plain = net(streams=inputs(), given=["audio", "text"], timestep=0.3).mse_loss
    torch.testing.assert_close(losses["image"], 2 * plain)


def test_an_absent_stream_influences_nothing():
    net, results = model(), []
    rows = {"audio": torch.tensor([False] * 3)}
    for seed in (1, 2):
        given = {**inputs(), "audio": inputs(seed=seed)["audio"]}
        torch.manual_seed(0)
        clean = net.encode(streams=given, present=rows)
        noisy = torch.where(
            clean.mask[..., None], torch.randn(clean.latents.shape, generator=seeded()), float(seed)
        )
        results.append(net.denoise(noisy, 0.5, clean.position_ids, clean.mask).latents[clean.mask])
        torch.manual_seed(0)
        results.append(net(streams=given, present=rows, given=["text"], timestep=0.5).loss)
    assert (results[0] - results[2]).abs().max() == 0 and results[1] == results[3]


def test_gradients_reach_the_maps_of_generated_streams_only():
    net = model()
    net(
        streams=inputs(), present={"audio": torch.tensor([False] * 3)}, given=["text"]
    ).loss.backward()
    grad = net.transformer.proj_out.weight.grad
    for name in net.codec.names:
        assert bool(grad[net.codec.channels[name]].any()) == (name == "image")


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
            read = read_stream(pipe.model.codec, name, values[name], pipe.tokenizer)
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
        (dict(guidance_scale=2.0), "guidance_scale"),
        (dict(given={"text": "a cat"}, output_type="pil"), "output_type"),
        (dict(given={"audio": np.zeros((2, 3, 4))}), "no sound"),
        (dict(given={"text": "a cat"}, num_inference_steps=0), "num_inference_steps"),
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
    with pytest.raises(ValueError, match="at least one of the streams"):
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


# ---- data and training ----


def sources(tmp_path) -> str:
    pictures, sounds = tmp_path / "pictures.parquet", tmp_path / "sounds.parquet"
    emoji = datasets.load_dataset(
        "parquet", data_files=str(ROOT / "sample_data/emoji_train.parquet"), split="train"
    )
    emoji.select(range(6)).to_parquet(pictures)
    encoded = []
    for i in range(4):
        write_wav(tone(300 + 200 * i), tmp_path / "a.wav", 8000)
        caption = "the sound of: " + emoji[i]["caption"]
        encoded.append(
            {
                "audio": {"bytes": (tmp_path / "a.wav").read_bytes(), "path": None},
                "caption": caption,
            }
        )
    sound = datasets.Dataset.from_list(encoded).cast_column("audio", datasets.Audio(decode=False))
    sound.to_parquet(sounds)
    join_streams(
        [
            "--pictures",
            str(pictures),
            "--sounds",
            str(sounds),
            "--silent",
            "--output",
            str(tmp_path / "both.parquet"),
        ]
    )
    mix = [
        {
            "path": str(tmp_path / "both.parquet"),
            "fields": {"text": "caption", "image": "image", "audio": "audio"},
            "weight": 3,
        },
        {"path": str(sounds), "fields": {"audio": "audio"}, "weight": 1},
        {"path": str(pictures), "field": "caption", "modality": "text", "weight": 1},
    ]
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump(mix))
    return str(tmp_path / "mix.yaml")


def test_sources_are_mixed_and_their_records_may_lack_streams(tmp_path, words):
    records = load_documents(sources(tmp_path), DataConfig(train="x"), "train")
    kinds = {tuple(sorted(k for k, v in row.items() if v is not None)) for row in records}
    assert kinds == {("audio",), ("text",), ("image", "text"), ("audio", "image", "text")}
    dataset = OmniDataset(records, words).fit(model(vocabulary_size(words)).codec)
    batch = torch.utils.data.default_collate([dataset[i] for i in range(len(dataset))])
    for i, row in enumerate(records):
        for name, value in batch["streams"].items():
            there = row[name] is not None
            assert bool(batch["present"][name][i]) == there
            assert there or bool((value[i] == (words.eos_token_id if name == "text" else 0)).all())


def test_features_of_a_sound_are_computed_once_for_all_its_records_while_they_fit(
    tmp_path, words, monkeypatch
):
    records = load_documents(sources(tmp_path), DataConfig(train="x"), "train")
    dataset = OmniDataset(datasets.concatenate_datasets([records] * 2), words).fit(
        model(vocabulary_size(words)).codec
    )
    made, compute = [], TokComAudioProcessor.__call__
    monkeypatch.setattr(
        TokComAudioProcessor, "__call__", lambda self, *a: made.append(1) or compute(self, *a)
    )
    rows = np.flatnonzero(dataset.present["audio"]).tolist()
    sounds = {sound["bytes"] for sound in records["audio"] if sound is not None}
    first = [dataset[i]["streams"]["audio"] for i in rows]
    assert all(torch.equal(dataset[i]["streams"]["audio"], sound) for i, sound in zip(rows, first))
    assert len(rows) > len(made) == len(sounds) > 1
    monkeypatch.setattr("tokcom.training.streams.KEPT_SOUNDS", 0)
    dataset.features.clear()
    assert all(
        torch.equal(dataset[i]["streams"]["audio"], sound) for i, sound in zip(rows * 2, first * 2)
    )
    assert len(made) == len(sounds) + 2 * len(rows)


def test_a_batch_without_any_stream_is_refused():
    net = model()
    net.set_stage("flow")
    with pytest.raises(ValueError, match="no row of this batch has any stream"):
        net(streams=inputs(), present={name: torch.tensor([False] * 3) for name in inputs()})


def test_batches_hold_records_of_the_same_streams_and_every_record_is_shown_once(tmp_path, words):
    records = load_documents(sources(tmp_path), DataConfig(train="x"), "train")
    dataset, orders = OmniDataset(datasets.concatenate_datasets([records] * 5), words), []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        orders.append(list(dataset.sampler(3, 7)))
    assert orders[0] == orders[2] != orders[1] and sorted(orders[0]) == sorted(orders[1]) == list(
        range(len(dataset))
    )
    kinds = np.stack(list(dataset.present.values()), 1)[orders[0]]
    batches = kinds[: len(kinds) // 3 * 3].reshape(-1, 3, len(dataset.present))
    mixed = (batches != batches[:, :1]).any((1, 2)).sum()
    groups, counts = np.unique(kinds, axis=0, return_counts=True)
    assert len(groups) == 4 and mixed <= (counts % 3).sum() // 3


def test_held_out_pictures_are_of_no_digit_and_of_no_training_record(tmp_path):
    pictures = str(ROOT / "sample_data/emoji_train.parquet")
    join_streams(
        ["--pictures", pictures, "--hold_out", "10", "--output", str(tmp_path / "a.parquet")]
    )
    parts = [
        load_documents(
            str(tmp_path / f"{name}.parquet"),
            DataConfig(train="x", fields={"text": "caption", "image": "image"}),
            "train",
        )
        for name in ("a", "a_test")
    ]
    learnt, held_out = ([(row["text"], row["image"]["bytes"]) for row in part] for part in parts)
    assert len(held_out) == 10 and len(learnt) == 46 and not set(learnt) & set(held_out)


def test_a_held_out_picture_is_shown_with_no_sound_of_training(tmp_path):
    names = [f"animal {i}" for i in range(4)]
    pictures = [
        {"caption": name, "image": {"bytes": name.encode(), "path": None}} for name in names
    ]
    sounds = [
        {"caption": f"sound: {name}", "audio": {"bytes": b"0", "path": None}}
        for name in names
        for _ in range(3)
    ]
    for name, rows, kind in (
        ("image", pictures, datasets.Image),
        ("audio", sounds, datasets.Audio),
    ):
        stored = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
        features = datasets.Features({"caption": datasets.Value("string"), name: stored})
        found = datasets.Dataset.from_list(rows, features).cast_column(name, kind(decode=False))
        found.to_parquet(tmp_path / f"{name}.parquet")
    files = [
        "--pictures",
        str(tmp_path / "image.parquet"),
        "--sounds",
        str(tmp_path / "audio.parquet"),
    ]
    join_streams([*files, "--hold_out", "2", "--output", str(tmp_path / "a.parquet")])
    learnt, held_out = (
        datasets.load_dataset(
            "parquet", data_files=str(tmp_path / f"{name}.parquet"), split="train"
        )["caption"][:]
        for name in ("a", "a_test")
    )
    assert len(learnt) == len(held_out) == 6 and not set(learnt) & set(held_out)


def test_bad_sources_of_streams_are_named(tmp_path, words):
    path = str(ROOT / "sample_data/emoji_train.parquet")
    for source, named in (
        ({"path": path, "fields": {"text": "sentence"}}, "sentence"),
        ({"path": path, "modality": "text"}, "modality"),
    ):
        with pytest.raises(ValueError, match=named):
            load_documents([source], DataConfig(train="x"), "train")
    records = load_documents(
        [{"path": path, "fields": {"image": "caption"}}], DataConfig(train="x"), "train"
    )
    with pytest.raises(ValueError, match="'image'"):
        OmniDataset(records, words).fit(model(vocabulary_size(words)).codec)
    records = load_documents(
        [{"path": path, "fields": {"smell": "caption"}}], DataConfig(train="x"), "train"
    )
    with pytest.raises(ValueError, match="smell"):
        OmniDataset(records, words).fit(model(vocabulary_size(words)).codec)


def test_a_text_is_cut_between_characters_to_what_the_model_reads(tmp_path, words):
    datasets.Dataset.from_dict({"caption": ["红色的球和蓝色的猫", "a cat"]}).to_parquet(
        tmp_path / "a.parquet"
    )
    source = [{"path": str(tmp_path / "a.parquet"), "fields": {"text": "caption"}}]
    dataset = OmniDataset(load_documents(source, DataConfig(train="x"), "train"), words)
    net = model(vocabulary_size(words))
    cut = dataset.fit(net.codec).content(0)["text"]
    assert cut and "红色的球和蓝色的猫".startswith(cut) and dataset.content(1)["text"] == "a cat"
    assert len(words(cut)["input_ids"]) <= 8


def test_a_misspelt_field_of_all_sources_is_named(tmp_path):
    path = str(ROOT / "sample_data/emoji_train.parquet")
    fields = {"image": "image", "text": "capton"}
    with pytest.raises(ValueError, match="text.*capton"):
        load_documents(path, DataConfig(train=path, fields=fields), "train")


def test_validation_of_the_codec_may_have_batches_without_a_stream(tmp_path):
    path = str(ROOT / "sample_data/emoji_train.parquet")
    pictures = datasets.load_dataset("parquet", data_files=path, split="train").select_columns(
        "image"
    )
    pictures.to_parquet(tmp_path / "silent.parquet")
    held_out = [{"path": path, "fields": {"text": "caption"}, "max_samples": 2}]
    held_out.append(
        {"path": str(tmp_path / "silent.parquet"), "fields": {"image": "image"}, "max_samples": 9}
    )
    options = [
        f"data.train={sources(tmp_path)}",
        f"data.validation={json.dumps(held_out)}",
        "stage=codec",
    ]
    train(
        tiny_run(tmp_path, *options, "codec.batch_size=1", "codec.eval_batches=11", "num_samples=0")
    )


def tiny_run(tmp_path, *more: str) -> list[str]:
    parts = [
        f"model.codec_config.streams={json.dumps(STREAMS)}",
        "model.codec_config.text_latents=8",
    ]
    parts += [
        f"model.transformer_config={json.dumps(FLOW)}",
        "tokenizer_vocab_size=300",
        "report_to=none",
    ]
    for stage in ("codec", "flow"):
        parts += [
            f"{stage}.max_steps=4",
            f"{stage}.batch_size=4",
            f"{stage}.eval_steps=4",
            f"{stage}.eval_batches=1",
        ]
    return ["--preset", "omni-tiny", f"output_dir={tmp_path / 'out'}", *parts, *more]


def test_training_ends_with_a_pipeline_of_all_streams_and_measured_latents(tmp_path, capsys):
    train(
        tiny_run(
            tmp_path,
            f"data.train={sources(tmp_path)}",
            f"data.validation={tmp_path / 'both.parquet'}",
        )
    )
    pipe = TokComOmniPipeline.from_pretrained(tmp_path / "out")
    assert pipe.model.codec.streams["image"].latent_std.std() > 0  # measured
    assert (tmp_path / "out/run/flow/samples-4.png").is_file()
    assert len(pipe(num_inference_steps=1).streams) == 3


def test_a_resumed_run_of_streams_changes_no_bit(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "donor")
    options = [
        f"data.train={sources(tmp_path)}",
        f"data.validation={tmp_path / 'both.parquet'}",
        "num_samples=0",
    ]
    options += [
        f"init_from={tmp_path / 'donor'}",
        "stage=flow",
        "flow.max_steps=24",
        "flow.checkpoint_steps=8",
    ]
    options += ["flow.eval_steps=6", "flow.batch_size=2", "flow.warmup_steps=2"]
    train(tiny_run(tmp_path, *options))
    shutil.copytree(tmp_path / "out", tmp_path / "whole")
    for name in ("checkpoint-24", "final", "best"):
        shutil.rmtree(tmp_path / "out" / "run" / "flow" / name)
    (tmp_path / "out" / "model.safetensors").unlink()
    train(tiny_run(tmp_path, *options))
    assert same_weights(tmp_path / "whole", tmp_path / "out")


def test_a_new_transformer_takes_over_a_codec_of_several_streams(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    options = [
        "stage=flow",
        f"codec_from={tmp_path}",
        "data.train=x",
        "model.transformer_config.num_hidden_layers=1",
    ]
    net = build_model(load_train_config("omni-tiny", options), pipe.tokenizer)
    assert net.config.transformer_config.num_hidden_layers == 1
    codec = pipe.model.codec.state_dict()
    assert all(torch.equal(value, codec[name]) for name, value in net.codec.state_dict().items())


def test_data_and_models_of_different_kinds_are_named(tmp_path):
    emoji, stories = (
        ROOT / "sample_data/emoji_train.parquet",
        ROOT / "sample_data/stories_train.jsonl",
    )
    for preset, data, named in (
        (
            "debug",
            [f"data.train={emoji}", "data.fields={text: caption, image: image}"],
            "omni-tiny",
        ),
        ("omni-tiny", [f"data.train={stories}", "data.fields=null"], "data.fields"),
        ("omni-tiny", [f"data.train={emoji}", "data.fields=null"], "omni-tiny|pictures"),
    ):
        with pytest.raises(SystemExit, match=named):
            train(["--preset", preset, f"output_dir={tmp_path / preset}", "report_to=none", *data])


def test_the_evaluation_measures_six_directions_and_writes_pictures_and_sounds(tmp_path, words):
    net = model(
        vocabulary_size(words),
        codec={"streams": {**STREAMS, "audio": dict(num_frames=32, num_channels=16)}},
    )
    pipe = TokComOmniPipeline(net, TokComFlowMatchScheduler.from_model_config(net.config), words)
    pipe.save_pretrained(tmp_path / "model")
    sample = str(ROOT / "sample_data/streams_{}.parquet")
    for name in ("train", "validation"):
        records = datasets.load_dataset("parquet", data_files=sample.format(name), split="train")
        heard = [audio is not None for audio in records.data["audio"].to_pylist()]
        rows = [i for i, sound in enumerate(heard) if sound]
        records.select(rows * (2 if name == "train" else 1)).to_parquet(
            tmp_path / f"{name}.parquet"
        )
    pictures = [str(ROOT / f"sample_data/emoji_{name}.parquet") for name in ("train", "train")]
    facts = measure_streams(
        [
            *(
                "--model",
                str(tmp_path / "model"),
                "--pictures",
                pictures[0],
                "--pictures_test",
                pictures[1],
            ),
            *(
                "--digits",
                str(tmp_path / "train.parquet"),
                "--digits_test",
                str(tmp_path / "validation.parquet"),
            ),
            *(
                "--guidance_scales",
                "1",
                "--steps",
                "1",
                "--contrastive_steps",
                "30",
                "--epochs",
                "8",
            ),
            *("--output_dir", str(tmp_path / "results")),
        ]
    )
    directions = {row["direction"] for row in facts["directions"]}
    assert len(directions) == 7 and all(  # the seventh is from nothing
        0 <= row["guidance 1"] <= 100 for row in facts["directions"]
    )
    nearest = [row for row in facts["directions"] if row["measure"] == "noun exact"][0]
    assert nearest["nearest training record"] == 1.0  # here the test pictures are the training ones
    for name in ("results.md", "pictures.png", "sounds.png", "seven.wav"):
        assert (tmp_path / "results" / name).is_file()
