"""Composite codec: several streams, such as a text, a picture and a sound <-> one sequence.

Notable choices:
- Every stream has its own codec, a fixed place in the sequence, and its own channels. One linear
  map into the transformer, and one out of it, therefore act as a different map for each stream.
- The mask of the latents says which streams exist.
- The task of a training row says which of its streams are given, generated or dropped. It is drawn
  from the streams that exist.

Shape legend: B batch, N latents of all streams, S streams, C channels of all streams,
A position axes, M noise draws.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from .codec_chunk_tokcom import (
    TokComChunkCodec,
    TokComCodec,
    TokComCodecOutput,
    TokComDecoderOutput,
)
from .codec_color_tokcom import TokComColorCodec
from .codec_style_tokcom import TokComImageOutput, TokComStyleCodec
from .codec_video_tokcom import TokComVideoCodec, TokComVideoOutput, read_clips
from .configuration_codec_tokcom import TokComCodecConfig
from .configuration_media_tokcom import TokComAudioCodecConfig, TokComCompositeCodecConfig
from .processing_tokcom import (
    TokComAudioProcessor,
    TokComImageProcessor,
    as_clips,
    as_pictures,
    as_sounds,
    text_rows,
    tokenize_texts,
)


@dataclass
class TokComAudioOutput(ModelOutput):
    """What the audio codec's `decode` returns: `input_features (B, mel bands, F)`, log-mel."""

    input_features: torch.FloatTensor | None = None


class TokComAudioCodec(TokComVideoCodec):
    """Patches of log-mel frames as latents: a clip of one pixel whose channels are the bands."""

    config: TokComAudioCodecConfig
    main_input_name = "input_features"

    def to_patches(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Log-mel `(B, mel bands, F)` -> `(B, N, P)`. Raises `ValueError` for other shapes."""
        bands = self.config.num_channels
        if pixel_values.ndim != 3 or pixel_values.shape[1] != bands:
            raise ValueError(
                f"`input_features` has shape {tuple(pixel_values.shape)} but (B, {bands}, F) is "
                "needed; pass sounds through the audio processor."
            )
        return super().to_patches(pixel_values[..., None, None])  # (B, bands, F, 1, 1)

    @staticmethod
    def size_of(pixel_values: torch.Tensor) -> tuple[int, int, int]:
        return pixel_values.shape[2], 1, 1

    def decode(self, latents: torch.Tensor) -> TokComAudioOutput:
        """Standardised latents `(B, N, C)` -> `.input_features (B, mel bands, F)`."""
        return TokComAudioOutput(input_features=super().decode(latents).pixel_values[..., 0, 0])


STREAM_CODECS: dict[str, type[TokComCodec]] = {
    codec.config_class.model_type: codec
    for codec in (
        TokComChunkCodec,
        TokComColorCodec,
        TokComStyleCodec,
        TokComVideoCodec,
        TokComAudioCodec,
    )
}


class TokComCompositeCodec(TokComCodec):
    """Several codecs side by side.

    `streams[name]` is the codec of a stream, `contents[name]` what people hold of it;
    `places[name]` and `channels[name]` are its slices of N and C.
    """

    config: TokComCompositeCodecConfig

    def __init__(self, config: TokComCompositeCodecConfig):
        super().__init__(config)
        configs = config.stream_configs()
        self.lengths = config.stream_lengths()
        self.streams = nn.ModuleDict()
        for name, codec in configs.items():
            self.streams[name] = STREAM_CODECS[codec.model_type]._from_config(codec)
        self.names = list(configs)
        self.places = {}
        self.channels = {}
        place = channel = 0
        # streams lie one after the other, in the sequence and in the channels
        for name, codec in configs.items():
            self.places[name] = slice(place, place + self.lengths[name])
            self.channels[name] = slice(channel, channel + codec.latent_channels)
            place = self.places[name].stop
            channel = self.channels[name].stop
        self.contents = {
            name: CONTENTS[codec.kind](codec, self.lengths[name] * codec.chunk_size)
            for name, codec in configs.items()
        }
        self.text_names = [name for name, codec in configs.items() if codec.text_vocab_size]
        # kept here, since the configuration would compute them anew at every step
        self.num_latents = place
        self.num_channels = channel
        self.num_axes = config.num_position_axes
        self.gradient_checkpointing = False
        self.post_init()

    def set_loss(self, **settings) -> None:
        """Settings of the codecs: stream -> the fields of its codec's `loss_class`."""
        self.check_names(settings)
        for name, codec in self.streams.items():
            codec.set_loss(**settings.get(name, {}))

    def get_input_embeddings(self):
        return None

    # ---- where latents stand ----

    def positions(self, index: torch.Tensor) -> torch.Tensor:
        """Index of latents in the whole sequence `(...)` -> stream and position, `(..., A)`."""
        parts = []
        for i, name in enumerate(self.names):
            own = torch.arange(self.lengths[name], device=index.device)
            where = self.streams[name].positions(own)  # (n, axes of the stream)
            # streams with fewer axes than others have position 0 on the missing ones
            where = F.pad(where, (1, self.num_axes - 1 - where.shape[1]))
            where[:, 0] = i  # the first axis is the stream
            parts.append(where)
        return torch.cat(parts)[index]

    def index_of(self, names: list[str], device: torch.device | str = "cpu") -> torch.Tensor:
        """Index `(n,)` of the latents of the streams `names` in the sequence, in its order."""
        places = []
        for name in self.names:
            if name in names:
                places.append(torch.arange(self.places[name].start, self.places[name].stop))
        return torch.cat(places).to(device)

    def stream_of(self, latents: torch.Tensor, name: str) -> torch.Tensor:
        """The latents `(..., n, c)` of one stream among `(..., N, C)` of all."""
        return latents[..., self.places[name], self.channels[name]]

    def context(self, latents: torch.Tensor, names: list[str]) -> TokComCodecOutput | None:
        """The streams `names` among the latents `(B, N, C)` of all, as context; None for none."""
        if not names:
            return None
        index = self.index_of(names, latents.device)  # (S,)
        part = latents[:, index].to(self.dtype)
        positions = self.positions(index).expand(len(latents), -1, -1)
        return TokComCodecOutput(part, positions, torch.ones_like(part[..., 0], dtype=torch.bool))

    # ---- streams <-> latents ----

    def check_names(self, names) -> None:
        """Raise `ValueError` if a name is not a stream of this model."""
        unknown = set(names) - set(self.names)
        if unknown:
            raise ValueError(
                f"there is no stream {sorted(unknown)}; this model has the streams {self.names}."
            )

    def text_length(self, name: str) -> int:
        """Length in tokens of a text of the stream `name`."""
        return self.lengths[name] * self.streams[name].config.chunk_size

    def token_ids(self, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        self.check_names(inputs)
        return [
            ids for name, value in inputs.items() for ids in self.streams[name].token_ids(value)
        ]

    def _inputs(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """The input of a stream's codec."""
        return self.streams[name].as_stream(value, self.lengths[name])

    def exists(
        self, present: dict[str, torch.Tensor], batch: int, device: torch.device
    ) -> torch.Tensor:
        """Rows `(B,)` that have a stream, by name -> which latents exist, `(B, N)`."""
        mask = torch.zeros(batch, self.num_latents, dtype=torch.bool, device=device)
        for name, rows in present.items():
            mask[:, self.places[name]] = rows.bool()[:, None]
        return mask

    def encode(
        self, streams: dict[str, torch.Tensor], present: dict[str, torch.Tensor] | None = None
    ) -> TokComCodecOutput:
        """Streams by name -> latents `(B, N, C)` of all streams.

        A latent is 0 in the channels of other streams and where its stream is missing.

        Args:
            streams: the input of each stream's codec, all of one batch size.
            present: rows `(B,)` that have a stream, by name; by default all rows.

        Raises `ValueError` for unknown names and sizes that do not fit.
        """
        if not streams:
            raise ValueError(f"`streams` is empty; give some of {self.names}.")
        self.check_names(streams)
        batches = {name: len(value) for name, value in streams.items()}
        if len(set(batches.values())) > 1:
            raise ValueError(f"all streams must have the same batch size, not {batches}.")
        parts = {}
        for name, value in streams.items():
            parts[name] = self.streams[name].encode(self._inputs(name, value))
        for name, part in parts.items():
            found = part.latents.shape[1]
            if found != self.lengths[name]:
                raise ValueError(
                    f"stream {name!r} of shape {tuple(streams[name].shape)} has {found} latents, "
                    f"but the model needs {self.lengths[name]}; give it the size and length that "
                    "the configuration names."
                )
        # dtype and device of all streams are those of the first
        first = next(iter(parts.values())).latents
        latents = first.new_zeros(len(first), self.num_latents, self.num_channels)  # (B, N, C)
        everywhere = torch.ones(len(first), dtype=torch.bool, device=first.device)
        present = {name: (present or {}).get(name, everywhere) for name in streams}
        for name, part in parts.items():
            own = part.latents.to(latents.dtype) * present[name].bool()[:, None, None]
            latents[:, self.places[name], self.channels[name]] = own
        return self.known(latents, self.exists(present, len(first), first.device))

    def decode_stream(
        self, name: str, latents: torch.Tensor
    ) -> TokComDecoderOutput | TokComImageOutput | TokComVideoOutput | TokComAudioOutput:
        """Decode one stream from the latents `(B, N, C)` of all."""
        return self.streams[name].decode(self.stream_of(latents, name))

    # ---- training ----

    def training_loss(
        self, streams: dict[str, torch.Tensor], present: dict[str, torch.Tensor] | None = None
    ):
        """Sum of the losses of all codecs with parameters, and its parts.

        Each codec only sees the rows that have its stream.
        """
        # codecs without parameters have nothing to learn
        trained = {name: codec for name, codec in self.streams.items() if list(codec.parameters())}
        if not set(trained) & set(streams):
            raise ValueError(
                "no stream has a codec with parameters, so there is nothing to train; use "
                "stage='flow'."
            )
        loss = 0.0
        parts = {}
        for name, codec in trained.items():
            inputs = self._inputs(name, streams[name]) if name in streams else ()
            # rows without this stream hold zeros in its place, which must not be learned
            if name in streams and name in (present or {}):
                inputs = inputs[present[name].bool()]
            if len(inputs):
                own, found = codec.training_loss(inputs)
            else:
                # every process must have gradients for the same parameters, and take part in the
                # update of the codebooks
                own = 0.0 * sum(p.sum() for p in codec.parameters())
                found = {}
                if self.training and hasattr(getattr(codec, "quantizer", None), "skip"):
                    codec.quantizer.skip()
            loss = loss + own
            for key, value in found.items():
                parts[key] = parts.get(key, 0.0) + value
        return loss, parts

    def draw_task(
        self, exists: torch.Tensor, dropout: float, rates: dict[str, float] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw a task for every row: which streams are generated, given or dropped.

        Of the streams that exist, at least one is generated, each by its rate. Each other stream is
        given, or dropped with probability `dropout`.

        Args:
            exists (`torch.BoolTensor` of shape `(B, N)`): latents of the streams that a row has.
            rates: how often a stream is generated, by name; 0.5 by default.

        Returns: which latents are given, and which are used at all, both `(B, N)`.
        """
        index = [self.places[name].start for name in self.names]  # one latent tells for its stream
        # a stream exists as a whole or not at all
        has = exists[:, index]  # (B, S)
        shape = (len(exists), len(index))  # (B, S)
        rates = [float((rates or {}).get(name, 0.5)) for name in self.names]
        rates = torch.tensor(rates, device=exists.device)
        draws = torch.rand(len(has), 32, len(index), device=exists.device)  # (B, 32, S)
        subsets = has[:, None] & (draws < rates)
        subsets[:, -1] = has  # the last draw is never empty
        # Rejection sampling: take the first of 32 draws that is not empty. With equal rates all
        # subsets are then equally likely.
        first = subsets.any(-1).float().argmax(-1)
        made = subsets[torch.arange(len(has), device=has.device), first]  # (B, S)
        # a stream that is dropped is neither given nor generated: the model learns to do without
        kept = torch.rand(shape, device=exists.device) >= dropout
        return self.spread(has & ~made & kept), self.spread(made | (has & kept))

    def spread(self, streams: torch.Tensor) -> torch.Tensor:
        """Repeat values of streams `(B, S)` for all of their latents, `(B, N)`."""
        lengths = list(self.lengths.values())
        repeats = torch.tensor(lengths, device=streams.device)
        # told the size, nobody has to read it from the device
        return streams.repeat_interleave(repeats, dim=1, output_size=sum(lengths))

    def squared_error(
        self, errors: torch.Tensor, loss_mask: torch.Tensor, weights: dict[str, float] | None = None
    ) -> torch.Tensor:
        """Weighted sum over streams of the mean squared error; weights are 1 by default.

        The mean is over the stream's latents in `loss_mask (B, N)` and over its own channels of
        `errors (B, M, N, C)`.
        """
        total = errors.new_zeros(())
        for name in self.names:
            counted = loss_mask[:, None, self.places[name]].float()  # (B, 1, n)
            # over the stream's own channels; the others are 0 by construction
            error = self.stream_of(errors, name).square().mean(-1) * counted
            count = (errors.shape[1] * counted.sum()).clamp_min(1)
            total = total + float((weights or {}).get(name, 1.0)) * error.sum() / count
        return total

    def text_nll(
        self,
        estimate: torch.Tensor,
        streams: dict[str, torch.Tensor],
        loss_mask: torch.Tensor,
        weights: dict[str, float] | None = None,
    ) -> torch.Tensor | None:
        """Weighted nats per token of the texts in `streams` given `estimate (B, N, C)`.

        Only latents in `loss_mask (B, N)` count. None if there is no text stream.
        """
        total = None
        for name, value in streams.items():
            nats = self.streams[name].stream_nll(
                self.stream_of(estimate, name), self._inputs(name, value)
            )
            if nats is None:
                continue
            counted = loss_mask[:, self.places[name], None].expand_as(nats)
            # texts that are given, or that a row lacks, are not scored
            nats = nats * counted
            mean = float((weights or {}).get(name, 1.0)) * nats.sum() / counted.sum().clamp_min(1)
            total = mean if total is None else total + mean
        return total


# ---- streams that people hold ----


class TokComContents:
    """What people hold of one stream, in lists <-> what its codec reads and decodes to.

    Args:
        config: of the stream's codec.
        longest: of a text, its length in tokens.
    """

    field: str  # of the output of `TokComOmniPipeline`

    def __init__(self, config: TokComCodecConfig, longest: int):
        self.config = config
        self.longest = longest

    def as_list(self, value: Any, name: str) -> list:
        """One entry of the stream, or a list of them, as a list."""
        return as_pictures(value, name)

    def read(
        self, values: list, name: str, tokenizer: PreTrainedTokenizerBase | None
    ) -> torch.Tensor:
        """Entries as the codec reads them; raises `ValueError` for what does not fit."""
        raise NotImplementedError

    def write(self, output: ModelOutput) -> list:
        """The output of the codec's `decode` as entries."""
        raise NotImplementedError


class TokComTexts(TokComContents):
    field = "texts"

    def as_list(self, value: Any, name: str) -> list:
        return list(value) if isinstance(value, (list, tuple)) else [value]

    def read(
        self, values: list, name: str, tokenizer: PreTrainedTokenizerBase | None
    ) -> torch.Tensor:
        rows = tokenize_texts(tokenizer, values, name)
        length = max(map(len, rows))
        if length > self.longest:
            raise ValueError(
                f"`{name}` has {length} tokens, more than the model's maximum of {self.longest} "
                "(`text_latents`); shorten it."
            )
        return text_rows(rows, self.longest, tokenizer.eos_token_id)


class TokComPictures(TokComContents):
    field = "images"

    def read(self, values: list, name: str, tokenizer: Any) -> torch.Tensor:
        return TokComImageProcessor(self.config.image_size)(values)["pixel_values"]

    def write(self, output: ModelOutput) -> list:
        pixels = output.pixel_values
        pixels = pixels if pixels.ndim == 4 else pixels[:, :, 0]  # a clip of one frame
        return TokComImageProcessor(self.config.image_size).postprocess(pixels)


class TokComClips(TokComContents):
    field = "videos"

    def as_list(self, value: Any, name: str) -> list:
        return as_clips(value, name)

    def read(self, values: list, name: str, tokenizer: Any) -> torch.Tensor:
        return read_clips(values, self.config.image_size, name)

    def write(self, output: ModelOutput) -> list:
        processor = TokComImageProcessor(self.config.image_size)
        return [processor.postprocess(clip.transpose(0, 1)) for clip in output.pixel_values]


class TokComSounds(TokComContents):
    field = "audios"

    def as_list(self, value: Any, name: str) -> list:
        return as_sounds(value)

    def read(self, values: list, name: str, tokenizer: Any) -> torch.Tensor:
        return TokComAudioProcessor(self.config)(values)["input_features"]

    def write(self, output: ModelOutput) -> list:
        return TokComAudioProcessor(self.config).postprocess(output.input_features)


CONTENTS: dict[str, type[TokComContents]] = {
    "text": TokComTexts,
    "image": TokComPictures,
    "video": TokComClips,
    "audio": TokComSounds,
}


def as_lists(
    codec: TokComCompositeCodec, streams: Mapping[str, Any], argument: str
) -> dict[str, list]:
    """Streams as lists of one length; raises `ValueError` if they have none, or not one."""
    if not isinstance(streams, Mapping):
        raise ValueError(
            f"`{argument}` must be a dictionary of {codec.names}, not a {type(streams).__name__}."
        )
    codec.check_names(list(streams))
    contents = {}
    for name, value in streams.items():
        is_empty = isinstance(value, (list, tuple)) and not value
        contents[name] = [] if is_empty else codec.contents[name].as_list(value, name)
    lengths = {name: len(values) for name, values in contents.items()}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise ValueError(
            f"all streams of `{argument}` must have one number of entries above 0, not {lengths}."
        )
    return contents


def names_to_make(
    codec: TokComCompositeCodec,
    generate: str | Sequence[str] | None,
    given: list[str],
    num_candidates: int,
) -> list[str]:
    """The streams to make, in this order; raises `ValueError` for what makes no sense.

    By default all that are not given, texts first: a few latents say what hundreds of others show.
    """
    if generate is None:
        names = [name for name in codec.names if name not in given]
        names.sort(key=lambda name: name not in codec.text_names)
    else:
        names = [generate] if isinstance(generate, str) else list(generate)
    codec.check_names(names)
    if not names or set(names) & set(given) or len(set(names)) < len(names):
        raise ValueError(
            f"`generate` ({names}) must name at least one stream, none twice, and none that is "
            f"given ({sorted(given)})."
        )
    has_text = any(name in codec.text_names for name in names)
    if num_candidates < 1 or (num_candidates > 1 and not has_text):
        raise ValueError(
            f"`num_candidates` ({num_candidates}) must be at least 1, and above 1 needs a text "
            f"among {names} to compare."
        )
    return names


def check_guidance(scale: float | Mapping[str, float], given: list[str], names: list[str]) -> None:
    """Raise `ValueError` for a scale of a stream that nothing is made for.

    Streams are made for those `given`, and for those of `names` before them.
    """
    scales = dict(scale) if isinstance(scale, Mapping) else {"all": float(scale)}
    sources = [*given, *names[:-1]]
    wanted = [name for name, value in scales.items() if value != 1.0]
    unknown = isinstance(scale, Mapping) and set(wanted) - set(sources)
    if wanted and (unknown or not sources):
        raise ValueError(
            f"`guidance_scale` ({scale}) needs streams that others are made for (here {sources}) "
            "to move towards; leave it at 1."
        )


def guidance_omissions(
    codec: TokComCompositeCodec,
    scale: float | Mapping[str, float],
    known: list[str],
    context: TokComCodecOutput | None,
) -> list[tuple[torch.Tensor, float]]:
    """Which context latents, `(S,)`, guidance leaves out in turn, and the scale of each that is not
    1.

    One scale is for all `known` streams together; scales of streams that are not yet known wait.
    """
    if isinstance(scale, Mapping):
        scales = [([name], float(value)) for name, value in scale.items() if name in known]
    else:
        scales = [(known, float(scale))] if known else []
    omissions = []
    for part, value in scales:
        if value == 1.0:
            continue
        streams = context.position_ids[0, :, 0]  # the first axis of a position is its stream
        numbers = torch.tensor([codec.names.index(name) for name in part], device=streams.device)
        omissions.append((torch.isin(streams, numbers), value))
    return omissions


__all__ = [
    "STREAM_CODECS",
    "TokComAudioCodec",
    "TokComAudioOutput",
    "TokComCompositeCodec",
    "TokComImageOutput",
    "TokComVideoOutput",
    "as_lists",
    "check_guidance",
    "guidance_omissions",
    "names_to_make",
]
