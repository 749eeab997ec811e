"""TokComPipeline: prompt in, text out; also texts from noise, latents of texts and back, texts with gaps, texts as pixels.

Read `TokComPipeline.__call__` first: `continue_ids` lays out what the sampler gets, `_finish` makes text of what it gives.

Notable choices: what is generated is a set of latents with positions, given clean latents with positions, so all modes are one
sampler; a model that predicts tokens goes on inside the last chunk of a prompt, and one that regresses latents gets prompts
padded on the left to whole chunks; new ids are decoded together with those before them, so pieces of a stream join to the text.
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image
from transformers.generation.streamers import BaseStreamer

# diffusers copies only the direct relative imports of this file, so every module that it needs is named here
from .codec_chunk_tokcom import TokComCodecOutput
from .codec_color_tokcom import TokComColorCodec
from .codec_composite_tokcom import TokComCompositeCodec  # noqa: F401
from .codec_style_tokcom import TokComStyleCodec  # noqa: F401
from .codec_video_tokcom import TokComVideoCodec  # noqa: F401
from .configuration_codec_tokcom import TokComCodecConfig  # noqa: F401
from .configuration_tokcom import TokComConfig  # noqa: F401
from .context_tokcom import TokComGiven, TokComTask, latent_gap_task, prompt_context, token_gap_task
from .heads_tokcom import TokComTokenHead  # noqa: F401
from .integrity_tokcom import check_files  # noqa: F401
from .layers_tokcom import TokComBlock  # noqa: F401
from .modeling_tokcom import TokComModel  # noqa: F401
from .objective_tokcom import objective_class
from .pipeline_base_tokcom import CardFacts, StepCallback, TokComBasePipeline
from .processing_tokcom import (
    StreamedText,
    TokComPiece,
    as_prompts,
    continue_text,
    decode_rows,
    pad_ids,
    prompt_ids,
    read_latents,
    take_new,
    write_latents,
)
from .quantization_tokcom import VectorQuantizer  # noqa: F401
from .sampling_tokcom import (
    Blocks,
    TokComSampling,
    feed_streamer,
    join_blocks,
    kept_tokens,
    spawn_generators,
    until_all_ended,
)
from .scheduling_tokcom import TokComFlowMatchScheduler  # noqa: F401
from .sounds_tokcom import read_sound  # noqa: F401
from .transformer_tokcom import TokComTransformer  # noqa: F401

GAP = "____"
LONGEST_CANDIDATE = 8  # tokens of a gap of unknown length
Prompt = str | list[str] | list[dict[str, str]] | list[list[dict[str, str]]]


@dataclass
class TokComPipelineOutput(BaseOutput):
    """Output of every method; fields that do not apply are None.

    Args:
        texts (`list[str]`): for a prompt, its continuation (`prompt + text` reads on); else the whole text.
        sequences (`torch.LongTensor` of shape `(B, T)`): token ids; what follows EOS is the pad id.
        latents (`torch.FloatTensor` of shape `(B, N, C)`): standardised latents.
        attention_mask (`torch.LongTensor` of shape `(B, T)`): 1 on the ids that belong to the text.
        codes (`torch.LongTensor` of shape `(B, N, R)`): what stores the latents of a codec with a quantiser.
    """

    texts: list[str] | None = None
    sequences: torch.LongTensor | None = None
    latents: torch.FloatTensor | None = None
    attention_mask: torch.LongTensor | None = None
    codes: torch.LongTensor | None = None


class TokComScore(NamedTuple):
    """The likelihood of a text: its `nats` in all, and of each of its tokens; how many tokens and characters it has."""

    nats: float
    tokens: int
    characters: int
    token_nats: list[float]

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def nats_per_character(self) -> float:
        return self.nats / self.characters


class TokComPipeline(TokComBasePipeline):
    """Continue prompts, generate, reconstruct, re-denoise, encode and decode texts, and fill gaps in them.

    The model is one of texts, or of pixels that stand for tokens; see `TokComBasePipeline` for the arguments.
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
        guidance_scale: float = 1.0,
        temperature: float | None = None,
        top_p: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "text",
        return_dict: bool = True,
        streamer: BaseStreamer | None = None,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> TokComPipelineOutput | tuple:
        """Continue one or several prompts.

        Args:
            prompt: a text or a list of texts, none empty. A dialogue, `[{"role", "content"}, ...]`, or a list of them goes
                through the tokenizer's chat template; without one, its turns are lines.
            gen_length: tokens to generate; a text ends earlier at EOS.
            num_inference_steps: denoising steps per block; by default `config.num_inference_steps`.
            guidance_scale: 1 is off; above 1 strengthens the influence of the prompt at twice the cost.
            temperature, top_p: of token probabilities, for `prediction_type="tokens"`; by default those of the config.
            generator: one, or one per prompt. A smaller `gen_length` gives the beginning of the same text, and a prompt's
                text depends on its place among the prompts only.
            latents: initial noise `(B, n, C)`, for the longest unfinished chunk of a prompt and `gen_length` more tokens.
            output_type: `"text"`, `"seq"` (ids only) or `"latent"`.
            streamer: of transformers, for one prompt; it receives the prompt's ids, then those of every block.
            callback_on_step_end: called as `f(pipe, step, timestep, {"latents": ...})`; may return new latents.

        Raises `ValueError` for an empty or too long prompt and for arguments out of range.
        """
        self.check_inputs(
            num_inference_steps,
            output_type,
            callback_on_step_end_tensor_inputs,
            ("gen_length", gen_length),
        )
        prompts = as_prompts(self.tokenizer, prompt)
        if streamer is not None and (len(prompts) > 1 or output_type == "latent"):
            raise ValueError(
                f"`streamer` shows text of one prompt, not {len(prompts)} prompts as {output_type!r}."
            )
        rows = prompt_ids(self.tokenizer, prompts, self.max_length)
        skip, blocks = self.continue_ids(
            rows,
            gen_length,
            TokComSampling(num_inference_steps, guidance_scale, [], temperature, top_p, generator),
            latents=latents,
            stop=output_type != "latent",
            on_step_end=self._step_callback(
                callback_on_step_end, callback_on_step_end_tensor_inputs
            ),
        )
        if streamer is not None:
            streamer.put(torch.tensor(rows))
            blocks = feed_streamer(streamer, blocks, gen_length, skip[0], self._eos_token_id)
        output = self._finish_continuation(prompts, rows, blocks, gen_length, output_type, skip)
        return output if return_dict else output.to_tuple()

    @property
    def _predicts_tokens(self) -> bool:
        """Whether the model can know part of a chunk; one that regresses latents knows whole chunks only."""
        return self.model.token_head is not None

    def encode_prompt(self, prompt: list[str]) -> tuple[TokComCodecOutput | None, list[list[int]]]:
        """Prompts -> clean context latents, None if no prompt fills a chunk, and the prompts' ids."""
        rows = prompt_ids(self.tokenizer, prompt, self.max_length)
        return self._encode_rows(rows), rows

    def _encode_rows(self, rows: list[list[int]]) -> TokComCodecOutput | None:
        """The whole chunks of rows of ids as context latents.

        Chunks count from the first token of each row; shorter rows have hidden chunks in front. The tokens of an unfinished
        chunk are not in the context, since a model that predicts tokens goes on inside it. For one that regresses latents
        rows are padded on the left to whole chunks instead.
        """
        if not self._predicts_tokens:
            return self.model.encode(*self._pad(rows, "left"))
        unit = self.model.config.codec_config.length_multiple
        rows = [row[: len(row) // unit * unit] for row in rows]
        if not any(rows):
            return None
        return prompt_context(self.model, *self._pad(rows, "left"))

    def continue_ids(
        self,
        rows: list[list[int]],
        gen_length: int,
        sampling: TokComSampling,
        latents: torch.Tensor | None = None,
        noise_scale: float = 1.0,
        stop: bool = False,
        on_step_end: StepCallback | None = None,
    ) -> tuple[list[int], Blocks]:
        """Continue rows of ids: how many tokens of its prompt each row's first blocks repeat, and the blocks.

        `noise_scale` multiplies the initial noise; with `stop` the blocks end when every row has ended.
        """
        context = self._encode_rows(rows)
        unit = self.model.config.codec_config.length_multiple if self._predicts_tokens else 1
        tails = [row[len(row) // unit * unit :] for row in rows]  # tokens of the unfinished chunk
        skip = [len(tail) for tail in tails]
        length = self._num_latents(max(skip) + gen_length)
        context_length = 0 if context is None else context.mask.shape[1]
        self._check_length(context_length + length)
        noise = self.prepare_latents(len(rows), length, sampling.generator, latents) * noise_scale
        places = torch.arange(length, device=noise.device).expand(len(rows), -1)
        if context is not None and self._predicts_tokens:
            places = places + context.mask.sum(1, keepdim=True)  # rows are of different lengths
        else:
            places = places + context_length
        task = TokComTask(
            noise,
            context,
            self.model.codec.positions(places),
            given=self._given_tails(tails, length) if any(skip) else None,
        )
        blocks = self.sample_blocks(task, sampling, decode=True, on_step_end=on_step_end)
        return skip, until_all_ended(blocks, self._eos_token_id, skip) if stop else blocks

    def _given_tails(self, tails: list[list[int]], length: int) -> TokComGiven:
        """Rows of ids at the beginning of `length` latents, as what is known of them."""
        ids, mask = pad_ids(tails, length * self.chunk_size, self._pad_token_id, "right")
        device = self._execution_device
        return TokComGiven(*self.model.codec.symbols(ids.to(device), mask.to(device)))

    def _finish_continuation(
        self,
        prompts: list[str],
        rows: list[list[int]],
        blocks: Blocks,
        gen_length: int,
        output_type: str,
        skip: list[int],
    ) -> TokComPipelineOutput:
        """Run the sampler; of a text what follows its prompt."""
        channels = self.model.config.codec_config.latent_channels
        empty = torch.empty(len(rows), 0, channels, device=self._execution_device)
        output = self._finish(*join_blocks(blocks, empty), gen_length, output_type, skip)
        if output.texts is not None:
            lengths = output.attention_mask.sum(-1).tolist()
            new = [ids[:length] for ids, length in zip(output.sequences.tolist(), lengths)]
            output.texts = [
                continue_text(self.tokenizer, *parts) for parts in zip(prompts, rows, new)
            ]
        return output

    def _finish(
        self,
        latents: torch.Tensor,
        ids: torch.Tensor | None,
        gen_length: int,
        output_type: str,
        skip: list[int] | None = None,
    ) -> TokComPipelineOutput:
        """End texts at EOS, pad to `gen_length`; the first `skip` ids of each row are those of its prompt."""
        self.maybe_free_model_hooks()
        if output_type == "latent":
            return TokComPipelineOutput(latents=latents)
        sequences, mask = take_new(
            ids, gen_length, skip or [0] * len(ids), self._eos_token_id, self._pad_token_id
        )
        texts = decode_rows(self.tokenizer, sequences, mask) if output_type == "text" else None
        return TokComPipelineOutput(
            texts=texts, sequences=sequences, latents=latents, attention_mask=mask
        )

    @property
    def _eos_token_id(self) -> int | None:
        return getattr(self.tokenizer, "eos_token_id", None)

    def _check_length(self, num_latents: int) -> None:
        """Block-causal models generate any length over a sliding window; bidirectional ones see all at once."""
        tokens = num_latents * self.chunk_size
        if self.model.config.transformer_config.block_size is None and tokens > self.max_length:
            raise ValueError(
                f"prompt and generated text are {tokens} tokens together, more than the model's maximum of "
                f"{self.max_length}; reduce `gen_length` or the prompt."
            )

    # ---- streaming ----

    @torch.no_grad()
    def stream(
        self,
        prompt: str,
        gen_length: int = 256,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        temperature: float | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[str]:
        """Continue one prompt and yield pieces of text as blocks are finished; joined, they are `__call__`'s text.

        The arguments are those of `__call__`. Characters whose bytes are not complete yet wait for the next piece.
        """
        if not isinstance(prompt, str):
            raise ValueError(
                f"`prompt` must be one text, not {prompt!r}; call stream_batch for several."
            )
        for (piece,) in self.stream_batch(
            [prompt], gen_length, num_inference_steps, guidance_scale, temperature, top_p, generator
        ):
            if piece.text:
                yield piece.text

    @torch.no_grad()
    def stream_batch(
        self,
        prompts: list[str] | list[list[int]],
        gen_length: int | list[int] = 256,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        temperature: float | None = None,
        top_p: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Iterator[list[TokComPiece]]:
        """Continue several prompts at once and yield the new pieces of all texts whenever a block is finished.

        `gen_length` tokens are generated, or as many as it says for each prompt; a text that has ended gives empty pieces.
        With a generator for each prompt, a text does not depend on the others, unless the model is bidirectional and the
        lengths differ. It ends early when `should_stop()`, which is asked after every denoising step.
        """
        lengths = [gen_length] * len(prompts) if isinstance(gen_length, int) else list(gen_length)
        if not prompts or len(lengths) != len(prompts):
            raise ValueError(
                f"`gen_length` has {len(lengths)} entries for {len(prompts)} prompts; give one each."
            )
        self.check_inputs(num_inference_steps, length=("gen_length", min(lengths)))

        def ask_to_stop(pipe, step, timestep, x):
            pipe._interrupt = should_stop()
            return x

        rows = prompt_ids(self.tokenizer, prompts, self.max_length)
        skip, blocks = self.continue_ids(
            rows,
            max(lengths),
            TokComSampling(num_inference_steps, guidance_scale, [], temperature, top_p, generator),
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
        """Mode 1: new texts of `num_chunks` chunks from noise; see `__call__` for the other arguments."""
        self.check_inputs(num_inference_steps, output_type, length=("num_chunks", num_chunks))
        multiple = self.model.config.codec_config.latents_multiple
        if num_chunks % multiple:
            raise ValueError(
                f"`num_chunks` ({num_chunks}) must be a multiple of {multiple}, a row of patches of this model."
            )
        self._check_length(num_chunks)
        noise = self.prepare_latents(batch_size, num_chunks, generator, latents)
        sampling = TokComSampling(
            num_inference_steps, temperature=temperature, top_p=top_p, generator=generator
        )
        new_latents, ids = self.sample_latents(
            TokComTask(noise), sampling, decode=output_type != "latent"
        )
        return self._finish(new_latents, ids, num_chunks * self.chunk_size, output_type)

    @torch.no_grad()
    def encode(
        self, text: str | list[str], output_file: str | os.PathLike | None = None
    ) -> TokComPipelineOutput:
        """Mode 4: texts -> latents, and a safetensors file with `latents` and `attention_mask` if a name is given.

        A codec with a quantiser also gives `codes`, which are what the file then holds.
        """
        texts = list(text) if isinstance(text, (list, tuple)) else [text]
        if not texts:
            raise ValueError("`text` is an empty list; give at least one text.")
        ids, mask = self._pad(self._tokenize(texts, "text"), "right")
        encoded = self.model.encode(ids, mask)
        self.maybe_free_model_hooks()
        if output_file is not None:
            write_latents(output_file, encoded.latents, encoded.codes, mask, self.chunk_size)
        return TokComPipelineOutput(
            sequences=ids, latents=encoded.latents, attention_mask=mask, codes=encoded.codes
        )

    @torch.no_grad()
    def decode(
        self, latents: torch.Tensor | str | os.PathLike, attention_mask: torch.Tensor | None = None
    ) -> TokComPipelineOutput:
        """Latents `(B, N, C)`, integer codes `(B, N, R)`, or a file that `encode` wrote, -> text.

        `attention_mask (B, N * K)` hides padding.
        """
        if not isinstance(latents, torch.Tensor):
            latents, attention_mask = read_latents(latents, self.chunk_size)
        latents = self._to_latents(latents)
        sequences = self.model.to_ids(latents)
        self.maybe_free_model_hooks()
        mask = (
            torch.ones_like(sequences)
            if attention_mask is None
            else attention_mask.to(sequences.device)
        )
        if mask.shape != sequences.shape:
            raise ValueError(
                f"`attention_mask` has shape {tuple(mask.shape)} but {tuple(sequences.shape)} is needed."
            )
        texts = decode_rows(self.tokenizer, sequences, mask)
        return TokComPipelineOutput(
            texts=texts, sequences=sequences, latents=latents, attention_mask=mask
        )

    def reconstruct(self, text: str | list[str]) -> TokComPipelineOutput:
        """Mode 2: encode and decode; the text as the codec remembers it."""
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
        """Mode 3: keep a part of what a text says, and let the model make up the rest.

        `noise_level` in [0, 1] is the share of the information that is kept: 0 is pure noise, 1 plain reconstruction. A
        model that predicts tokens keeps each token with that probability and draws the others given those around them; a
        token that is kept at one level is kept at every higher one. A model that regresses latents keeps that share of
        them, `noise_level * latents + (1 - noise_level) * noise`, and takes the remaining
        `num_inference_steps * (1 - noise_level)` steps, at least one. How many tokens survive is in docs/modes.md.
        """
        if not 0.0 <= noise_level <= 1.0:
            raise ValueError(
                f"`noise_level` ({noise_level}) must be in [0, 1]: 0 is pure noise, 1 is the clean text."
            )
        self.check_inputs(num_inference_steps)
        encoded = self.encode(text)
        if noise_level == 1.0:
            return self.decode(encoded.latents, encoded.attention_mask)
        self._check_length(encoded.latents.shape[1])
        sampling = TokComSampling(
            num_inference_steps, temperature=temperature, top_p=top_p, generator=generator
        )
        if self._predicts_tokens:
            return self._redraw_tokens(encoded, noise_level, sampling)
        return self._redraw_latents(encoded, noise_level, sampling)

    def _redraw_latents(
        self, encoded: TokComPipelineOutput, noise_level: float, sampling: TokComSampling
    ) -> TokComPipelineOutput:
        """Texts whose latents are mixed with noise and denoised again."""
        latents = encoded.latents.float()
        noise = self.prepare_latents(latents.shape[0], latents.shape[1], sampling.generator)
        sampler = self._sampler(sampling)
        steps = max(1, round(sampler.sampling.num_inference_steps * (1 - noise_level)))
        task = TokComTask(
            sampler.add_noise(latents, noise, noise_level),
            exists=encoded.attention_mask.unflatten(1, (-1, self.chunk_size)).any(-1),
            sigma_start=1 - noise_level,
        )
        result, _ = self.sample_latents(
            task, replace(sampling, num_inference_steps=steps), decode=False
        )
        return self.decode(result, encoded.attention_mask)

    def _redraw_tokens(
        self, encoded: TokComPipelineOutput, noise_level: float, sampling: TokComSampling
    ) -> TokComPipelineOutput:
        """Texts of which each token is kept with probability `noise_level`, and the others are drawn."""
        sequences = encoded.sequences.clone()
        for row, source in enumerate(spawn_generators(sampling.generator, len(sequences))):
            real = encoded.attention_mask[row].bool()
            ids = encoded.sequences[row, real].tolist()
            kept = kept_tokens(len(ids), noise_level, source)
            filled, _ = self.fill_ids(ids, kept, replace(sampling, generator=source))
            sequences[row, real] = torch.tensor(filled, device=sequences.device)
        self.maybe_free_model_hooks()
        texts = decode_rows(self.tokenizer, sequences, encoded.attention_mask)
        return TokComPipelineOutput(
            texts=texts, sequences=sequences, attention_mask=encoded.attention_mask
        )

    # ---- gaps ----

    @torch.no_grad()
    def infill(
        self,
        text: str,
        gap_length: int | None = 16,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        temperature: float | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        num_candidates: int = 16,
    ) -> TokComPipelineOutput:
        """Fill every gap `____` in `text` with tokens that see what stands before and after it.

        Three or more underscores are one gap. Every gap gets `gap_length` tokens. With `gap_length=None` the length is
        unknown: `num_candidates` fillings of 1 to 8 tokens are drawn, and the one is kept whose whole text the model finds
        most likely per character (see `score`).

        Returns the whole text. Raises `ValueError` when there is no gap or nothing but gaps.
        """
        if not isinstance(text, str):
            raise ValueError(f"`text` must be one text, not {text!r}; call infill for each.")
        if gap_length is None:
            self.check_inputs(None, length=("num_candidates", num_candidates))
            settings = (num_inference_steps, guidance_scale, temperature, top_p)
            sources = spawn_generators(generator, num_candidates)
            found = [
                self.infill(text, 1 + i % LONGEST_CANDIDATE, *settings, source)
                for i, source in enumerate(sources)
            ]
            scores = self.score([output.texts[0] for output in found])
            best = min(range(len(found)), key=lambda i: scores[i].nats_per_character)
            return found[best]
        self.check_inputs(num_inference_steps, length=("gap_length", gap_length))
        pieces = re.split("_{3,}", text)
        if len(pieces) < 2 or not any(piece.strip() for piece in pieces):
            raise ValueError(
                f"`text` ({text!r}) must hold known text and at least one gap, written {GAP!r}."
            )
        known = [piece.rstrip(" ") for piece in pieces[:-1]] + pieces[
            -1:
        ]  # a gap's first word brings its own space
        rows = [self._tokenize([piece], "text")[0] if piece.strip() else [] for piece in known]
        sampling = TokComSampling(
            num_inference_steps, guidance_scale, [], temperature, top_p, generator
        )
        fill = self._fill_tokens if self._predicts_tokens else self._fill_latents
        gaps, latents = fill(rows, gap_length, sampling)
        self.maybe_free_model_hooks()
        filled = pieces[0]
        for row, gap, piece in zip(rows, gaps, pieces[1:]):
            filled += continue_text(self.tokenizer, filled, row, gap) + piece
        return TokComPipelineOutput(texts=[filled], sequences=torch.tensor(gaps), latents=latents)

    @torch.no_grad()
    def score(self, texts: str | list[str]) -> list[TokComScore]:
        """The exact likelihood of texts under the model, at temperature 1 and from their first token on.

        Raises `ValueError` for an empty text, one longer than the model sees at once, and for models that have no exact
        probability of a next token (`is_causal_lm` of the configuration is false).
        """
        config = self.model.config
        if not config.is_causal_lm:
            raise ValueError(
                "only models whose tokens take turns within blocks of one chunk have exact likelihoods "
                f"(`token_stagger` is {config.token_stagger}, `block_size` {config.transformer_config.block_size})."
            )
        texts = [texts] if isinstance(texts, str) else list(texts)
        rows = self._tokenize(texts, "texts")
        longest = max(len(row) for row in rows)
        self._check_filled_length(longest)
        length = -(-longest // self.chunk_size) * self.chunk_size
        ids, mask = pad_ids(rows, length, config.vocab_size - 1, "right")
        device = self._execution_device
        objective = objective_class(config, "flow")()
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        losses = objective.loss(self.model.eval(), **inputs).token_losses
        self.maybe_free_model_hooks()
        nats = losses.flatten(1).tolist()
        return [
            TokComScore(sum(row[: len(tokens)]), len(tokens), len(text), row[: len(tokens)])
            for row, tokens, text in zip(nats, rows, texts)
        ]

    def _check_filled_length(self, tokens: int) -> None:
        if tokens > self.max_length:
            raise ValueError(
                f"`text` with its gaps has {tokens} tokens, more than the model's maximum of {self.max_length}; shorten it."
            )

    def _fill_tokens(
        self, rows: list[list[int]], gap_length: int, sampling: TokComSampling
    ) -> tuple[list[list[int]], torch.Tensor | None]:
        """Ids for the gaps between `rows` of ids, and the latents `(1, n, C)` of what was generated."""
        ids = list(rows[0])
        known = [True] * len(ids)
        starts = []
        for row in rows[1:]:
            starts.append(len(ids))
            ids += [0] * gap_length + row
            known += [False] * gap_length + [True] * len(row)
        filled, latents = self.fill_ids(ids, known, sampling)
        return [filled[start : start + gap_length] for start in starts], latents

    def fill_ids(
        self, ids: list[int], known: list[bool], sampling: TokComSampling
    ) -> tuple[list[int], torch.Tensor | None]:
        """Draw the ids of one text that are not `known`, anywhere in a chunk; for models that predict tokens.

        Chunks of which everything is known are context. The others are generated in reading order, given their known
        tokens. Returns all ids, and the latents `(1, n, C)` of what was generated, None if nothing was.
        """
        if all(known):
            return ids, None
        codec = self.model.codec
        tokens, is_real = self._pad([ids], "right")  # (1, T)
        self._check_filled_length(tokens.shape[1])
        is_known = torch.zeros_like(is_real).bool()
        is_known[0, : len(ids)] = torch.tensor(known, device=is_known.device)

        def make_noise(count: int) -> torch.Tensor:
            return self.prepare_latents(1, count, sampling.generator)

        task, generated = token_gap_task(self.model, tokens, is_known, is_real.bool(), make_noise)
        latents, drawn = self.sample_latents(task, sampling)
        # tokens of chunks that were not generated are known, so they never show
        chunks = codec.to_chunks(tokens, None)[0].clone()
        chunks[0, generated] = codec.to_chunks(drawn, None)[0][0]
        whole = codec.from_patches(chunks) if hasattr(codec, "from_patches") else chunks.flatten(1)
        return torch.where(is_known, tokens, whole)[0, : len(ids)].tolist(), latents

    def _fill_latents(
        self, rows: list[list[int]], gap_length: int, sampling: TokComSampling
    ) -> tuple[list[list[int]], torch.Tensor]:
        """The same as `_fill_tokens` for a model that regresses latents.

        Gaps are whole chunks, and the text before the first is padded on its left.
        """
        gap_latents = self._num_latents(gap_length)
        pieces = [
            self._pad([row], "right" if i else "left") if row else None
            for i, row in enumerate(rows)
        ]
        known = sum(piece[0].shape[1] for piece in pieces if piece is not None)
        self._check_filled_length(known + gap_latents * self.chunk_size * (len(rows) - 1))
        noise = self.prepare_latents(1, gap_latents * (len(rows) - 1), sampling.generator)
        task = latent_gap_task(self.model, pieces, noise)
        latents, drawn = self.sample_latents(task, sampling)
        return drawn.view(len(rows) - 1, -1)[:, :gap_length].tolist(), latents

    # ---- texts as pictures, for models whose tokens are pixels ----

    def _color_codec(self) -> TokComColorCodec:
        if not isinstance(self.model.codec, TokComColorCodec):
            raise ValueError("the tokens of this model are not pixels; load a pixel model.")
        return self.model.codec

    def text_to_image(self, text: str, width: int | None = None) -> Image.Image:
        """A text as a picture, one pixel for each token; `.save("text.png")` keeps it exactly, JPEG does not."""
        codec = self._color_codec()
        pixels = codec.to_image(torch.tensor(self._tokenize([text], "text")[0]), width)
        return Image.fromarray(pixels.numpy())

    def image_to_text(self, image: Image.Image | str | os.PathLike) -> str:
        """The text of a picture of any size, or of such a file."""
        codec = self._color_codec()
        image = image if isinstance(image, Image.Image) else Image.open(image)
        ids = codec.from_image(torch.from_numpy(np.array(image.convert("RGB"))))
        return self.tokenizer.decode(ids.tolist(), skip_special_tokens=False)


__all__ = ["GAP", "TokComPiece", "TokComPipeline", "TokComPipelineOutput", "TokComScore"]
