"""Models of pictures: data, training, commands and measures."""

import io
import json
import signal
from types import SimpleNamespace

import datasets
import gradio
import numpy as np
import pytest
import torch
from helpers import ROOT
from PIL import Image
from tiny_images import CODEC, EMOJI, FLOW, pictures
from transformers import ResNetConfig, ResNetModel

from tokcom.cli.app_zoo import ShownModel, draw, rebuild
from tokcom.cli.main import main as convert
from tokcom.configuration_media_tokcom import TokComStyleCodecConfig
from tokcom.evaluation.classifier import Classifier, feature_distance
from tokcom.evaluation.images import (
    PCA,
    frechet,
    jpeg,
    main,
    order_facts,
    psnr,
    ssim,
    worth_of_each,
)
from tokcom.inference import main as infer
from tokcom.modeling_tokcom import TokComModel
from tokcom.pipeline_media_tokcom import TokComImagePipeline
from tokcom.processing_tokcom import TokComImageProcessor
from tokcom.train_accelerate import main as train
from tokcom.training.config import DataConfig, TrainConfig
from tokcom.training.corpora import read_data
from tokcom.training.images import ImageDataset, pad_captions, picture_grid
from tokcom.training.perceptual import FeatureLoss
from tokcom.training.presets import preset_names
from tokcom.training.trainer import Trainer

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
    "attention=sdpa",  # the fastest differs from run to run, and runs are compared
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


def test_a_held_out_caption_that_is_too_long_is_named_before_training(tmp_path):
    held_out = str(ROOT / "sample_data/emoji_validation.parquet")
    records = datasets.load_dataset("parquet", data_files=held_out, split="train").select(range(4))
    records = records.map(lambda record: {"caption": record["caption"] * 40})
    records.to_parquet(tmp_path / "long.parquet")
    data = [f"data.validation={tmp_path / 'long.parquet'}", "stage=codec"]
    with pytest.raises(SystemExit, match="the longest caption has"):
        train(["--preset", "style-tiny", f"output_dir={tmp_path / 'out'}", *SMALL, *data])


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
    shown = ShownModel(str(trained))
    drawn = draw(shown, "a cat", 2, 2.0, 0)
    assert [text for _, text in drawn] == [
        "6 tokens",
        "4 tokens",
        "2 tokens",
        "1 token",
    ]
    assert rebuild(shown, Image.new("RGB", (40, 30)))[0][0].size == (192, 192)
    with pytest.raises(gradio.Error, match="no picture"):
        rebuild(shown, None)


def test_kmeans_writes_a_model_that_gives_codes(trained, tmp_path, capsys):
    convert(["kmeans", str(trained), str(tmp_path / "coded"), "--data", EMOJI, "--num_codes", "8"])
    assert "8 codes of 56 pictures" in capsys.readouterr().out
    pipe = TokComImagePipeline.from_pretrained(tmp_path / "coded")
    codes = pipe.encode(Image.new("RGB", (16, 16))).codes
    assert codes.shape == (1, 6, 1) and codes.max() < 8
    assert pipe.decode(codes).images[0].size == (16, 16)
    with pytest.raises(SystemExit, match="TokComPipeline"):
        convert(["kmeans", str(ROOT), str(tmp_path / "x"), "--data", EMOJI])


def test_without_labels_the_codec_is_measured_alone_and_steps_are_refused(trained, tmp_path):
    arguments = ["--model", str(trained), "--train", EMOJI, "--test", EMOJI, "--limit", "40"]
    arguments += ["--output_dir", str(tmp_path)]
    main(arguments)
    facts = json.loads((tmp_path / "results.json").read_text())
    assert "generation" not in facts and all("distance" not in row for row in facts["rows"])
    with pytest.raises(SystemExit):  # nothing would be drawn
        main([*arguments, "--steps", "1"])


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
    assert len(facts["worth"]) == 6
    assert {row["codec"] for row in facts["rows"]} >= {
        "style",
        "PCA",
        "style, 8 codes",
        "JPEG scan",
    }
    assert all(0 < row["distance"] < 2 for row in facts["rows"] if row["psnr"] is not None)
    assert "distance in features" in (tmp_path / "results/results.md").read_text()
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


def test_the_distance_in_features_of_a_picture_to_itself_is_0_and_grows_with_a_change():
    torch.manual_seed(0)
    classifier, images = Classifier([3]).eval(), torch.rand(5, 3, 32, 32) * 2 - 1
    other = torch.rand(5, 3, 32, 32) * 2 - 1
    distances = [
        feature_distance(classifier, images, images.lerp(other, share)) for share in (0, 0.1, 0.5)
    ]
    assert distances[0].abs().max() < 1e-6
    assert (distances[0] < distances[1]).all() and (distances[1] < distances[2]).all()


def test_what_a_token_is_worth_is_lost_without_it():
    class Codec(torch.nn.Module):
        """Whose picture is the sum of its tokens."""

        def __init__(self):
            super().__init__()
            self.anything = torch.nn.Parameter(torch.zeros(1))  # which has a device

        def decode(self, latents, num_tokens=None):
            return SimpleNamespace(pixel_values=latents.sum(1).view(-1, 3, 2, 2))

    latents = torch.randn(4, 3, 12, generator=torch.Generator().manual_seed(0))
    latents[:, 1] = 0
    images = latents.sum(1).view(-1, 3, 2, 2) + 0.1
    whole = psnr(images - 0.1, images).mean().item()
    lost = worth_of_each(Codec(), latents, images, whole)
    assert abs(lost[1]) < 1e-3 and lost[0] > 1 and lost[2] > 1


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
