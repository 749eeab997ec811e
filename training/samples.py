"""What a run shows of its model at each validation: tables of texts and pictures, one class per
modality.

The names of tables are those of the published training script.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch.utils.data import DataLoader

from tokcom.codec_video_tokcom import decode_clips
from tokcom.pipeline_base_tokcom import TokComBasePipeline
from tokcom.training.images import picture_grid
from tokcom.training.tracking import log_picture, log_table


class TextSamples:
    """Texts, what the codec makes of them, and what is generated from nothing and from a half noisy
    text.

    Args:
        stage (`str`): `"codec"` shows reconstructions; later stages also show what is generated.
        directory (`Path`): pictures are saved there, too.
        count (`int`): texts, or a quarter of the pictures.
    """

    def __init__(self, accelerator: Accelerator, stage: str, directory: Path, count: int):
        self.accelerator = accelerator
        self.stage = stage
        self.directory = directory
        self.count = count

    def log(self, pipe: TokComBasePipeline, loader: DataLoader, step: int) -> None:
        """Show samples of the model in `pipe` beside the validation data of `loader`."""
        # the first batch, so that every validation shows the same texts; 128 tokens fit in a table,
        # and half of a small window leaves room for a text that needs more tokens than it was cut to
        ids = next(iter(loader))["input_ids"][: self.count, : min(128, pipe.max_length // 2)]
        texts = pipe.tokenizer.batch_decode(ids, skip_special_tokens=True)
        texts = [text for text in texts if text.strip()]  # what is left of a row of ends
        if self.stage == "codec":
            if texts:
                self._compare("vae/samples", texts, pipe.reconstruct(texts).texts, step)
            return
        # the same noise at every validation: what changes between tables is the model
        generator = torch.Generator().manual_seed(0)
        config = pipe.model.config
        row = config.codec_config.latents_multiple
        # half of the window, in whole rows of latents
        chunks = max(row, config.transformer_config.max_position_embeddings // 2 // row * row)
        samples = pipe.generate(num_chunks=chunks, batch_size=self.count, generator=generator).texts
        rows = [[i + 1, text] for i, text in enumerate(samples)]
        log_table(self.accelerator, "diffusion/generated", ["Sample", "Generated Text"], rows, step)
        # a diffusion cannot start between noise and text
        if hasattr(pipe.scheduler, "alphas_cumprod") or not texts:
            return
        rebuilt = pipe.denoise_reconstruct(texts, noise_level=0.5, generator=generator).texts
        self._compare("diffusion/reconstructed", texts, rebuilt, step)

    def _compare(self, name: str, texts: list[str], outputs: list[str], step: int) -> None:
        rows = [[i + 1, text, output] for i, (text, output) in enumerate(zip(texts, outputs))]
        log_table(self.accelerator, name, ["Sample", "Original", "Reconstructed"], rows, step)

    def _show(self, name: str, rows: list[list[Image.Image]], step: int) -> None:
        grid = picture_grid(rows, scale=2)
        grid.save(self.directory / f"samples-{step}.png")
        log_picture(self.accelerator, name, grid, step)


class ImageSamples(TextSamples):
    """Originals above their reconstructions, or above what is drawn for their captions."""

    def log(self, pipe: TokComBasePipeline, loader: DataLoader, step: int) -> None:
        # pictures are small, so four times as many as of texts
        batch = {name: value[: 4 * self.count] for name, value in next(iter(loader)).items()}
        captions = None
        if pipe.tokenizer is not None:
            captions = pipe.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
        rows = self._rows(pipe, batch["pixel_values"], captions, torch.Generator().manual_seed(0))
        self._show("vae/samples" if self.stage == "codec" else "diffusion/generated", rows, step)

    def _rows(
        self,
        pipe: TokComBasePipeline,
        pixels: torch.Tensor,
        captions: list[str] | None,
        generator: torch.Generator,
    ) -> list[list[Image.Image]]:
        originals = pipe.image_processor.postprocess(pixels)
        if self.stage == "codec":
            return [originals, pipe.reconstruct(originals).images]
        made = pipe(captions, batch_size=len(originals), generator=generator).images
        return [originals, made]


class VideoSamples(ImageSamples):
    """Clips `(B, c, F, H, W)` as strips, each above what is made of it, of its caption or after its
    first frame."""

    def _rows(self, pipe, pixels, captions, generator):
        clips = pixels[: self.count].to(pipe.model.device)
        frames = clips if pipe.vae is None else decode_clips(pipe.vae, clips)
        # (F, 3, H, W), frames as a batch of pictures
        real = [pipe.image_processor.postprocess(clip.transpose(0, 1)) for clip in frames]
        if self.stage == "codec":
            made = pipe.decode(pipe.model.encode(pixel_values=clips).latents).videos
        elif pipe.model.config.condition_vocab_size:
            made = pipe(captions[: len(clips)], generator=generator).videos
        else:
            # without captions the first frame says what is to be shown
            made = pipe(frames=[strip[:1] for strip in real], generator=generator).videos
        return [row for pair in zip(real, made) for row in pair]


class StreamSamples(TextSamples):
    """What is made of each stream of some records, given alone: texts as a table, pictures as a
    picture."""

    def log(self, pipe: TokComBasePipeline, loader: DataLoader, step: int) -> None:
        if self.stage == "codec":
            return
        dataset = loader.dataset
        contents = [dataset.content(i) for i in range(min(4 * self.count, len(dataset)))]
        generator = torch.Generator().manual_seed(0)
        codec = pipe.model.codec
        texts = codec.text_names
        images = [name for name, held in codec.contents.items() if held.field == "images"]
        table: list[list[Any]] = []
        pictures = []
        for name in codec.names:
            # records may lack a stream
            found = [content for content in contents if name in content]
            others = [other for other in (*texts, *images) if other != name]
            if not found or not others:
                continue
            made = pipe({name: [c[name] for c in found]}, others, generator=generator).streams
            pictures += [made[other] for other in images if other != name]
            for other in [other for other in texts if other != name]:
                for content, text in zip(found, made[other]):
                    table.append([name, content.get(other, ""), text])
        columns = ["Given", "Original", "Generated Text"]
        log_table(self.accelerator, "diffusion/generated", columns, table, step)
        if pictures:
            self._show("diffusion/pictures", pictures, step)
