"""Pictures that training mirrors and moves, and reads once; codebooks of more pictures than fit
into memory."""

import io
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from helpers import ROOT
from PIL import Image

from tokcom.codec_style_tokcom import TokComStyleCodec
from tokcom.configuration_media_tokcom import TokComStyleCodecConfig
from tokcom.quantization_tokcom import kmeans
from tokcom.train_accelerate import main as train
from tokcom.training import images
from tokcom.training.images import FiledLatents, ImageDataset, encode_all
from tokcom.training.presets import read_preset

SIZE = 16
SHAPE = dict(image_size=SIZE, patch_size=8, num_tokens=4, latent_channels=4, hidden_size=16)
SHAPE |= dict(intermediate_size=16, num_attention_heads=2, num_hidden_layers=1)
SHAPE |= dict(num_expert_layers=1, expert_intermediate_size=8, decoder_hidden_size=16)
SHAPE |= dict(decoder_intermediate_size=16, decoder_num_attention_heads=2, num_decoder_layers=1)


def noise_picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def dataset(count: int = 6, training: bool = True) -> ImageDataset:
    records = datasets.Dataset.from_dict({"image": [noise_picture(i) for i in range(count)]})
    data = ImageDataset(records, "image", "caption", None, 0, training)
    return data.fit(TokComStyleCodecConfig(**SHAPE))


def test_a_moved_picture_is_the_picture_moved_and_mirrored_anew_in_every_epoch():
    data = dataset()
    plain = data[0]["pixel_values"]
    data.augment(flip=0.5, shift=2)
    seen = []
    for epoch in range(40):
        data.set_epoch(epoch)
        moved = data[0]["pixel_values"]
        assert torch.equal(moved, data[0]["pixel_values"])  # the epoch decides, so a run can resume
        inside = moved[:, 2:-2, 2:-2]
        places = [
            (flip, y, x)
            for flip, source in enumerate((plain, plain.flip(-1)))
            for y in range(5)
            for x in range(5)
            if torch.equal(inside, source[:, y : y + SIZE - 4, x : x + SIZE - 4])
        ]
        assert len(places) == 1
        seen.append(places[0])
    assert {flip for flip, _, _ in seen} == {0, 1} and len(set(seen)) > 20


def test_held_out_pictures_and_newly_fitted_ones_stay_where_they_are():
    held_out = dataset(training=False)
    plain = held_out[0]["pixel_values"]
    held_out.augment(flip=1.0, shift=2)
    assert torch.equal(held_out[0]["pixel_values"], plain)
    data = dataset()
    data.augment(flip=1.0, shift=0)
    assert torch.equal(data[0]["pixel_values"], plain.flip(-1))
    data.fit(TokComStyleCodecConfig(**SHAPE))  # statistics of latents are those of plain pictures
    assert torch.equal(data[0]["pixel_values"], plain)


def test_a_picture_is_decoded_once_and_what_is_done_to_it_leaves_it_as_it_was(monkeypatch):
    data = dataset()
    first = data[0]["pixel_values"].clone()
    monkeypatch.setattr(ImageDataset, "frames", lambda *_: pytest.fail("decoded again"))
    data[0]["pixel_values"].zero_()
    assert torch.equal(data[0]["pixel_values"], first)


def test_no_more_pictures_are_kept_than_there_is_room_for(monkeypatch):
    one = 3 * SIZE * SIZE * 4  # bytes
    monkeypatch.setattr(images, "PREPARED_BYTES", 2 * one)
    data = dataset()
    for i in range(len(data)):
        data[i]
    assert len(data.prepared) == 2 and data.prepared_bytes == 2 * one


@pytest.mark.parametrize("setting", ["codec.flip=1.5", "codec.shift=2"])
def test_moves_that_cannot_be_are_refused(setting, tmp_path):
    preset = "style-tiny" if "flip" in setting else "debug"
    with pytest.raises(SystemExit, match="flip"):
        train(["--preset", preset, setting, f"output_dir={tmp_path / 'x'}", "report_to=none"])


def test_kmeans_of_parts_is_kmeans_of_all_and_keeps_a_few_vectors_only():
    vectors = torch.randn(600, 3, generator=torch.Generator().manual_seed(0))
    whole = kmeans([vectors], 20, iterations=4)
    parts = kmeans(list(vectors.split(64)), 20, iterations=4)
    assert whole.shape == parts.shape and torch.isfinite(parts).all()

    def error(centres: torch.Tensor) -> float:
        return torch.cdist(vectors, centres).min(-1).values.square().mean().item()

    assert error(parts) < 1.2 * error(whole)


def test_empty_centres_move_to_the_farthest_vectors_of_all_parts():
    near = torch.zeros(50, 1)
    far = torch.tensor([[10.0], [20.0]])
    centres = kmeans([near, far[:1], near, far[1:]], 3, iterations=3)
    assert sorted(centres[:, 0].tolist()) == [0.0, 10.0, 20.0]


def test_a_codebook_of_filed_latents_is_that_of_latents_in_memory(tmp_path):
    torch.manual_seed(0)
    codec = TokComStyleCodec(TokComStyleCodecConfig(**SHAPE)).eval()
    model = SimpleNamespace(codec=codec, encode=codec.encode)
    data = dataset(24)
    rows = np.arange(24)
    filed = FiledLatents(tmp_path / "latents.f32", model, data, rows)
    together = encode_all(model, data)
    assert torch.equal(torch.cat(list(filed)), together)
    facts = [codec.fit_codebook(latents, 8) for latents in (together, filed)]
    assert facts[0] == facts[1] and 0 < facts[0]["distortion"] < 1
    assert facts[0]["usage"] == 1


def test_every_tiny_preset_of_pictures_and_clips_has_a_batch_in_the_data_it_names():
    for name in ("style-tiny", "video-tiny", "omni-tiny"):
        settings = read_preset(name)
        train_file = ROOT / str(settings.get("data", {}).get("train", ""))
        rows = datasets.load_dataset("parquet", data_files=str(train_file), split="train")
        for stage in ("codec", "flow"):
            assert settings[stage]["batch_size"] <= len(rows), (name, stage)
