"""The pipelines of pictures, of clips and of several streams.

Notable choices:
- The sampler is that of texts: captions stand for a prompt, first frames are clean latents.
- Known streams are the context, the one being made is the noise, others are not in the sequence.
- Several streams are made one after the other, each for those before it: denoised together, all
  would begin at the mean of everything, and not agree.
- Guidance moves away from the prediction without captions, frames or given streams.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from diffusers import ModelMixin, SchedulerMixin
from diffusers.utils import BaseOutput
from PIL import Image
from transformers import PreTrainedTokenizerBase

# diffusers copies direct imports only, so every module that this file needs is named here
from .codec_chunk_tokcom import TokComChunkCodec  # noqa: F401
from .codec_color_tokcom import TokComColorCodec  # noqa: F401
from .codec_composite_tokcom import as_lists, check_guidance, guidance_omissions, names_to_make
from .codec_style_tokcom import TokComStyleCodec  # noqa: F401
from .codec_video_tokcom import decode_clips, encode_clips, read_clips
from .configuration_codec_tokcom import TokComCodecConfig  # noqa: F401
from .configuration_media_tokcom import TokComMediaCodecConfig  # noqa: F401
from .configuration_tokcom import TokComTransformerConfig  # noqa: F401
from .context_tokcom import TokComStep  # noqa: F401
from .heads_tokcom import TokComTokenHead  # noqa: F401
from .integrity_tokcom import check_files  # noqa: F401
from .interface_tokcom import most_alike
from .layers_tokcom import TokComBlock  # noqa: F401
from .modeling_tokcom import TokComModel
from .objective_tokcom import TokComObjective  # noqa: F401
from .pictures_tokcom import Frames  # noqa: F401
from .pipeline_base_tokcom import CardFacts, TokComBasePipeline
from .processing_tokcom import TokComImageProcessor, decode_rows, end_at_eos
from .quantization_tokcom import VectorQuantizer  # noqa: F401
from .sampling_tokcom import TokComSampling
from .scheduling_tokcom import TokComFlowMatchSchedulerOutput  # noqa: F401
from .sounds_tokcom import read_sound  # noqa: F401
from .tasks_tokcom import (
    TokComTask,
    check_batch_size,
    check_frames,
    lay_out_clip,
    pad_token_id,
)
from .transformer_tokcom import TokComTransformer  # noqa: F401

Generators: TypeAlias = torch.Generator | list[torch.Generator] | None
Callback = Callable[[Any, int, int, dict], dict] | None


# ---- pictures ----


@dataclass
class TokComImagePipelineOutput(BaseOutput):
    """Output of `TokComImagePipeline`; fields that do not apply are None.

    Args:
        images (`list[PIL.Image.Image]`, or a tensor `(B, 3, H, W)` in [-1, 1]): pictures.
        latents (`torch.FloatTensor` of shape `(B, N, C)`): standardised latents.
        codes (`torch.LongTensor` of shape `(B, N, 1)`): of a codec with a codebook.
    """

    images: list[Image.Image] | torch.FloatTensor | None = None
    latents: torch.FloatTensor | None = None
    codes: torch.LongTensor | None = None


class TokComPixelPipeline(TokComBasePipeline):
    """What the pipelines of pictures and clips share."""

    output_types = ("pil", "pt", "latent")

    @property
    def image_processor(self) -> TokComImageProcessor:
        """Pictures or frames <-> `pixel_values`."""
        return TokComImageProcessor(self.model.config.codec_config.image_size)

    def _save_components(self, directory: Any) -> None:
        super()._save_components(directory)
        self.image_processor.save_pretrained(directory)


class TokComImagePipeline(TokComPixelPipeline):
    """Draw pictures for captions or from nothing; encode them as ordered tokens and decode these.

    Arguments: see `TokComBasePipeline`. `TokComImageProcessor` says in what forms pictures come.
    """

    modality = "image"

    def _card_facts(self) -> CardFacts:
        codec = self.model.config.codec_config
        size = codec.image_size
        with_captions = bool(self.model.config.condition_vocab_size)
        call = 'pipe("a caption")' if with_captions else "pipe()"
        return CardFacts(
            task="text-to-image" if with_captions else "unconditional-image-generation",
            does=f"makes {size}x{size} pictures by denoising {codec.num_tokens} ordered tokens",
            example=f'{call}.images[0].save("picture.png")',
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        batch_size: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> TokComImagePipelineOutput | tuple:
        """New pictures: `batch_size` of them for a caption or none, or one for each of several.

        Args:
            prompt: a caption or a list of them, "" for none; of models trained with captions.
            num_inference_steps: denoising steps; by default `config.num_inference_steps`.
            guidance_scale: 1 is off; above 1 strengthens the caption at twice the cost; by default
                `config.sampling_guidance_scale`.
            generator: `torch.Generator` or one per picture, for reproducible samples.
            latents: initial noise of shape `(B, N, C)`.
            output_type: `"pil"`, `"pt"` (values in [-1, 1]) or `"latent"`.
            callback_on_step_end: `f(pipe, step, timestep, {"latents": ...})`; may return new ones.

        Returns `.images` and `.latents (B, N, C)`. Raises `ValueError` for arguments out of range.
        """
        self.check_inputs(num_inference_steps, output_type, callback_on_step_end_tensor_inputs)
        batch_size, prefix = self._caption_prefix(prompt, batch_size)
        guidance_scale = self._guidance(guidance_scale, prefix is not None, "a `prompt`")
        num_tokens = self.model.config.codec_config.num_tokens
        noise = self.prepare_latents(batch_size, num_tokens, generator, latents)
        sampling = TokComSampling(num_inference_steps, guidance_scale, generator=generator)
        on_step_end = self._step_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        task = TokComTask(noise, prefix=prefix)
        result, _ = self.sample_latents(task, sampling, False, on_step_end)
        output = self._show(result, output_type)
        return output if return_dict else output.to_tuple()

    @torch.no_grad()
    def encode(self, images: Any) -> TokComImagePipelineOutput:
        """Pictures -> `.latents (B, N, C)`, and `.codes (B, N, 1)` of a codec with a codebook."""
        pixel_values = self.image_processor(images)["pixel_values"].to(self._execution_device)
        encoded = self.model.encode(pixel_values=pixel_values)
        self.maybe_free_model_hooks()
        return TokComImagePipelineOutput(latents=encoded.latents, codes=encoded.codes)

    @torch.no_grad()
    def decode(
        self, latents: torch.Tensor, num_tokens: int | None = None, output_type: str = "pil"
    ) -> TokComImagePipelineOutput:
        """Latents `(B, N, C)` or codes `(B, N, 1)` -> `.images`, of the first `num_tokens`."""
        self.check_inputs(output_type=output_type)
        latents = self._to_latents(latents)
        config = self.model.config.codec_config
        if latents.shape[1] != config.num_tokens:
            raise ValueError(
                f"`latents` has shape {tuple(latents.shape)} but {config.num_tokens} tokens are "
                "needed."
            )
        return self._show(latents, output_type, num_tokens)

    def reconstruct(
        self, images: Any, num_tokens: int | None = None, output_type: str = "pil"
    ) -> TokComImagePipelineOutput:
        """Encode and decode: what the first `num_tokens` tokens, by default all, remember."""
        return self.decode(self.encode(images).latents, num_tokens, output_type)

    def _show(
        self, latents: torch.Tensor, output_type: str, num_tokens: int | None = None
    ) -> TokComImagePipelineOutput:
        images = None
        if output_type != "latent":
            images = self.model.decode(latents, num_tokens=num_tokens).pixel_values
            if output_type == "pil":
                images = self.image_processor.postprocess(images)
        self.maybe_free_model_hooks()
        return TokComImagePipelineOutput(images=images, latents=latents)


# ---- clips ----


@dataclass
class TokComVideoPipelineOutput(BaseOutput):
    """Output of `TokComVideoPipeline`; fields that do not apply are None.

    Args:
        videos (`list[list[PIL.Image.Image]]`, or a tensor `(B, 3, F, H, W)` in [-1, 1]): clips.
        latents (`torch.FloatTensor` of shape `(B, N, C)`): standardised latents.
        codes (`torch.LongTensor` of shape `(B, N, R)`): of a codec with a quantiser.
    """

    videos: list[list[Image.Image]] | torch.FloatTensor | None = None
    latents: torch.FloatTensor | None = None
    codes: torch.LongTensor | None = None


class TokComVideoPipeline(TokComPixelPipeline):
    """Make clips for captions, after first frames or from nothing; encode and decode clips.

    A clip is a list of pictures (files, PIL images, arrays, tensors), an animated file, an array
    `(F, H, W, 3)` or a tensor `(3, F, H, W)` in [-1, 1]; several are a list of clips, or one more
    axis in front. A single picture is a clip of one frame.

    Args:
        model, scheduler, tokenizer: see `TokComBasePipeline`.
        vae (`AutoencoderKL*` of diffusers, *optional*): for models trained on its latents.
    """

    modality = "video"
    model_cpu_offload_seq = "model->vae"
    _optional_components = ["tokenizer", "vae"]

    def __init__(
        self,
        model: TokComModel,
        scheduler: SchedulerMixin,
        tokenizer: PreTrainedTokenizerBase | None = None,
        vae: ModelMixin | None = None,
    ):
        super().__init__(model, scheduler, tokenizer)
        self.register_modules(vae=vae)

    def _save_components(self, directory: Any) -> None:
        super()._save_components(directory)
        if self.vae is not None:
            self.vae.save_pretrained(directory / "vae")

    def _card_facts(self) -> CardFacts:
        codec = self.model.config.codec_config
        with_captions = bool(self.model.config.condition_vocab_size)
        call = 'pipe("a caption")' if with_captions else "pipe()"
        size = "x".join(map(str, [*codec.image_size, codec.clip_length]))
        return CardFacts(
            task="text-to-video" if with_captions else "image-to-video",
            does=(
                f"makes clips of {size} pixels and frames by denoising {codec.num_tokens} patches "
                "of space and time"
            ),
            example=(
                f"first, *others = {call}.videos[0]\n"
                'first.save("clip.gif", save_all=True, append_images=others, duration=125, loop=0)'
            ),
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        frames: Any = None,
        num_frames: int | None = None,
        batch_size: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        height: int | None = None,
        width: int | None = None,
        return_dict: bool = True,
        callback_on_step_end: Callback = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> TokComVideoPipelineOutput | tuple:
        """New clips for captions, after first frames that are given, or from nothing.

        Args:
            prompt: a caption or a list of them, "" for none; of models trained with captions.
            frames: the first frames of one or several clips; see the class.
            num_frames: of the whole clip, those given included; by default that of training.
                Block-causal models go on for any length.
            batch_size: number of clips, if neither captions nor frames say how many.
            num_inference_steps: steps, of block-causal models per block; by default the config's.
            guidance_scale: 1 is off; above 1 strengthens caption and first frames at twice the
                cost; by default `config.sampling_guidance_scale`.
            generator: `torch.Generator` or one per clip, for reproducible samples.
            latents: initial noise of shape `(B, n, C)` of the latents to generate.
            output_type: `"pil"`, `"pt"` (values in [-1, 1]) or `"latent"`.
            height, width: pixels, if other than those of training; bidirectional models only.

        Returns `.videos`, a list of pictures for each clip or `(B, 3, F, H, W)`, and
        `.latents (B, N, C)`. Raises `ValueError` for arguments out of range.
        """
        self.check_inputs(num_inference_steps, output_type, callback_on_step_end_tensor_inputs)
        given = None if frames is None else self._read(frames, "frames", height, width)
        if given is not None:
            check_batch_size(batch_size, len(given), "clips")
            check_frames(self.model.config, given)
            batch_size = len(given)
        batch_size, prefix = self._caption_prefix(prompt, batch_size)
        if given is not None and len(given) != batch_size:
            raise ValueError(f"{batch_size} captions for {len(given)} clips; give one for each.")
        follows = prefix is not None or given is not None
        guidance_scale = self._guidance(guidance_scale, follows, "captions or frames")
        size = self._size_of(given, height, width)
        inputs = None if given is None else self._to_codec(given)
        context, position_ids = lay_out_clip(self.model, inputs, num_frames, size)
        noise = self.prepare_latents(batch_size, len(position_ids), generator, latents)
        position_ids = position_ids.expand(batch_size, -1, -1).to(noise.device)
        sampling = TokComSampling(num_inference_steps, guidance_scale, generator=generator)
        on_step_end = self._step_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        task = TokComTask(noise, context, position_ids, prefix=prefix)
        result, _ = self.sample_latents(task, sampling, False, on_step_end)
        if context is not None:
            result = torch.cat((context.latents.float(), result), dim=1)
        output = self._show(result, output_type, size, given)
        return output if return_dict else output.to_tuple()

    def _size_of(
        self, clips: torch.Tensor | None, height: int | None, width: int | None
    ) -> tuple[int, int]:
        """Height and width in pixels: those of clips, those asked for, or those of training."""
        if clips is not None:
            return clips.shape[-2], clips.shape[-1]
        own = self.model.config.codec_config.image_size
        return height or own[0], width or own[1]

    def _to_codec(self, clips: torch.Tensor) -> torch.Tensor:
        """What the codec reads of clips: pixels, or latents of the external autoencoder."""
        self._check_vae()
        if self.vae is None:
            return clips
        return encode_clips(self.vae, clips).to(self._execution_device)

    def _read(
        self, videos: Any, name: str, height: int | None = None, width: int | None = None
    ) -> torch.Tensor:
        image_size = self.model.config.codec_config.image_size
        return read_clips(videos, image_size, name, height, width).to(self._execution_device)

    def _check_vae(self) -> None:
        config = self.model.config.codec_config
        if self.vae is None and (config.num_channels, config.spatial_compression) != (3, 1):
            raise ValueError(
                f"this model makes latents of {config.num_channels} channels for an external "
                "autoencoder; pass it as `vae`."
            )

    @torch.no_grad()
    def encode(self, videos: Any) -> TokComVideoPipelineOutput:
        """Clips -> `.latents (B, N, C)`, and `.codes (B, N, R)` of a codec with a quantiser."""
        encoded = self.model.encode(pixel_values=self._to_codec(self._read(videos, "videos")))
        self.maybe_free_model_hooks()
        return TokComVideoPipelineOutput(latents=encoded.latents, codes=encoded.codes)

    @torch.no_grad()
    def decode(
        self,
        latents: torch.Tensor,
        output_type: str = "pil",
        height: int | None = None,
        width: int | None = None,
    ) -> TokComVideoPipelineOutput:
        """Latents `(B, N, C)` or codes `(B, N, R)` -> `.videos` of this size."""
        self.check_inputs(output_type=output_type)
        size = self._size_of(None, height, width)
        return self._show(self._to_latents(latents), output_type, size)

    @torch.no_grad()
    def reconstruct(self, videos: Any, output_type: str = "pil") -> TokComVideoPipelineOutput:
        """Encode and decode: clips as the codec remembers them."""
        clips = self._read(videos, "videos")
        return self.decode(self.encode(clips).latents, output_type, *clips.shape[-2:])

    def _show(
        self,
        latents: torch.Tensor,
        output_type: str,
        size: tuple[int, int],
        given: torch.Tensor | None = None,
    ) -> TokComVideoPipelineOutput:
        """Latents as clips of `size`, which begin with the frames `given (B, 3, F, H, W)`."""
        self._check_vae()
        videos = None
        if output_type != "latent":
            factor = self.model.config.codec_config.spatial_compression
            if size[0] % factor or size[1] % factor:
                raise ValueError(
                    f"the autoencoder makes clips whose sides are multiples of {factor}, not "
                    f"{size[0]} x {size[1]}; give such a `height` and `width`."
                )
            sides = {"height": size[0] // factor, "width": size[1] // factor}
            videos = self.model.decode(latents, **sides).pixel_values
            if self.vae is not None:
                videos = decode_clips(self.vae, videos)
            if given is not None:
                videos[:, :, : given.shape[2]] = given
            if output_type == "pil":
                videos = [self.image_processor.postprocess(clip.transpose(0, 1)) for clip in videos]
        self.maybe_free_model_hooks()
        return TokComVideoPipelineOutput(videos=videos, latents=latents)


# ---- several streams ----


@dataclass
class TokComOmniPipelineOutput(BaseOutput):
    """Output of `TokComOmniPipeline`.

    Args:
        streams (`dict[str, list]`): texts, pictures, clips and sounds by the name of their stream.
        latents (`torch.FloatTensor` of shape `(B, N, C)`): of all streams, 0 where one is absent.
        texts, images, videos, audios (`list`): the first stream of each kind, or None.
    """

    streams: dict[str, list] | None = None
    latents: torch.FloatTensor | None = None
    texts: list[str] | None = None
    images: list[Image.Image] | None = None
    videos: list[list[Image.Image]] | None = None
    audios: list[np.ndarray] | None = None


class TokComOmniPipeline(TokComBasePipeline):
    """Make any streams for any others. Arguments: see `TokComBasePipeline`.

    Streams are a dictionary: name -> a text, a picture, a clip or a sound (an array at the codec's
    rate, or a .wav file), or a list of them of one length.
    """

    modality = "several"
    output_types = ("content", "latent")

    def _card_facts(self) -> CardFacts:
        codec = self.model.config.codec_config
        kinds = {name: stream.kind for name, stream in codec.stream_configs().items()}
        first, *others = sorted(kinds, key=lambda name: kinds[name] != "text")
        given = f'{{"{first}": "a word"}}, ' if kinds[first] == "text" and others else ""
        return CardFacts(
            task="any-to-any",
            does=(
                f"generates any of the streams {', '.join(kinds)} from the others by denoising "
                f"{codec.num_tokens} latents"
            ),
            example=f'print(pipe({given}generate="{(others or [first])[0]}").streams)',
        )

    @property
    def sampling_rates(self) -> dict[str, int]:
        """Samples a second of every stream of sounds."""
        codecs = self.model.config.codec_config.stream_configs().items()
        return {name: codec.sampling_rate for name, codec in codecs if codec.kind == "audio"}

    @torch.no_grad()
    def __call__(
        self,
        given: Mapping[str, Any] | None = None,
        generate: str | Sequence[str] | None = None,
        batch_size: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | Mapping[str, float] | None = None,
        num_candidates: int = 1,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        output_type: str = "content",
        return_dict: bool = True,
        callback_on_step_end: Callback = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> TokComOmniPipelineOutput | tuple:
        """Streams for others, or from nothing: `pipe({"text": "a frog"}, generate="image")`.

        Args:
            given: streams; see the class.
            generate: names of the streams to make, in this order: each is made for those given and
                for those made before it. By default all that are not given, texts first.
            batch_size: how many, if nothing is given.
            guidance_scale: 1 is off; above 1 strengthens what a stream is made for, at twice the
                cost; or a dictionary of a scale for each of these, at one more evaluation for each;
                by default `config.sampling_guidance_scale`.
            num_candidates: above 1, so many are made for each, and the one is kept whose texts the
                others resemble most: better guesses, less variety, at so many times the cost.
            latents: initial noise `(B * num_candidates, n, C)` of the latents to generate.

        Returns `.streams` by name, unless `output_type` is `"latent"`, and `.latents (B, N, C)`.
        """
        self.check_inputs(num_inference_steps, output_type, callback_on_step_end_tensor_inputs)
        codec = self.model.codec
        contents = as_lists(codec, {} if given is None else given, "given")
        names = names_to_make(codec, generate, list(contents), num_candidates)
        # a stream is made for those given and for those made before it
        guidance_scale = self._guidance(guidance_scale, bool(contents) or len(names) > 1)
        check_guidance(guidance_scale, list(contents), names)
        for values in contents.values():
            check_batch_size(batch_size, len(values), "of each given stream")
        batch_size = len(next(iter(contents.values()), range(batch_size)))
        whole = self._read_given(contents, batch_size, num_candidates)
        index = codec.index_of(names, self._execution_device)
        whole[:, index] = self.prepare_latents(len(whole), len(index), generator, latents).float()
        on_step_end = self._step_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        eos = getattr(self.tokenizer, "eos_token_id", None)
        seen = whole.clone()  # as later streams see them
        known = list(contents)
        for name in names:
            own = codec.index_of([name], whole.device)  # (n,)
            positions = codec.positions(own).expand(len(whole), -1, -1)
            context = codec.context(seen, known)
            task = TokComTask(whole[:, own], context, positions)
            omissions = guidance_omissions(codec, guidance_scale, known, context)
            sampling = TokComSampling(num_inference_steps, 1.0, omissions, generator=generator)
            result, _ = self.sample_latents(task, sampling, False, on_step_end)
            whole[:, own] = result.to(whole.dtype)
            seen[:, own] = codec.read_back(name, whole, eos)[:, own]
            known.append(name)
            if self._interrupt:
                break  # streams that were not begun stay noise
        if num_candidates > 1:
            whole = self._choose(whole, names, num_candidates)
        output = self._collect(whole, contents, names, output_type)
        return output if return_dict else output.to_tuple()

    @torch.no_grad()
    def encode(self, streams: Mapping[str, Any]) -> TokComOmniPipelineOutput:
        """Streams -> `.latents (B, N, C)` of all, 0 where a stream is absent."""
        contents = as_lists(self.model.codec, streams, "streams")
        if not contents:
            raise ValueError(f"`streams` is empty; give some of {self.model.codec.names}.")
        latents = self._read_given(contents, 0)
        self.maybe_free_model_hooks()
        return TokComOmniPipelineOutput(latents=latents)

    @torch.no_grad()
    def decode(
        self, latents: torch.Tensor, names: Sequence[str] | None = None
    ) -> TokComOmniPipelineOutput:
        """Latents `(B, N, C)` of all streams -> `.streams`, of those with `names` if given."""
        names = self.model.codec.names if names is None else list(names)
        self.model.codec.check_names(names)
        return self._collect(self._to_latents(latents), {}, names, "content")

    def reconstruct(self, streams: Mapping[str, Any]) -> TokComOmniPipelineOutput:
        """Encode and decode: streams as their codecs remember them."""
        return self.decode(self.encode(streams).latents, list(streams))

    # ---- content <-> latents ----

    def _read_given(
        self, contents: dict[str, list], batch_size: int, copies: int = 1
    ) -> torch.Tensor:
        """Latents `(B, N, C)` of the given streams, 0 elsewhere; each row `copies` times."""
        codec = self.model.codec
        device = self._execution_device
        if not contents:
            rows = batch_size * copies
            return torch.zeros(rows, codec.num_latents, codec.num_channels, device=device)
        streams = {
            name: codec.contents[name].read(values, name, self.tokenizer).to(device)
            for name, values in contents.items()
        }
        return self.model.encode(streams=streams).latents.repeat_interleave(copies, 0).float()

    def _stream_ids(self, name: str, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids of a stream of texts in latents `(B, N, C)`, and a mask until their end."""
        codec = self.model.codec
        ids = codec.streams[name].to_ids(codec.stream_of(latents, name))
        eos = getattr(self.tokenizer, "eos_token_id", None)
        return end_at_eos(ids, eos, pad_token_id(self.model.config))

    def _write_stream(self, name: str, latents: torch.Tensor) -> list:
        """What one stream of the latents `(B, N, C)` holds: texts, pictures, clips or sounds."""
        if name not in self.model.codec.text_names:
            return self.model.codec.contents[name].write(self.model.decode_stream(name, latents))
        ids, mask = self._stream_ids(name, latents)
        return ids.tolist() if self.tokenizer is None else decode_rows(self.tokenizer, ids, mask)

    def _choose(self, latents: torch.Tensor, names: list[str], num_candidates: int) -> torch.Tensor:
        """Of every `num_candidates` rows `(B, N, C)` the one whose texts resemble the others."""
        rows: list[list[tuple[str, int]]] = [[] for _ in latents]
        for name in [name for name in self.model.codec.text_names if name in names]:
            ids, mask = self._stream_ids(name, latents)
            for row, values, kept in zip(rows, ids.tolist(), mask.tolist()):
                row += [(name, value) for value, keep in zip(values, kept) if keep]
        starts = range(0, len(rows), num_candidates)
        best = [start + most_alike(rows[start : start + num_candidates]) for start in starts]
        return latents[best]

    def _collect(
        self, latents: torch.Tensor, given: dict[str, list], names: list[str], output_type: str
    ) -> TokComOmniPipelineOutput:
        """The output: the `given` streams as they are, others with `names` from their latents."""
        streams = None
        first_of_kind: dict[str, list] = {}
        if output_type == "content":
            made = given | {name: self._write_stream(name, latents) for name in names}
            streams = {name: made[name] for name in self.model.codec.names if name in made}
            for name, content in streams.items():
                first_of_kind.setdefault(self.model.codec.contents[name].field, content)
        self.maybe_free_model_hooks()
        return TokComOmniPipelineOutput(streams=streams, latents=latents, **first_of_kind)


__all__ = [
    "TokComImagePipeline",
    "TokComImagePipelineOutput",
    "TokComOmniPipeline",
    "TokComOmniPipelineOutput",
    "TokComVideoPipeline",
    "TokComVideoPipelineOutput",
]
