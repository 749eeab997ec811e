"""One pipeline class for each modality: which is picked, what it takes, what it refuses."""

import argparse
import inspect
import io
import json
import warnings

import datasets
import numpy as np
import pytest
import torch
from helpers import ROOT, build_model, encoded, seeded, tiny_pipeline
from PIL import Image

from tokcom.evaluation.images import Pictures
from tokcom.pictures_tokcom import Frames
from tokcom.pipeline_media_tokcom import (
    TokComImagePipeline,
    TokComOmniPipeline,
    TokComVideoPipeline,
)
from tokcom.pipeline_tokcom import TokComPipeline
from tokcom.processing_tokcom import TokComImageProcessor, as_clips, vocabulary_size
from tokcom.training.films import write_film
from tokcom.training.pipelines import PIPELINES, build_pipeline, load_pipeline

MODALITIES = ["image", "video", "several"]


# ---- which class ----


@pytest.mark.parametrize("modality", MODALITIES)
def test_a_saved_model_is_loaded_by_its_own_pipeline_and_refused_by_all_others(modality, tmp_path):
    pipe = tiny_pipeline(modality)
    pipe.save_pretrained(tmp_path)
    right = PIPELINES[modality]
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == [
        "pipeline_media_tokcom",
        right.__name__,
    ]
    assert type(load_pipeline(tmp_path)) is right and type(right.from_pretrained(tmp_path)) is right
    for other in set(PIPELINES.values()) - {right}:
        with pytest.raises(ValueError, match=f"use {right.__name__}"):
            other.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use TokComPipeline"):
        right.from_pretrained(ROOT)


@pytest.mark.parametrize("modality", MODALITIES)
def test_an_index_that_names_the_one_class_of_earlier_versions_still_loads(
    modality, tmp_path, caplog
):
    pipe = tiny_pipeline(modality)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index |= {"_class_name": ["pipeline_tokcom", "TokComPipeline"], "vae": [None, None]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    again = load_pipeline(tmp_path)
    assert type(again) is PIPELINES[modality] and "not expected" not in caplog.text
    options = dict(num_inference_steps=1, output_type="latent")
    first, second = (p(**options, generator=seeded()).latents for p in (pipe, again))
    assert torch.equal(first, second)


def test_the_shipped_model_is_one_of_texts():
    assert type(load_pipeline(ROOT)) is TokComPipeline


@pytest.mark.parametrize("pipeline", PIPELINES.values())
def test_no_call_takes_arguments_without_a_name(pipeline):
    for name, parameter in inspect.signature(pipeline.__call__).parameters.items():
        assert parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD, name


@pytest.mark.parametrize("modality", MODALITIES)
def test_an_argument_of_another_modality_is_a_type_error(modality):
    with pytest.raises(TypeError, match="gen_length"):
        tiny_pipeline(modality)(gen_length=3)


# ---- what people hold ----


def pictures_of(array: np.ndarray, folder) -> dict:
    Image.fromarray(array).save(folder / "picture.png")
    return {
        "PIL": Image.fromarray(array),
        "path": folder / "picture.png",
        "name": str(folder / "picture.png"),
        "uint8": array,
        "float": array / 255,
        "tensor": torch.from_numpy(array).permute(2, 0, 1),
        "pt": torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1,
    }


def test_a_picture_in_any_form_gives_the_same_latents(tmp_path):
    pipe = tiny_pipeline("image")
    array = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    expected = pipe.encode(Image.fromarray(array)).latents
    for form, picture in pictures_of(array, tmp_path).items():
        for several in (picture, [picture]):
            torch.testing.assert_close(pipe.encode(several).latents, expected, msg=form)
    both = np.stack([array, array])
    assert (
        len(pipe.encode(both).latents)
        == len(pipe.encode(torch.from_numpy(both).permute(0, 3, 1, 2)).latents)
        == 2
    )


@pytest.mark.parametrize("modality, field", [("image", "images"), ("video", "videos")])
def test_what_is_made_as_a_tensor_is_taken_as_it_is(modality, field):
    pipe = tiny_pipeline(modality)
    made = pipe(batch_size=2, num_inference_steps=1, output_type="pt", generator=seeded())[field]
    taken = pipe.reconstruct(made, output_type="pt")[field]
    assert taken.shape == made.shape
    latents = pipe.model.encode(pixel_values=made).latents
    assert torch.equal(pipe.encode(made).latents, latents)


def test_first_frames_in_any_form_give_the_same_clip(tmp_path):
    pipe = tiny_pipeline("video")
    array = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), dtype=np.uint8)
    frames = [Image.fromarray(frame) for frame in array]
    frames[0].save(tmp_path / "clip.png", save_all=True, append_images=frames[1:])
    forms = {
        "pictures": frames,
        "clips": [frames],
        "arrays": list(array),
        "array": array,
        "arrays of clips": array[None],
        "floats": array / 255,
        "file": tmp_path / "clip.png",
        "tensor": torch.from_numpy(array).permute(3, 0, 1, 2) / 127.5 - 1,
        "tensors": [torch.from_numpy(array).permute(3, 0, 1, 2)],
        "frames of tensors": list(torch.from_numpy(array).permute(0, 3, 1, 2)),
    }
    options = dict(num_inference_steps=1, output_type="latent")
    expected = pipe(frames=frames, generator=seeded(), **options).latents
    for form, value in forms.items():
        made = pipe(frames=value, generator=seeded(), **options).latents
        torch.testing.assert_close(made, expected, msg=form)
    one = pipe(frames=frames[0], generator=seeded(), **options).latents
    torch.testing.assert_close(one[:, :6], expected[:, :6])


def test_files_of_pictures_and_clips_are_read_as_in_training(tmp_path):
    first, *rest = [Image.effect_noise((24, 16), 20 * i + 20).convert("RGB") for i in range(5)]
    options = dict(save_all=True, append_images=rest)
    first.save(tmp_path / "pages.tif", **options)
    first.save(tmp_path / "default.png", **options, default_image=True, duration=100)
    first.save(tmp_path / "long.gif", **options, duration=[100, 300, 100, 100, 100])
    first.save(tmp_path / "phone.jpg", "MPO", **options)
    write_film([first, *rest], tmp_path / "film.mp4")
    counts = {"phone.jpg": 1, "pages.tif": 1, "default.png": 4, "long.gif": 7, "film.mp4": 5}
    pipe = tiny_pipeline("video")
    pictures = TokComImageProcessor([16, 24])
    for name, count in counts.items():
        path = tmp_path / name
        trained = Frames(str(path))
        (wanted,) = as_clips([trained.clip(0, len(trained))])
        for value in (str(path), path, path.read_bytes(), {"bytes": None, "path": str(path)}):
            clip = pipe._read(value, "videos")
            assert clip.shape[2] == count, name
            expected = pictures(wanted)["pixel_values"].transpose(0, 1)[None]
            torch.testing.assert_close(clip, expected)
            torch.testing.assert_close(pictures(value)["pixel_values"][0], expected[0, :, 0])
    films = [tmp_path / "film.mp4", str(tmp_path / "film.mp4")]
    assert pipe._read(films, "videos").shape[:3] == (2, 3, 5)
    with pytest.raises(ValueError, match="`videos` has films among its pictures"):
        pipe._read([tmp_path / "film.mp4", first], "videos")
    with pytest.raises(ValueError, match="cut.mp4' (is cut off|holds no film)"):
        (tmp_path / "cut.mp4").write_bytes((tmp_path / "film.mp4").read_bytes()[:-400])
        pipe._read(tmp_path / "cut.mp4", "videos")


@pytest.mark.parametrize(
    "modality, call, message",
    [
        ("image", lambda p: p.encode(3), "`images` must be a PIL image.*int"),
        ("image", lambda p: p.encode([]), "empty"),
        ("image", lambda p: p.encode("no-such-file.png"), "no-such-file.png"),
        ("image", lambda p: p.encode(__file__), "no picture that can be read"),
        ("image", lambda p: p.encode(torch.zeros(3, 16, 16) + 9), r"\[-1, 1\]"),
        ("image", lambda p: p.encode(np.full((16, 16, 3), np.nan)), r"\[0, 1\]"),
        ("image", lambda p: p.encode(np.zeros((16, 16, 3), dtype=np.int64)), "int64"),
        ("image", lambda p: p.decode([[0.0]]), "`latents` must be a tensor.*list"),
        ("image", lambda p: p(prompt=7), "`prompt` must be a caption.*int"),
        ("image", lambda p: p(guidance_scale={"text": 2.0}, prompt=None), "guidance_scale"),
        ("video", lambda p: p(frames=3), "`frames` must be a list of pictures.*int"),
        ("video", lambda p: p.encode([Image.new("RGB", (8, 8)), "x", 3]), "`videos` must be.*int"),
        ("video", lambda p: p.encode(torch.zeros(4, 3, 16, 24)), r"\(3, F, H, W\)"),
        ("several", lambda p: p("a frog"), "`given` must be a dictionary.*str"),
        ("several", lambda p: p({"image": 3}), "`image` must be a PIL image.*int"),
        ("several", lambda p: p({"audio": {}}), "a sound is a dictionary"),
        ("several", lambda p: p({"audio": 5}), "a sound must be a file.*int"),
        ("several", lambda p: p({"audio": {"array": [0.1] * 99}}), "without `sampling_rate`"),
        ("several", lambda p: p({"text": 3}, "image"), "text.*tokenizer|text.*int"),
    ],
)
def test_a_wrong_type_is_named_in_one_sentence(modality, call, message):
    with pytest.raises(ValueError, match=message) as error:
        call(tiny_pipeline(modality))
    assert "\n" not in str(error.value)


def test_animations_are_clips_whether_they_are_files_or_images():
    frames = [Image.new("RGB", (8, 8), (40 * i, 0, 0)) for i in range(5)]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    images = [Image.open(io.BytesIO(content)) for _ in range(2)]
    assert len(as_clips([content, content])) == len(as_clips(images)) == 2
    assert len(as_clips(frames)) == 1  # stills are the frames of one clip


def test_a_callback_may_change_the_latents_of_pictures():
    pipe, steps = tiny_pipeline("image"), []

    def callback(pipe, step, timestep, tensors):
        steps.append(step)
        return {"latents": torch.zeros_like(tensors["latents"])}

    made = pipe(num_inference_steps=3, callback_on_step_end=callback, output_type="latent")
    assert steps == [0, 1, 2] and not made.latents.any()
    with pytest.raises(ValueError, match="noise"):
        pipe(callback_on_step_end_tensor_inputs=["noise"])


def test_streams_survive_encoding_and_decoding():
    pipe = tiny_pipeline("several")
    picture = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    )
    latents = pipe.encode({"image": picture}).latents
    assert not latents[:, pipe.model.codec.places["audio"]].any()
    decoded = pipe.decode(latents, ["image"])
    assert list(decoded.streams) == ["image"]
    assert np.array_equal(np.asarray(decoded.images[0]), np.asarray(picture))
    with pytest.raises(ValueError, match="smell"):
        pipe.decode(latents, ["smell"])


# ---- texts ----


def test_guidance_of_several_prompts_is_that_of_each_alone(tokenizer):
    pipe = build_pipeline(build_model(vocabulary_size(tokenizer)), tokenizer)
    pipe.set_progress_bar_config(disable=True)
    prompts = ["The pig ran home", "Squinty was a pig, and"]
    options = dict(gen_length=8, guidance_scale=1.5, output_type="seq")
    together = pipe(prompts, generator=[seeded(0), seeded(1)], **options).sequences
    alone = [
        pipe(prompt, generator=[seeded(i)], **options).sequences[0]
        for i, prompt in enumerate(prompts)
    ]
    assert torch.equal(together, torch.stack(alone))


def test_classes_are_exported_by_the_package():
    import tokcom

    assert tokcom.load_pipeline is load_pipeline
    for pipeline in (TokComPipeline, TokComImagePipeline, TokComVideoPipeline, TokComOmniPipeline):
        assert getattr(tokcom, pipeline.__name__) is pipeline


def test_of_several_captions_an_evaluation_takes_the_first(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(buffer, "PNG")
    rows = {"image": [buffer.getvalue()] * 3, "text": [["a cat", "a pet"], [], ["a dog"]]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "a.parquet")
    args = argparse.Namespace(image_column="image", caption_column=None, seed=0)
    found = Pictures(str(tmp_path / "a.parquet"), tiny_pipeline("image"), args, 3)
    assert found.captions == ["a cat", "", "a dog"]


def test_a_long_sound_is_cut_with_a_word():
    pipe = tiny_pipeline("several")
    config = pipe.model.config.codec_config.stream_configs()["audio"]
    sound = np.sin(np.arange(4 * config.num_samples))
    with pytest.warns(UserWarning, match="a sound of .* s is cut to the .* s that the model hears"):
        pipe.encode({"audio": sound})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.encode({"audio": sound[: config.num_samples]})
