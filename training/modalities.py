"""What training asks about the modality of a model, answered by one class for each.

A new modality is a new class here, and a `Corpus` in `corpora.py` that reads its data.
"""

import torch

from tokcom.pipeline_base_tokcom import TokComBasePipeline
from tokcom.training.config import DataConfig
from tokcom.training.samples import ImageSamples, StreamSamples, TextSamples, VideoSamples

CARD_SAMPLES = 3  # texts of a card, with seeds 0, 1, 2


class Modality:
    """Models of one modality."""

    name: str  # `modality` of the codec's configuration
    reads: str  # the data, in words
    data_kind: str  # what `data.kind` is if nobody says
    samples: type[TextSamples]  # what is shown at each validation

    def remedy(self, data: DataConfig) -> str:
        """How to give such data."""
        return f"give {self.reads}"

    def check_teacher(self, name: str) -> None:
        """Raise `ValueError` if `ModelDenoiser` cannot call such models, to distil model `name`."""

    def card_samples(self, pipe: TokComBasePipeline) -> str:
        """Samples for the model card, in Markdown."""
        return "Samples are in the folder of the run; none was added to this card."


class Texts(Modality):
    name = "text"
    reads = "texts"
    data_kind = "text"
    samples = TextSamples

    def card_samples(self, pipe: TokComBasePipeline) -> str:
        pipe.set_progress_bar_config(disable=True)
        config = pipe.model.config
        row = config.codec_config.latents_multiple
        # 16 chunks, or a window if that is shorter, in whole rows of latents
        chunks = min(16, config.transformer_config.max_position_embeddings)
        chunks = max(row, chunks // row * row)
        lines = []
        for seed in range(CARD_SAMPLES):
            generator = torch.Generator().manual_seed(seed)
            text = pipe.generate(chunks, generator=generator).texts[0]
            lines.append(f"{seed}: {text.strip()!r}")
        shown = "\n".join(lines)
        return (
            f"Not selected: `pipe.generate(...)` with seeds 0 to {CARD_SAMPLES - 1}."
            f"\n\n```text\n{shown}\n```"
        )


class Images(Modality):
    name = "image"
    reads = "pictures"
    data_kind = "pictures"
    samples = ImageSamples

    def remedy(self, data: DataConfig) -> str:
        return f"name the field of the {self.reads} (`data.image_column` {data.image_column!r})"


class Videos(Images):
    name = "video"
    reads = "clips"
    samples = VideoSamples


class Streams(Modality):
    name = "several"
    reads = "several streams"
    data_kind = "records"
    samples = StreamSamples

    def remedy(self, data: DataConfig) -> str:
        return "say which fields hold them: data.fields={text: caption, ...}"

    def check_teacher(self, name: str) -> None:
        raise ValueError(
            f"{name} has several streams, which cannot be distilled; give a model of one."
        )


MODALITIES: dict[str, Modality] = {
    modality.name: modality for modality in (Texts(), Images(), Videos(), Streams())
}
