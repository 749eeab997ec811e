"""TokComPipeline: prompt in, text, pictures or clips out; or any streams in and out.

Notable choices: what is generated is a set of latents with positions, given clean latents with positions, so continuing
a prompt, generating from noise, re-denoising a text and filling gaps are one sampler; a block-causal model denoises
block after block with a key/value cache of what is done; the scheduler sees velocities, so any flow scheduler fits.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from .codec_chunk_tokcom import TokComCodecOutput
from .codec_color_tokcom import TokComColorCodec
from .codec_composite_tokcom import TokComCompositeCodec
from .codec_style_tokcom import TokComStyleCodec
from .codec_video_tokcom import TokComVideoCodec
from .configuration_codec_tokcom import TokComStyleCodecConfig
from .configuration_tokcom import TokComConfig
from .heads_tokcom import TokComLatentHead, TokComTokenHead
from .hub_tokcom import TokComHubMixin
from .layers_tokcom import TokComPreTrainedModel
from .modeling_tokcom import TokComModel
from .objective_tokcom import TokComObjective
from .pipeline_image_tokcom import IMAGE_OUTPUTS, TokComImageMixin
from .pipeline_omni_tokcom import TokComOmniMixin
from .pipeline_text_tokcom import (
    GAP,
    TokComPiece,
    TokComPipelineOutput,
    TokComTextMixin,
    join_blocks,
    vocabulary_size,
    with_pad_token,
)
from .pipeline_video_tokcom import TokComVideoMixin

# diffusers copies only the direct relative imports of this file, so every module of the repository is named here
from .processing_tokcom import TokComAudioProcessor, TokComImageProcessor
from .quantization_tokcom import VectorQuantizer
from .sampling_tokcom import TokComBlockSampler, TokComGaps, TokComGiven, row_noise, spawn_generators, split_blocks
from .scheduling_tokcom import TokComFlowMatchScheduler
from .transformer_tokcom import TokComTransformer


class TokComPipeline(
    TokComHubMixin, TokComTextMixin, TokComImageMixin, TokComVideoMixin, TokComOmniMixin, DiffusionPipeline
):
    """Continue prompts, generate, reconstruct, re-denoise, encode, decode and fill gaps with a TokCom model; with one of
    images or clips, generate pictures or clips for captions, and encode, decode and reconstruct them; with one of several streams,
    make any of them for any others.

    Args:
        model (`TokComModel`), scheduler (`TokComFlowMatchScheduler` or a stock flow scheduler),
        tokenizer (`PreTrainedTokenizerBase`, *optional*): needed for text; ids and latents work without.
        vae (`AutoencoderKL*` of diffusers, *optional*): of models of clips that were trained on its latents.
    """

    model_cpu_offload_seq = "model->vae"
    output_class = TokComPipelineOutput
    _callback_tensor_inputs = ["latents"]
    _optional_components = ["tokenizer", "vae"]
    _local_classes = {"TokComModel": ("transformers", TokComModel)}
    _local_classes["TokComFlowMatchScheduler"] = ("diffusers", TokComFlowMatchScheduler)

    def __init__(
        self,
        model: TokComModel,
        scheduler: SchedulerMixin,
        tokenizer: PreTrainedTokenizerBase | None = None,
        vae: ModelMixin | None = None,
    ):
        super().__init__()
        if tokenizer is not None and vocabulary_size(tokenizer) + 1 != model.config.text_vocab_size:
            raise ValueError(
                f"the tokenizer has {vocabulary_size(tokenizer)} tokens but the model was built for "
                f"{model.config.text_vocab_size - 1}; load the tokenizer saved beside the model."
            )
        tokenizer = None if tokenizer is None else with_pad_token(tokenizer)
        self.register_modules(model=model, scheduler=scheduler, tokenizer=tokenizer, vae=vae)

    @property
    def chunk_size(self) -> int:
        return self.model.config.codec_config.chunk_size

    @property
    def max_length(self) -> int:
        """The longest text in tokens that the model sees at once."""
        return self.model.config.transformer_config.max_position_embeddings * self.chunk_size

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    # ---- the sampler ----

    def check_inputs(self, gen_length, num_inference_steps, output_type, callback_on_step_end_tensor_inputs) -> None:
        if gen_length < 1:
            raise ValueError(f"`gen_length` ({gen_length}) must be at least 1 token.")
        if num_inference_steps is not None and num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` ({num_inference_steps}) must be at least 1.")
        known = ("text", "seq", "latent") if self.model.config.codec_config.has_tokens else IMAGE_OUTPUTS
        if output_type not in known:
            self.require_tokens()
            raise ValueError(f"`output_type` ({output_type!r}) must be one of {known} for this model.")
        self._check_callback_inputs(callback_on_step_end_tensor_inputs)

    def _check_callback_inputs(self, names: list[str]) -> None:
        unknown = set(names) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback inputs {sorted(unknown)} are unknown; known are {self._callback_tensor_inputs}."
            )

    def prepare_latents(
        self,
        batch_size: int,
        num_latents: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Initial noise `(B, n, C)` in float32 with the model's `noise_std`, or the given `latents`, checked.

        The noise of a latent depends on the generator, its row and its place alone, not on how many rows or latents
        there are.
        """
        if batch_size < 1:
            raise ValueError(f"`batch_size` ({batch_size}) must be at least 1.")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"`generator` has {len(generator)} entries but there are {batch_size} texts; give one each."
            )
        shape = (batch_size, num_latents, self.model.config.codec_config.latent_channels)
        if latents is None:
            noise = row_noise(spawn_generators(generator, batch_size), *shape[1:])
            return noise.to(self._execution_device) * self.model.config.noise_std
        if tuple(latents.shape) != shape:
            raise ValueError(f"`latents` has shape {tuple(latents.shape)} but {shape} is needed.")
        return latents.to(device=self._execution_device, dtype=torch.float32)

    def _sample(self, noise: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Clean latents `(B, <= n, C)` and their ids; the arguments are those of `_sample_blocks`."""
        return join_blocks(self._sample_blocks(noise, *args, **kwargs), noise)

    def _sample_blocks(
        self,
        noise: torch.Tensor,
        context: TokComCodecOutput | None = None,
        position_ids: torch.Tensor | None = None,
        valid: torch.Tensor | None = None,
        sigma_start: float = 1.0,
        edges: tuple[int, ...] = (),
        decode: bool = True,
        stop_at_eos: bool = False,
        on_step_end: Callable | None = None,
        prefix: tuple[torch.Tensor, ...] | None = None,
        given: TokComGiven | None = None,
        gaps: TokComGaps | None = None,
        skip: list[int] | None = None,
        **sampling,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Blocks of clean latents `(B, Q, C)` and ids `(B, Q * K)`, with a progress bar; ids may be None unless `decode`,
        and it ends early when every row has ended, if `stop_at_eos`. The first `skip` tokens of each row are its prompt's.

        `sampling` are settings of `TokComBlockSampler`, the other arguments those of its `blocks`.
        """
        sampler = self._sampler(**sampling)
        self._guidance_scale, self._interrupt = sampler.guidance_scale, False
        count = len(split_blocks(noise.shape[1], self.model.config.transformer_config.block_size, edges))
        bar, ended = None, torch.zeros(len(noise), dtype=torch.bool, device=noise.device)
        known = torch.tensor(skip or [0] * len(noise), device=noise.device)[:, None]

        def after_step(block: int, step: int, timestep: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            nonlocal bar
            steps = len(self.scheduler.timesteps)
            self._num_timesteps = steps * count
            bar = bar or self.progress_bar(total=self._num_timesteps)
            bar.update()
            if on_step_end is not None:
                x = on_step_end(self, block * steps + step, timestep, x)
            sampler.interrupt = self._interrupt
            return x

        places = position_ids, valid, sigma_start, edges, after_step, prefix, given, gaps
        done = 0
        for block, ids in sampler.blocks(noise, context, *places):
            ids = self.model.to_ids(block) if ids is None and decode else ids
            yield block, ids
            if decode and stop_at_eos and self._eos_token_id is not None:
                new = torch.arange(done, done + ids.shape[1], device=ids.device) >= known
                ended |= ((ids == self._eos_token_id) & new).any(-1)
                done += ids.shape[1]
                if bool(ended.all()):
                    break
        if bar is not None:
            bar.close()

    def _sampler(self, **sampling) -> TokComBlockSampler:
        """A sampler with these settings; those that are None or missing are the model's own."""
        config = self.model.config
        own = {"num_inference_steps": config.num_inference_steps}
        if config.prediction_type == "tokens":  # no others have probabilities
            own |= {"temperature": config.sampling_temperature, "top_p": config.sampling_top_p}
        sampling = own | {name: value for name, value in sampling.items() if value is not None}
        return TokComBlockSampler(self.model, self.scheduler, **sampling)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | list[dict[str, str]] | list[list[dict[str, str]]] | None = None,
        gen_length: int = 256,
        num_inference_steps: int | None = None,
        guidance_scale: float | dict[str, float] = 1.0,
        temperature: float | None = None,
        top_p: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str | None = None,
        return_dict: bool = True,
        streamer: BaseStreamer | None = None,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        generate: str | list[str] | None = None,
        num_candidates: int = 1,
        **streams,
    ) -> TokComPipelineOutput | tuple:
        """Continue one or several prompts, or with a model of images draw one or several captions; of several streams,
        `pipe(text="a frog", generate=["image"])` makes some for others.

        Args:
            prompt: a text or a list of texts of any lengths; none may be empty. A dialogue, `[{"role", "content"}, ...]`, or
                a list of them goes through the tokenizer's chat template; without one, its turns are lines.
            gen_length: tokens to generate; a text ends earlier at EOS.
            num_inference_steps: denoising steps per block; by default `config.num_inference_steps`.
            guidance_scale: 1 is off; above 1 strengthens the influence of the prompt at twice the cost.
            temperature, top_p: of the token probabilities, for models with `prediction_type="tokens"`; below 1 is safer
                text. By default those of the model's config.
            generator: `torch.Generator` or one per prompt, for reproducible samples: a smaller `gen_length` gives the beginning
                of the same text, and a prompt's text depends on its place among the prompts only.
            latents: initial noise of shape `(B, n, C)`; n latents hold the tokens of the longest unfinished chunk of a prompt
                and `gen_length` more.
            output_type: `"text"`, the default, `"seq"` (ids only) or `"latent"`; of pictures `"pil"`, the default, `"pt"` or
                `"latent"`.
            streamer: a streamer of transformers (`TextStreamer`, `TextIteratorStreamer`); it receives the prompt's ids,
                then those of every finished block. For one prompt; `stream` is the same as an iterator.
            generate, streams: of a model of several streams, which to make, by default all others, and what is given by name.
            num_candidates: of a model of several streams, from how many texts to choose (see `generate_streams`).
            callback_on_step_end: called as `f(pipe, step, timestep, {"latents": ...})`; may return new latents.

        Raises `ValueError` for an empty or too long prompt and for arguments out of range.
        """
        wanted = ["latents"] if callback_on_step_end_tensor_inputs is None else callback_on_step_end_tensor_inputs

        def on_step_end(pipe, index, timestep, x):
            tensors = {"latents": x} if "latents" in wanted else {}
            return callback_on_step_end(pipe, index, timestep, tensors).pop("latents", x)

        if self.model.config.codec_config.modality == "several":
            texts_only = {"temperature": temperature, "top_p": top_p, "streamer": streamer}
            if prompt is not None and "text" in streams or any(value is not None for value in texts_only.values()):
                raise ValueError(
                    "of several streams give `text` or `prompt`, not both, and no `temperature`, `top_p`, `streamer`."
                )
            self._check_callback_inputs(wanted)
            streams = streams if prompt is None else {"text": prompt, **streams}
            settings = {
                "num_inference_steps": num_inference_steps,
                "guidance_scale": guidance_scale,
                "latents": latents,
                "num_candidates": num_candidates,
            }
            settings["on_step_end"] = None if callback_on_step_end is None else on_step_end
            output = self.generate_streams(
                streams, generate, generator=generator, output_type=output_type or "content", **settings
            )
            return output if return_dict else output.to_tuple()
        if streams or generate is not None or num_candidates != 1:
            raise ValueError(
                f"{sorted(streams) or '`generate`, `num_candidates`'}: this model has one stream; give a `prompt` and arguments of this method."
            )
        if prompt is None:
            raise ValueError("`prompt` is missing; give a text, or call generate() to start from noise.")
        if isinstance(guidance_scale, dict):
            raise ValueError(
                f"`guidance_scale` ({guidance_scale}) of several streams: this model has one; give a number."
            )
        images = not self.model.config.codec_config.has_tokens
        output_type = output_type or ("pil" if images else "text")
        self.check_inputs(gen_length, num_inference_steps, output_type, wanted)
        prompts = self._to_prompts(prompt)
        if not prompts:
            raise ValueError("`prompt` is an empty list; give at least one text.")
        if streamer is not None and len(prompts) > 1:
            raise ValueError(f"`streamer` shows one text, but there are {len(prompts)} prompts; call once for each.")
        if streamer is not None and output_type == "latent":
            raise ValueError(
                "`streamer` shows text, which `output_type='latent'` does not make; leave out one of them."
            )

        if images:
            if streamer is not None or temperature not in (None, 1.0) or top_p not in (None, 1.0):
                raise ValueError("`streamer`, `temperature` and `top_p` are of texts; leave them out for pictures.")
            after = None if callback_on_step_end is None else on_step_end
            settings = num_inference_steps, guidance_scale, generator, latents, output_type, after
            if self.model.config.codec_config.modality == "video":
                output = self.generate_videos(
                    prompts, None, None, len(prompts), *settings[:-1], on_step_end=settings[-1]
                )
            else:
                output = self.generate_images(prompts, len(prompts), *settings)
            return output if return_dict else output.to_tuple()
        rows, skip, blocks = self._continue(
            prompts,
            gen_length,
            latents,
            generator,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            temperature=temperature,
            top_p=top_p,
            decode=output_type != "latent",
            stop_at_eos=True,
            on_step_end=None if callback_on_step_end is None else on_step_end,
        )
        if streamer is not None:
            streamer.put(torch.tensor(rows))
            blocks = self._feed(streamer, blocks, gen_length, skip[0])
        nothing = torch.empty(
            len(prompts), 0, self.model.config.codec_config.latent_channels, device=self._execution_device
        )
        output = self._finish(*join_blocks(blocks, nothing), gen_length, output_type, skip)
        if output.texts is not None:
            new = [ids[:kept] for ids, kept in zip(output.sequences.tolist(), output.attention_mask.sum(-1).tolist())]
            output.texts = [self._continue_text(p, row, ids) for p, row, ids in zip(prompts, rows, new)]
        return output if return_dict else output.to_tuple()


__all__ = ["TokComPipeline", "TokComPipelineOutput", "TokComPiece", "GAP"]
