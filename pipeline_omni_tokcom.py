"""What TokComPipeline does with several streams: any of them given, any of them generated.

Notable choices: what is given is the clean context of the one sampler, what is generated its noise, and a stream that is neither is not
in the sequence at all; guidance moves away from the estimate without a given stream, for each of them by a scale of its own; of
several candidates the text that the others resemble most is kept (minimum Bayes risk), the best guess rather than one of them.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from .codec_chunk_tokcom import TokComCodecOutput
from .codec_composite_tokcom import TokComCompositeCodec
from .processing_tokcom import TokComAudioProcessor, TokComImageProcessor

STREAM_OUTPUTS = ("content", "latent")
FIELDS = {"text": "texts", "image": "images", "video": "videos", "audio": "audios"}  # of the output


def text_rows(rows: list[list[int]], length: int, eos_token_id: int) -> torch.Tensor:
    """Ids of texts that end by EOS, filled up with it: `(B, length)`; what does not fit is cut."""
    return torch.tensor([[*row[:length], *[eos_token_id] * (length - len(row))] for row in rows])


def most_alike(rows: Sequence[Sequence]) -> int:
    """Index of the row whose F1 of tokens with all rows is highest: the text of minimum Bayes risk, chosen as in
    DiffuSeq (https://arxiv.org/abs/2210.08933)."""
    counts = [Counter(row) for row in rows]

    def agreement(a: Counter) -> float:
        return sum((a & b).total() / (a.total() + b.total()) if a or b else 0.5 for b in counts)

    return max(range(len(rows)), key=lambda i: agreement(counts[i]))


class TokComOmniMixin:
    """The methods of `TokComPipeline` for models of several streams."""

    def _composite_codec(self) -> TokComCompositeCodec:
        return self._require_modality("several")

    @property
    def sampling_rates(self) -> dict[str, int]:
        """Samples a second of every stream of sounds."""
        codecs = self._composite_codec().config.stream_configs().items()
        return {name: codec.sampling_rate for name, codec in codecs if codec.kind == "audio"}

    # ---- content <-> what the codecs read ----

    def _read_stream(self, name: str, values: list) -> torch.Tensor:
        codec = self._composite_codec().streams[name].config
        if codec.has_tokens:
            rows = self._tokenize(values, name)
            length, longest = max(map(len, rows)), self._composite_codec().text_length(name)
            if length > longest:
                raise ValueError(
                    f"`{name}` has {length} tokens, more than the model's maximum of {longest} (`text_latents`); shorten it."
                )
            inputs = text_rows(rows, longest, self.tokenizer.eos_token_id)
        elif codec.kind == "audio":
            inputs = TokComAudioProcessor(codec)(values)["input_features"]
        elif codec.kind == "video":
            processor = TokComImageProcessor(codec.image_size)
            inputs = torch.stack([processor(list(clip))["pixel_values"].transpose(0, 1) for clip in values])
        else:
            inputs = TokComImageProcessor(codec.image_size)(values)["pixel_values"]
        return inputs.to(self._execution_device)

    def _stream_ids(self, name: str, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids of a stream of texts of latents `(B, N, C)` of all, which end at EOS, and the mask of what is kept."""
        codec = self._composite_codec()
        return self._end_at_eos(codec.streams[name].to_ids(codec.stream_of(latents, name)))

    def _write_stream(self, name: str, latents: torch.Tensor) -> list:
        """The content of a stream of latents `(B, N, C)` of all: texts, pictures, clips or sounds."""
        codec = self._composite_codec()
        kind = codec.streams[name].config.kind
        if kind == "text":
            sequences, mask = self._stream_ids(name, latents)
            texts = self._to_texts(sequences, mask)
            return sequences.tolist() if texts is None else texts
        output = self.model.decode_stream(name, latents)
        if kind == "audio":
            return TokComAudioProcessor(codec.streams[name].config).postprocess(output.input_features)
        processor = TokComImageProcessor(codec.streams[name].config.image_size)
        pixels = output.pixel_values
        if kind == "video":
            return [processor.postprocess(clip.transpose(0, 1)) for clip in pixels]
        return processor.postprocess(pixels if pixels.ndim == 4 else pixels[:, :, 0])

    @staticmethod
    def _as_list(kind: str, value: Any) -> list:
        """One text, picture, clip or sound, or a list of them, as a list."""
        if kind == "video":
            frame = value[0] if isinstance(value, (list, tuple)) and value else None
            one = isinstance(frame, Image.Image) or getattr(frame, "ndim", 0) in (2, 3)
        elif kind == "audio":  # a sound may be a list of numbers
            one = (
                not isinstance(value, (list, tuple))
                or bool(value)
                and np.isscalar(value[0])
                and not isinstance(value[0], str)
            )
        else:
            one = not isinstance(value, (list, tuple))
        return [value] if one else list(value)

    def _as_lists(self, codec: TokComCompositeCodec, given: Mapping[str, Any]) -> dict[str, list]:
        """What is given as lists of one length; raises `ValueError` if they have none, or not one."""
        given = {name: self._as_list(codec.streams[name].config.kind, value) for name, value in given.items()}
        lengths = {name: len(values) for name, values in given.items()}
        if len(set(lengths.values())) > 1 or 0 in lengths.values():
            raise ValueError(f"what is given must be of one number above 0, not {lengths}.")
        return given

    @torch.no_grad()
    def reconstruct_streams(self, given: Mapping[str, Any]):
        """Encode and decode: what is given, as in `generate_streams`, comes back as its codecs remember it."""
        codec = self._composite_codec()
        codec.check_names(list(given))
        if not given:
            raise ValueError(f"`given` ({given!r}) must have at least one of the streams {codec.names}.")
        latents = self._given_context(codec, self._as_lists(codec, given), 0)[1]
        return self._collect(latents, {}, list(given), "content")

    # ---- generating ----

    @torch.no_grad()
    def generate_streams(
        self,
        given: Mapping[str, Any] | None = None,
        generate: str | Sequence[str] | None = None,
        batch_size: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | Mapping[str, float] = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "content",
        num_candidates: int = 1,
        on_step_end=None,
    ):
        """Some streams for others that are given, or from nothing.

        Args:
            given: name of a stream -> a text, picture, list of frames or sound (an array at the codec's rate, or a .wav file), or a
                list of them; all lists have one length.
            generate: names of the streams to make; by default all that are not given.
            batch_size: how many, if nothing is given.
            guidance_scale: 1 is off; above 1 strengthens what is given at twice the cost. A dictionary names a scale for each given
                stream, at the cost of one more evaluation for each that is not 1.
            latents: initial noise of shape `(B, n, C)` of the latents to generate, `B` as many as the results x `num_candidates`.
            output_type: `"content"` or `"latent"`.
            num_candidates: above 1, so many are made for each, and the one is kept whose texts the others resemble most: better
                guesses, less variety, at so many times the cost.

        Returns `.streams`, a list for each name, those given as they are; the first stream of each kind also as `.texts`, `.images`,
        `.videos`, `.audios`; and `.latents (B, N, C)`, 0 where a stream is absent. Raises `ValueError` for arguments out of range.
        """
        codec, given = self._composite_codec(), dict(given or {})
        names = [generate] if isinstance(generate, str) else generate
        names = [name for name in codec.names if name not in given] if names is None else list(names)
        codec.check_names([*given, *names])
        if not names or set(names) & set(given):
            raise ValueError(
                f"`generate` ({names}) must name at least one stream, and none that is given ({sorted(given)})."
            )
        if num_inference_steps is not None and num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` ({num_inference_steps}) must be at least 1.")
        texts = [name for name in names if codec.streams[name].config.has_tokens]
        if num_candidates < 1 or num_candidates > 1 and not texts:
            raise ValueError(
                f"`num_candidates` ({num_candidates}) must be at least 1, and above 1 needs a text among {names} to compare."
            )
        if output_type not in STREAM_OUTPUTS:
            raise ValueError(f"`output_type` ({output_type!r}) must be one of {STREAM_OUTPUTS} for this model.")
        given = self._as_lists(codec, given)
        batch_size = len(next(iter(given.values()), range(batch_size)))
        context, whole = self._given_context(codec, given, batch_size, num_candidates)
        batch_size = len(whole)
        scales = self._guidance_scales(guidance_scale, list(given))
        omissions = []
        if context is not None:
            streams = context.position_ids[0, :, 0]
            omissions = [(self._part(streams, codec.names, part), scale) for part, scale in scales]
        index = codec.index_of(names, self._execution_device)
        noise = self.prepare_latents(batch_size, len(index), generator, latents)
        positions = codec.positions(index).expand(batch_size, -1, -1)
        settings = {"num_inference_steps": num_inference_steps, "omissions": omissions, "decode": False}
        result, _ = self._sample(noise, context, positions, generator=generator, on_step_end=on_step_end, **settings)
        whole[:, index] = result.to(whole.dtype)
        if num_candidates > 1:
            whole = self._choose(whole, texts, num_candidates)
        return self._collect(whole, given, names, output_type)

    def _choose(self, latents: torch.Tensor, names: list[str], num_candidates: int) -> torch.Tensor:
        """Of every `num_candidates` rows of latents `(B, N, C)` the one whose texts `names` the others resemble most."""
        rows = [[] for _ in latents]
        for name in names:
            ids, mask = self._stream_ids(name, latents)
            for row, values, kept in zip(rows, ids.tolist(), mask.tolist()):
                row += [(name, value) for value, keep in zip(values, kept) if keep]
        starts = range(0, len(rows), num_candidates)
        return latents[[start + most_alike(rows[start : start + num_candidates]) for start in starts]]

    def _given_context(self, codec, given, batch_size, copies=1) -> tuple[TokComCodecOutput | None, torch.Tensor]:
        """The latents of what is given alone, and those of all streams `(B, N, C)`, 0 where nothing is given; each row `copies`
        times."""
        if not given:
            shape = batch_size * copies, codec.num_latents, codec.num_channels
            return None, torch.zeros(shape, device=self._execution_device)
        encoded = self.model.encode(streams={name: self._read_stream(name, values) for name, values in given.items()})
        index = codec.index_of(list(given), encoded.latents.device)
        latents, positions, mask = (
            x.repeat_interleave(copies, 0) for x in (encoded.latents, encoded.position_ids, encoded.mask)
        )
        return TokComCodecOutput(latents[:, index], positions[:, index], mask[:, index]), latents.float()

    @staticmethod
    def _part(streams: torch.Tensor, names: list[str], part: list[str]) -> torch.Tensor:
        """Which of the context latents of `streams (n,)` belong to `part`."""
        return torch.isin(streams, torch.tensor([names.index(name) for name in part], device=streams.device))

    @staticmethod
    def _guidance_scales(scale: float | Mapping[str, float], given: list[str]) -> list[tuple[list[str], float]]:
        """Parts of what is given, and the scale of each that is not 1."""
        if not isinstance(scale, Mapping):
            scales = [(given, float(scale))]
        else:
            scales = [([name], float(value)) for name, value in scale.items()]
        scales = [(part, value) for part, value in scales if value != 1.0]
        unknown = {name for part, _ in scales for name in part} - set(given)
        if unknown or (scales and not given):
            raise ValueError(
                f"`guidance_scale` ({scale}) needs streams that are given (here {given}) to move towards; leave it at 1."
            )
        return scales

    def _collect(self, latents: torch.Tensor, given: dict, names: list[str], output_type: str):
        codec, streams, fields = self._composite_codec(), None, {}
        if output_type == "content":
            made = {name: self._write_stream(name, latents) for name in names}
            streams = {name: given.get(name) or made[name] for name in codec.names if name in given or name in made}
            for name, content in streams.items():
                fields.setdefault(FIELDS[codec.streams[name].config.kind], content)
        self.maybe_free_model_hooks()
        return self.output_class(streams=streams, latents=latents, **fields)


__all__ = ["TokComOmniMixin", "most_alike", "text_rows"]
