"""TokComPipeline: prompt in, text out; also texts from noise, to latents and back, and with gaps.

Read `__call__` first: `tasks_tokcom.py` lays out what the sampler gets, `_finish` makes the text.

All modes are one sampler: new latents with positions, given clean latents with positions.
A model of tokens goes on inside a prompt's last chunk; for one of latents prompts are padded.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image
from transformers.generation.streamers import BaseStreamer

# diffusers copies direct imports only, so every module that this file needs is named here
from .codec_chunk_tokcom import TokComCodecOutput
from .codec_color_tokcom import TokComColorCodec  # noqa: F401
from .codec_composite_tokcom import TokComCompositeCodec  # noqa: F401
from .codec_style_tokcom import TokComStyleCodec  # noqa: F401
from .codec_video_tokcom import TokComVideoCodec  # noqa: F401
from .configuration_codec_tokcom import TokComCodecConfig  # noqa: F401
from .configuration_media_tokcom import TokComMediaCodecConfig  # noqa: F401
from .configuration_tokcom import TokComConfig  # noqa: F401
from .context_tokcom import TokComStep  # noqa: F401
from .heads_tokcom import TokComTokenHead  # noqa: F401
from .integrity_tokcom import check_files  # noqa: F401
from .interface_tokcom import (
    GAP,
    StreamedText,
    StreamerFeed,
    TokComPiece,
    continue_text,
    join_gaps,
    prompt_room,
    split_gaps,
)
from .layers_tokcom import TokComBlock  # noqa: F401
from .modeling_tokcom import TokComModel  # noqa: F401
from .objective_tokcom import objective_class
from .pictures_tokcom import Frames  # noqa: F401
from .pipeline_base_tokcom import CardFacts, StepCallback, TokComBasePipeline
from .processing_tokcom import (
    TokComScore,
    as_prompts,
    decode_rows,
    likeliest,
    prompt_ids,
    read_latents,
    take_new,
    write_latents,
)
from .quantization_tokcom import VectorQuantizer  # noqa: F401
from .sampling_tokcom import (
    Blocks,
    TokComSampling,
    join_blocks,
    kept_tokens,
    spawn_generators,
    until_all_ended,
)
from .scheduling_tokcom import TokComFlowMatchScheduler  # noqa: F401
from .sounds_tokcom import read_sound  # noqa: F401
from .tasks_tokcom import (
    TokComTask,
    check_candidates,
    check_length,
    check_scores,
    check_whole_length,
    context_of_rows,
    continuation_task,
    join_rows,
    latent_gap_task,
    num_latents,
    pad_token_id,
    token_gap_task,
)
from .transformer_tokcom import TokComTransformer  # noqa: F401

LONGEST_CANDIDATE = 8  # tokens of a gap of unknown length
Prompt = str | list[str] | list[dict[str, str]] | list[list[dict[str, str]]]


@dataclass
class TokComPipelineOutput(BaseOutput):
    """Output of every method; fields that do not apply are None.

    Args:
        texts (`list[str]`): of a prompt what follows it (`prompt + text` reads on), or all of it.
        sequences (`torch.LongTensor` of shape `(B, T)`): token ids; what follows EOS is the pad id.
        latents (`torch.FloatTensor` of shape `(B, N, C)`): standardised latents.
        attention_mask (`torch.LongTensor` of shape `(B, T)`): 1 on the ids that belong to the text.
        codes (`torch.LongTensor` of shape `(B, N, R)`): of a codec with a quantiser.
    """

    texts: list[str] | None = None
    sequences: torch.LongTensor | None = None
    latents: torch.FloatTensor | None = None
    attention_mask: torch.LongTensor | None = None
    codes: torch.LongTensor | None = None


class TokComPipeline(TokComBasePipeline):
    """Continue, generate, reconstruct, re-denoise, encode, decode and score texts, and fill gaps.

    For models of texts, and of pixels that stand for tokens. Arguments: see `TokComBasePipeline`.
    """

    modality = "text"
    output_types = ("text", "seq", "latent")

    @property
    def chunk_size(self) -> int:
        return self.model.config.codec_config.chunk_size

    @property
    def max_length(self) -> int:
        """The longest text in tokens that the model sees at once."""
        return self.model.config.transformer_config.max_position_embeddings * self.chunk_size

    def _card_facts(self) -> CardFacts:
        return CardFacts(
            task="text-generation",
            does=f"writes text by denoising vectors that stand for {self.chunk_size} tokens each",
            example='print(pipe("Once upon a time", gen_length=64).texts[0])',
        )

    # ---- continuing prompts ----

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompt,
        gen_length: int = 256,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "text",
        return_dict: bool = True,
        streamer: BaseStreamer | None = None,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        truncation: str | None = None,
    ) -> TokComPipelineOutput | tuple:
        """Continue one or several prompts.

        Args:
            prompt: a text or a list of them, none empty; or dialogues `[{"role", "content"}, ...]`,
                which go through the chat template, or without one become lines.
            gen_length: tokens to generate; a text ends earlier at EOS.
            num_inference_steps: denoising steps per block; by default `config.num_inference_steps`.
            guidance_scale: above 1 strengthens the influence of the prompt at twice the cost.
            temperature, top_p: of token probabilities; by default those of the config.
            generator: one, or one per prompt. A smaller `gen_length` gives the beginning of the
                same text, and a prompt's text depends on its place among the prompts only.
            latents: initial noise `(B, n, C)` of the unfinished chunk and `gen_length` more tokens.
            output_type: `"text"`, `"seq"` (ids only) or `"latent"`.
            streamer: of transformers, for one prompt; with `put_draft` it sees every draft too.
            callback_on_step_end: `f(pipe, step, timestep, {"latents": ...})`; may return new ones.
            truncation: `"left"` leaves out the beginning of a prompt longer than the window.

        Raises `ValueError` for an empty or too long prompt and for arguments out of range.
        """
        self.check_inputs(num_inference_steps, output_type, callback_on_step_end_tensor_inputs)
        self.check_inputs(length=("gen_length", gen_length))
        prompts = as_prompts(self.tokenizer, prompt)
        if streamer is not None and (len(prompts) > 1 or output_type == "latent"):
            found = f"{len(prompts)} prompts and output_type={output_type!r}"
            raise ValueError(f"`streamer` shows text of one prompt; these are {found}.")
        room = prompt_room(self.model, gen_length, truncation)
        rows, is_cut = prompt_ids(self.tokenizer, prompts, *room)
        feed = StreamerFeed(streamer, gen_length, self._eos_token_id)
        callback = self._step_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        skip, blocks = self.continue_ids(  # blocks are denoised as they are read
            rows,
            gen_length,
            TokComSampling(num_inference_steps, guidance_scale, [], temperature, top_p, generator),
            inside=is_cut,
            latents=latents,
            stop=output_type != "latent",  # latents have no EOS
            on_step_end=feed.after_step(callback),
        )
        blocks = feed.blocks(blocks, rows, skip)  # the streamer sees each block before it is joined
        output = self._finish_continuation(prompts, rows, blocks, gen_length, output_type, skip)
        return output if return_dict else output.to_tuple()

    @property
    def _predicts_tokens(self) -> bool:
        """Whether the model can know part of a chunk, not only whole ones."""
        return self.model.token_head is not None

    def encode_prompt(self, prompt: list[str]) -> tuple[TokComCodecOutput | None, list[list[int]]]:
        """Prompts -> clean context latents, None if no prompt fills a chunk, and their ids."""
        rows, _ = prompt_ids(self.tokenizer, prompt, self.max_length)
        return context_of_rows(self.model, rows, self._execution_device), rows

    def continue_ids(
        self,
        rows: list[list[int]],
        gen_length: int,
        sampling: TokComSampling,
        latents: torch.Tensor | None = None,
        noise_scale: float = 1.0,
        stop: bool = False,
        inside: list[bool] | None = None,
        on_step_end: StepCallback | None = None,
    ) -> tuple[list[int], Blocks]:
        """How many tokens of its prompt each row's first blocks repeat, and the blocks of new text.

        `noise_scale` multiplies the noise. With `stop` the blocks end when every row has ended.
        Rows are texts from their start, but for those that begin `inside` one.
        """

        def make_noise(count: int) -> torch.Tensor:
            if latents is None:
                # whole blocks, or the end of a text would depend on where it is cut
                size = self.model.config.transformer_config.block_size or 1
                count = -(-count // size) * size
            return self.prepare_latents(len(rows), count, sampling.generator, latents) * noise_scale

        task, skip = continuation_task(
            self.model, rows, gen_length, make_noise, self._execution_device, inside
        )
        blocks = self.sample_blocks(task, sampling, decode=True, on_step_end=on_step_end)
        if stop:
            blocks = until_all_ended(blocks, self._eos_token_id, skip)
        return skip, blocks

    def _finish_continuation(
        self, prompts, rows, blocks: Blocks, gen_length: int, output_type: str, skip: list[int]
    ) -> TokComPipelineOutput:
        """Run the sampler; of a text only what follows its prompt."""
        empty = torch.empty(len(rows), 0, self.model.config.codec_config.latent_channels)
        latents, ids = join_blocks(blocks, empty.to(self._execution_device))
        # the last block may hold more than was asked for
        latents = latents[:, : num_latents(self.model.config, max(skip) + gen_length)]
        output = self._finish(latents, ids, gen_length, output_type, skip)
        if output.texts is not None:
            lengths = output.attention_mask.sum(-1).tolist()  # tokens up to EOS
            new = [ids[:length] for ids, length in zip(output.sequences.tolist(), lengths)]
            texts = zip(prompts, rows, new)
            output.texts = [continue_text(self.tokenizer, *parts) for parts in texts]
        return output

    def _finish(
        self,
        latents: torch.Tensor,
        ids: torch.Tensor | None,
        gen_length: int,
        output_type: str,
        skip: list[int] | None = None,
    ) -> TokComPipelineOutput:
        """End texts at EOS and pad to `gen_length`; a row's first `skip` ids are its prompt's."""
        self.maybe_free_model_hooks()
        if output_type == "latent":
            return TokComPipelineOutput(latents=latents)
        skip = skip or [0] * len(ids)
        pad = pad_token_id(self.model.config)
        sequences, mask = take_new(ids, gen_length, skip, self._eos_token_id, pad)
        texts = decode_rows(self.tokenizer, sequences, mask) if output_type == "text" else None
        return TokComPipelineOutput(texts, sequences, latents, mask)

    @property
    def _eos_token_id(self) -> int | None:
        return getattr(self.tokenizer, "eos_token_id", None)

    # ---- streaming ----

    @torch.no_grad()
    def stream(
        self,
        prompt: str,
        gen_length: int = 256,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        truncation: str | None = None,
    ) -> Iterator[str]:
        """Continue one prompt and yield pieces of its text, which join to that of `__call__`."""
        if not isinstance(prompt, str):
            raise ValueError(f"`prompt` must be one text, not {prompt!r}; use stream_batch.")
        settings = (num_inference_steps, guidance_scale, temperature, top_p, generator)
        for (piece,) in self.stream_batch([prompt], gen_length, *settings, truncation=truncation):
            if piece.text:
                yield piece.text

    @torch.no_grad()
    def stream_batch(
        self,
        prompts: list[str] | list[list[int]],
        gen_length: int | list[int] = 256,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        should_stop: Callable[[], bool] | None = None,
        truncation: str | None = None,
    ) -> Iterator[list[TokComPiece]]:
        """Continue several prompts at once and yield the pieces of all texts after each block.

        `gen_length` tokens are generated, or as many as it says for each prompt; a text that has
        ended gives empty pieces. With a generator for each prompt, a text does not depend on the
        others, unless the model is bidirectional and the lengths differ. It ends early when
        `should_stop()`, which is asked after every denoising step.
        """
        lengths = [gen_length] * len(prompts) if isinstance(gen_length, int) else list(gen_length)
        if not prompts or len(lengths) != len(prompts):
            raise ValueError(
                f"`gen_length` has {len(lengths)} entries for {len(prompts)} prompts; give each 1."
            )
        self.check_inputs(num_inference_steps, length=("gen_length", min(lengths)))

        def ask_to_stop(pipe, step, timestep, x):
            pipe._interrupt = should_stop()  # read after each step by `sample_blocks`
            return x

        room = prompt_room(self.model, max(lengths), truncation)
        rows, is_cut = prompt_ids(self.tokenizer, prompts, *room)
        skip, blocks = self.continue_ids(
            rows,
            max(lengths),
            TokComSampling(num_inference_steps, guidance_scale, [], temperature, top_p, generator),
            inside=is_cut,
            stop=True,
            on_step_end=None if should_stop is None else ask_to_stop,
        )
        texts = [
            StreamedText(self.tokenizer, prompt, row, length, repeated, self._eos_token_id)
            for prompt, row, length, repeated in zip(list[Any](prompts), rows, lengths, skip)
        ]
        for _, block in blocks:
            if self._interrupt:  # the block may be unfinished
                break
            yield [text.add(ids) for text, ids in zip(texts, block.tolist())]
            if all(text.piece.finish_reason for text in texts):
                break
        self.maybe_free_model_hooks()

    # ---- from noise, and to latents and back ----

    @torch.no_grad()
    def generate(
        self,
        num_chunks: int = 256,
        batch_size: int = 1,
        num_inference_steps: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "text",
    ) -> TokComPipelineOutput:
        """New texts of `num_chunks` chunks from noise; otherwise as `__call__`."""
        self.check_inputs(num_inference_steps, output_type, length=("num_chunks", num_chunks))
        multiple = self.model.config.codec_config.latents_multiple
        if num_chunks % multiple:
            raise ValueError(
                f"`num_chunks` ({num_chunks}) must be a multiple of {multiple}, a row of patches."
            )
        check_length(self.model.config, num_chunks, "`num_chunks` makes a text", "reduce it")
        noise = self.prepare_latents(batch_size, num_chunks, generator, latents)  # (B, N, C)
        sampling = TokComSampling(num_inference_steps, 1.0, [], temperature, top_p, generator)
        decode = output_type != "latent"
        new_latents, ids = self.sample_latents(TokComTask(noise), sampling, decode)
        return self._finish(new_latents, ids, num_chunks * self.chunk_size, output_type)

    @torch.no_grad()
    def encode(
        self, text: str | list[str], output_file: str | os.PathLike | None = None
    ) -> TokComPipelineOutput:
        """Texts -> latents, and with `output_file` a safetensors file of them.

        It also holds `attention_mask`; of a codec with a quantiser `codes` instead of `latents`.
        """
        texts = list(text) if isinstance(text, (list, tuple)) else [text]
        if not texts:
            raise ValueError("`text` is an empty list; give at least one text.")
        ids, mask = self._pad(self._tokenize(texts, "text"), "right")  # chunks count from token 0
        encoded = self.model.encode(ids, mask)
        self.maybe_free_model_hooks()
        if output_file is not None:
            write_latents(output_file, encoded.latents, encoded.codes, mask, self.chunk_size)
        return TokComPipelineOutput(None, ids, encoded.latents, mask, encoded.codes)

    @torch.no_grad()
    def decode(
        self, latents: torch.Tensor | str | os.PathLike, attention_mask: torch.Tensor | None = None
    ) -> TokComPipelineOutput:
        """Latents `(B, N, C)`, integer codes `(B, N, R)`, or a file that `encode` wrote, -> text.

        `attention_mask (B, N * K)` hides padding.
        """
        if not isinstance(latents, (torch.Tensor, str, os.PathLike)):
            raise ValueError(f"`latents` must be a tensor or a file, not {latents!r:.60}.")
        if not isinstance(latents, torch.Tensor):
            latents, attention_mask = read_latents(latents, self.chunk_size)
        latents = self._to_latents(latents)
        sequences = self.model.to_ids(latents)
        self.maybe_free_model_hooks()
        mask = torch.ones_like(sequences) if attention_mask is None else attention_mask  # (B, T)
        if mask.shape != sequences.shape:
            found = tuple(mask.shape)
            needed = tuple(sequences.shape)
            raise ValueError(f"`attention_mask` has shape {found} but {needed} is needed.")
        mask = mask.to(sequences.device)
        texts = decode_rows(self.tokenizer, sequences, mask)
        return TokComPipelineOutput(texts, sequences, latents, mask)

    def reconstruct(self, text: str | list[str]) -> TokComPipelineOutput:
        """Encode and decode: the text as the codec remembers it."""
        encoded = self.encode(text)
        return self.decode(encoded.latents, encoded.attention_mask)

    @torch.no_grad()
    def denoise_reconstruct(
        self,
        text: str | list[str],
        noise_level: float = 0.5,
        num_inference_steps: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> TokComPipelineOutput:
        """Keep a part of what a text says, and let the model make up the rest.

        `noise_level` in [0, 1] is the share that is kept: 0 is noise, 1 plain reconstruction. A
        model that predicts tokens keeps each token with that probability, those of one level at
        every higher one, and draws the others. A model that regresses latents begins at
        `noise_level * latents + (1 - noise_level) * noise` and takes the remaining steps, at least
        one. docs/modes.md says how many tokens survive.
        """
        if not isinstance(noise_level, (int, float)) or not 0.0 <= noise_level <= 1.0:
            raise ValueError(
                f"`noise_level` ({noise_level!r}) must be in [0, 1]: 0 is noise, 1 the clean text."
            )
        self.check_inputs(num_inference_steps)
        encoded = self.encode(text)
        if noise_level == 1.0:
            return self.decode(encoded.latents, encoded.attention_mask)
        check_length(
            self.model.config, encoded.latents.shape[1], "`text` is a text", "give a shorter one"
        )
        sampling = TokComSampling(num_inference_steps, 1.0, [], temperature, top_p, generator)
        if self._predicts_tokens:
            longest = int(encoded.attention_mask.sum(1).max())
            check_whole_length(self.model.config, longest, "`text`")
            return self._redraw_tokens(encoded, noise_level, sampling)
        return self._redraw_latents(encoded, noise_level, sampling)

    def _redraw_latents(
        self, encoded: TokComPipelineOutput, noise_level: float, sampling: TokComSampling
    ) -> TokComPipelineOutput:
        """Texts whose latents are mixed with noise and denoised again."""
        latents = encoded.latents.float()
        noise = self.prepare_latents(latents.shape[0], latents.shape[1], sampling.generator)
        sampler = self._sampler(sampling)
        # as many as a whole run on an even grid takes from this sigma on
        steps = max(1, round(sampler.sampling.num_inference_steps * (1 - noise_level)))
        task = TokComTask(
            sampler.add_noise(latents, noise, noise_level),
            exists=encoded.attention_mask.unflatten(1, (-1, self.chunk_size)).any(-1),  # (B, N)
            sigma_start=1 - noise_level,  # t = `noise_level` here, as published
        )
        sampling = replace(sampling, num_inference_steps=steps)
        result, _ = self.sample_latents(task, sampling, decode=False)
        return self.decode(result, encoded.attention_mask)

    def _redraw_tokens(
        self, encoded: TokComPipelineOutput, noise_level: float, sampling: TokComSampling
    ) -> TokComPipelineOutput:
        """Texts of which each token is kept with probability `noise_level`; others are drawn."""
        sequences = encoded.sequences.clone()
        for row, source in enumerate(spawn_generators(sampling.generator, len(sequences))):
            real = encoded.attention_mask[row].bool()  # (T,)
            ids = encoded.sequences[row, real].tolist()
            kept = kept_tokens(len(ids), noise_level, source)  # shares nest: see there
            filled, _ = self.fill_ids(ids, kept, replace(sampling, generator=[source]))
            sequences[row, real] = torch.tensor(filled[0], device=sequences.device)
        self.maybe_free_model_hooks()
        texts = decode_rows(self.tokenizer, sequences, encoded.attention_mask)
        return TokComPipelineOutput(texts, sequences, None, encoded.attention_mask)

    # ---- gaps ----

    @torch.no_grad()
    def infill(
        self,
        text: str,
        gap_length: int | None = 16,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        num_candidates: int | None = None,
    ) -> TokComPipelineOutput:
        """Fill every gap `____` in `text` with tokens that see what stands before and after it.

        Three or more underscores are one gap. Every gap gets `gap_length` tokens, 1 to 8 if None. Of
        `num_candidates` fillings (by default 16 if None, else 1) the likeliest text is kept; without
        `gap_length` there must be at least 8, one of each length.

        Returns the whole text. Raises `ValueError` without a gap, or for nothing but gaps.
        """
        if not isinstance(text, str):
            raise ValueError(f"`text` must be one text, not {text!r}; call infill for each.")
        lengths = range(1, LONGEST_CANDIDATE + 1) if gap_length is None else [gap_length]
        if num_candidates is None:
            num_candidates = 16 if gap_length is None else 1
        self.check_inputs(None, length=("num_candidates", num_candidates))
        check_candidates(self.model.config, num_candidates, len(lengths))
        sampling = TokComSampling(num_inference_steps, guidance_scale, [], temperature, top_p)
        sources = generator
        if not isinstance(generator, list):
            is_one = num_candidates == 1
            sources = [generator] if is_one else spawn_generators(generator, num_candidates)
        if len(sources) != num_candidates:
            raise ValueError(
                f"`generator` has {len(sources)} entries, not {num_candidates}; give one."
            )
        found = []
        for i, length in enumerate(lengths):
            sampling.generator = sources[i :: len(lengths)]  # candidates take lengths in turn
            found += self._fill_gaps(text, length, sampling)
        self.maybe_free_model_hooks()
        if len(found) == 1:
            return found[0]
        # what is filled may have more tokens than were drawn, once it is read as a text
        rows = self._tokenize([one.texts[0] for one in found], "text")
        fitting = [one for one, row in zip(found, rows) if len(row) <= self.max_length]
        scores = self.score([one.texts[0] for one in fitting]) if fitting else []
        return fitting[likeliest(scores)] if fitting else found[0]

    def _fill_gaps(
        self, text: str, gap_length: int, sampling: TokComSampling
    ) -> list[TokComPipelineOutput]:
        """`text` with its gaps filled, once for each generator."""
        self.check_inputs(sampling.num_inference_steps, length=("gap_length", gap_length))
        known = split_gaps(text)
        if (len(known) > 2 or known[-1].strip()) and self._eos_token_id is not None:
            # a text that goes on has not ended
            sampling = replace(sampling, excluded=self._symbols_of(self._eos_token_id))
        rows = [self._tokenize([piece], "text")[0] if piece.strip(" ") else [] for piece in known]
        fill = self._fill_tokens if self._predicts_tokens else self._fill_latents
        fillings, latents = fill(rows, gap_length, sampling)
        # without anything to generate there are no latents
        new = [None] * len(fillings) if latents is None else latents.split(1)
        texts = [join_gaps(self.tokenizer, text, rows, gaps) for gaps in fillings]
        return [
            TokComPipelineOutput([one], torch.tensor(gaps), part)
            for one, gaps, part in zip(texts, fillings, new)
        ]

    @torch.no_grad()
    def score(self, texts: str | list[str]) -> list[TokComScore]:
        """The exact likelihood of texts under the model, from their first token on.

        Raises `ValueError` for an empty text, one longer than the model sees at once, and for
        models that have no exact probability of a next token (`config.is_causal_lm` is false).
        """
        config = self.model.config
        check_scores(config, "use the loss of `model` as a bound")
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, (list, tuple)) or not texts:
            raise ValueError(f"`texts` ({texts!r}) must be a text, or a list of at least one.")
        rows = self._tokenize(texts, "texts")
        check_whole_length(config, max(len(row) for row in rows), "one of `texts`")
        ids, mask = self._pad(rows, "right")
        objective = objective_class(config, "flow")()  # its defaults: eval mode draws nothing
        was_training = self.model.training
        losses = objective.loss(self.model.eval(), input_ids=ids, attention_mask=mask).token_losses
        self.model.train(was_training)
        self.maybe_free_model_hooks()
        nats = losses.flatten(1).tolist()  # (B, T)
        return [
            TokComScore(sum(row[: len(tokens)]), len(tokens), len(text), row[: len(tokens)])
            for row, tokens, text in zip(nats, rows, texts)
        ]

    def _fill_tokens(
        self, rows: list[list[int]], gap_length: int, sampling: TokComSampling
    ) -> tuple[list[list[list[int]]], torch.Tensor | None]:
        """Ids for the gaps between `rows` of ids, for each of the B generators, and the new latents
        `(B, n, C)`."""
        ids, known, starts = join_rows(rows, gap_length)
        texts, latents = self.fill_ids(ids, known, sampling)
        return [[text[start : start + gap_length] for start in starts] for text in texts], latents

    def _symbols_of(self, token_id: int) -> tuple[int, ...]:
        """The token as something that a sampler can exclude; nothing for models that draw digits,
        or none."""
        head = self.model.token_head
        draws_ids = head is not None and head.num_symbols == self.chunk_size
        return (token_id,) if draws_ids else ()

    def fill_ids(
        self, ids: list[int], known: list[bool], sampling: TokComSampling
    ) -> tuple[list[list[int]], torch.Tensor | None]:
        """Draw the ids of one text that are not `known`, for each of B generators (one, if it is no
        list); for models that predict tokens.

        Chunks of which everything is known are context. The others are generated in reading order,
        given their known tokens. Returns B rows of all ids, and the latents `(B, n, C)` of what was
        generated, None if nothing was.
        """
        sources = sampling.generator
        sampling = replace(sampling, generator=sources if isinstance(sources, list) else [sources])
        if all(known):  # nothing to draw, and a task needs a latent
            return [list(ids) for _ in sampling.generator], None
        task, text = token_gap_task(
            self.model, ids, known, self._noise_maker(sampling), self._execution_device
        )
        latents, drawn = self.sample_latents(task, sampling)
        return text.join(self.model.codec, drawn)[:, : len(ids)].tolist(), latents

    def _noise_maker(self, sampling: TokComSampling) -> Callable[[int], torch.Tensor]:
        """n -> the initial noise `(B, n, C)` of one text, for each of B generators."""
        sources = sampling.generator
        return lambda count: self.prepare_latents(len(sources), count, sources)

    def _fill_latents(
        self, rows: list[list[int]], gap_length: int, sampling: TokComSampling
    ) -> tuple[list[list[list[int]]], torch.Tensor]:
        """The same for a model that regresses latents, whose gaps are whole chunks; of one
        generator."""
        task = latent_gap_task(
            self.model, rows, gap_length, self._noise_maker(sampling), self._execution_device
        )
        latents, drawn = self.sample_latents(task, sampling)
        return [drawn.view(len(rows) - 1, -1)[:, :gap_length].tolist()], latents

    # ---- texts as pictures, for models whose tokens are pixels ----

    def text_to_image(self, text: str, width: int | None = None) -> Image.Image:
        """A text as a picture, one pixel a token. PNG keeps it exactly, JPEG does not."""
        ids = torch.tensor(self._tokenize([text], "text")[0])  # (T,), one pixel each
        return Image.fromarray(self.model.codec.to_image(ids, width).numpy())

    def image_to_text(self, image: Image.Image | str | os.PathLike) -> str:
        """The text of a picture of any size, or of such a file."""
        image = image if isinstance(image, Image.Image) else Image.open(image)
        ids = self.model.codec.from_image(torch.from_numpy(np.array(image.convert("RGB"))))
        return self.tokenizer.decode(ids.tolist(), skip_special_tokens=False)


__all__ = ["GAP", "TokComPiece", "TokComPipeline", "TokComPipelineOutput", "TokComScore"]
