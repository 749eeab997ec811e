"""Several streams in one sequence: codec, tasks, transformer."""

import itertools

import pytest
import torch
from helpers import seeded
from huggingface_hub.errors import StrictDataclassError
from tiny_streams import FLOW, STREAMS, SUBSETS, build_pipe, inputs, model, train_words

from tokcom.configuration_tokcom import TokComConfig
from tokcom.modeling_tokcom import TokComModel
from tokcom.pipeline_media_tokcom import TokComOmniPipeline
from tokcom.training.presets import preset_config


@pytest.fixture(scope="module")
def words():
    return train_words()


@pytest.fixture
def pipe(words) -> TokComOmniPipeline:
    return build_pipe(words)


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
    """A table over all subsets that exist and all that are given, of what the transformer is
    told."""
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


def test_a_micro_batch_weighs_its_rows_however_many_latents_their_streams_have():
    net = model()
    net.set_stage("flow")
    weights = {
        float(net(streams={name: value}, timestep=0.3).weight) for name, value in inputs().items()
    }
    assert weights == {3.0}


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
