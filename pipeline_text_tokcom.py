"""What TokComPipeline does with texts: prompts, streaming, generating, encoding, re-denoising and filling gaps; texts as pictures.

Notable choices: a prompt is padded on its left to whole chunks, a text to encode on its right; new ids are decoded together with the
ones before them, so that pieces of a stream join to the text; a dialogue goes through the tokenizer's chat template.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from .codec_chunk_tokcom import TokComCodecOutput
from .codec_color_tokcom import TokComColorCodec
from .processing_tokcom import warn_of_new_characters
from .sampling_tokcom import TokComGaps, TokComGiven, spawn_generators

GAP = "____"
PAD_TOKENS = ("<pad>", "<|pad|>", "<|tokcom_pad|>")


def with_pad_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, whose last token is its pad token: added if there is none, or if it stands elsewhere.

    The model's last id is that of padding, so tokenizer and model have equally many ids.
    """
    if tokenizer.pad_token_id == len(tokenizer) - 1 and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return tokenizer
    vocabulary = tokenizer.get_vocab()
    new = next(token for token in PAD_TOKENS if token not in vocabulary)
    tokenizer.add_special_tokens({"pad_token": new})
    return tokenizer


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many ids text is made of: all of the tokenizer's but the pad token that `with_pad_token` gives it."""
    last = len(tokenizer) - 1
    return last if tokenizer.pad_token_id == last != tokenizer.eos_token_id else len(tokenizer)


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str | list[str], special_tokens: bool = False) -> list:
    """Ids of one text, or of each of several, without start or end tokens.

    What spells a special token, such as `</s>`, is text like any other, unless `special_tokens` are to be found in what a
    chat template has made.
    """
    options = {"add_special_tokens": False, "verbose": False, "split_special_tokens": not special_tokens}
    return tokenizer(text, **options)["input_ids"]


class _Rendered(str):
    """What a chat template has made: special tokens in it are meant."""


@dataclass
class TokComPipelineOutput(BaseOutput):
    """Output of every method; fields that do not apply are None.

    Args:
        texts (`list[str]`): for a prompt, its continuation (`prompt + text` reads on); else the whole text.
        sequences (`torch.LongTensor` of shape `(B, T)`): token ids; what follows EOS is the pad id.
        latents (`torch.FloatTensor` of shape `(B, N, C)`): standardised latents.
        attention_mask (`torch.LongTensor` of shape `(B, T)`): 1 on the ids that belong to the text.
        codes (`torch.LongTensor` of shape `(B, N, R)`): what stores the latents of a codec with a quantiser.
        images (`list[PIL.Image.Image]` or `torch.FloatTensor` of shape `(B, 3, H, W)`): pictures, of models of images.
        videos (`list[list[PIL.Image.Image]]` or `torch.FloatTensor` of shape `(B, 3, F, H, W)`): clips, of models of clips.
        audios (`list[np.ndarray]`): sounds, samples in [-1, 1].
        streams (`dict[str, list]`): of models of several streams, the content of each by name.
    """

    texts: list[str] | None = None
    sequences: torch.LongTensor | None = None
    latents: torch.FloatTensor | None = None
    attention_mask: torch.LongTensor | None = None
    codes: torch.LongTensor | None = None
    images: list[Image.Image] | torch.FloatTensor | None = None
    videos: list[list[Image.Image]] | torch.FloatTensor | None = None
    audios: list[np.ndarray] | None = None
    streams: dict[str, list] | None = None


class TokComPiece(NamedTuple):
    """What one text has gained in a block: its new `text`, the `tokens` it has by now (EOS included), and once it has ended
    the `finish_reason`, `"stop"` (EOS) or `"length"`."""

    text: str
    tokens: int
    finish_reason: str | None


class TokComTextMixin:
    """The methods of `TokComPipeline` for models of texts."""

    # ---- text <-> ids ----

    @property
    def _eos_token_id(self) -> int | None:
        return getattr(self.tokenizer, "eos_token_id", None)

    @property
    def _pad_token_id(self) -> int:
        return getattr(self.model.config.codec_config, "pad_token_id", self.model.config.text_vocab_size - 1)

    def _tokenize(self, texts: list[str], name: str, special_tokens: bool = False) -> list[list[int]]:
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"`{name}` must be a text or a list of texts, not {texts!r}.")
        if self.tokenizer is None:
            raise ValueError(f"`{name}` is text, but this pipeline has no tokenizer; pass one when building it.")
        rows = [text_ids(self.tokenizer, text, special_tokens) for text in texts]
        for text, row in zip(texts, rows):
            if not row:
                raise ValueError(
                    f"`{name}` is empty ({text!r}); give some text, or call generate() to start from noise."
                )
        warn_of_new_characters(self.tokenizer, texts)
        return rows

    def _pad(self, rows: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of ids -> `input_ids (B, T)` and `attention_mask (B, T)`, T a multiple of K."""
        length = self._num_latents(max(map(len, rows))) * self.chunk_size
        ids = torch.full((len(rows), length), self._pad_token_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            place = slice(length - len(row), length) if side == "left" else slice(0, len(row))
            ids[i, place], mask[i, place] = torch.tensor(row), 1
        return ids.to(self._execution_device), mask.to(self._execution_device)

    def _decode_row(self, ids: list[int]) -> str:
        return self.tokenizer.decode([i for i in ids if i < len(self.tokenizer)], skip_special_tokens=True)

    def _to_texts(self, sequences: torch.Tensor, attention_mask: torch.Tensor) -> list[str] | None:
        """Rows of ids `(B, T)`, those with mask 1, as texts."""
        if self.tokenizer is None:
            return None
        rows = zip(sequences.tolist(), attention_mask.tolist())
        return [self._decode_row([i for i, real in zip(ids, mask) if real]) for ids, mask in rows]

    def _continue_text(self, text: str, known: list[int], new: list[int]) -> str:
        """What to append to `text`, whose ids are `known`, for the ids `new`.

        Both are decoded together, since many tokenizers drop a space at the start of what they decode; a space that
        ends `text` is the one that the first new word brings along.
        """
        before, whole = self._decode_row(known), self._decode_row(known + new)
        added = whole[len(before) :] if whole.startswith(before) else self._decode_row(new)
        return added.removeprefix(" ") if text.endswith(" ") else added

    def _end_at_eos(self, sequences: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Replace what follows the first EOS by the pad id; returns the ids and the mask of what is kept."""
        eos = self._eos_token_id
        ended = torch.zeros_like(sequences) if eos is None else (sequences == eos).long()
        mask = (ended.cumsum(-1) - ended == 0).long()  # (B, T)
        return torch.where(mask.bool(), sequences, self._pad_token_id), mask

    def _ended(self, sequences: torch.Tensor) -> bool:
        """Whether every row of ids `(B, T)` holds EOS."""
        return self._eos_token_id is not None and bool((sequences == self._eos_token_id).any(-1).all())

    def require_tokens(self) -> None:
        """Raise `ValueError` if this is a model of images or clips, which has no text to give."""
        modality = self.model.config.codec_config.modality
        if modality == "several":
            raise ValueError(
                "this model has several streams: call pipe(text=..., generate=['image']) or generate_streams."
            )
        if modality != "text":
            names = ", ".join(f"{verb}_{modality}s" for verb in ("generate", "encode", "decode"))
            raise ValueError(
                f"this model makes {'pictures' if modality == 'image' else 'clips'}, not text: use pipe(caption), {names} or "
                f"reconstruct_{modality}s, and of the output types 'pil', 'pt' or 'latent'."
            )

    # ---- continuing ----

    @property
    def _continues_chunks(self) -> bool:
        """Whether the model goes on inside a prompt's last chunk; one that regresses latents knows whole chunks only."""
        return self.model.token_head is not None

    def encode_prompt(self, prompt: list[str]) -> tuple[TokComCodecOutput | None, list[list[int]]]:
        """Prompts -> clean context latents, None if no prompt fills a chunk, and the prompts' ids.

        Chunks count from the first token of each prompt; shorter rows have hidden chunks in front. The tokens of an
        unfinished chunk are not in the context, since a model that predicts tokens goes on inside it. For a model that
        regresses latents prompts are padded on the left to whole chunks instead. Trailing spaces are left to the
        continuation, whose first word carries its own.
        """
        rows = self._prompt_rows(prompt)
        return self._encode_rows(rows), rows

    def _prompt_rows(self, prompt: list[str]) -> list[list[int]]:
        """Ids of prompts, none of which is longer than the model can see."""
        special = [isinstance(p, _Rendered) for p in prompt]
        texts = [p.rstrip(" ") if isinstance(p, str) else p for p in prompt]
        rows = [self._tokenize([text], "prompt", kind)[0] for text, kind in zip(texts, special)]
        longest = max(map(len, rows))
        if longest > self.max_length:
            raise ValueError(
                f"`prompt` has {longest} tokens, more than the model's maximum of {self.max_length}; shorten it."
            )
        return rows

    def _encode_rows(self, rows: list[list[int]]) -> TokComCodecOutput | None:
        """The whole chunks of rows of ids as context latents; see `encode_prompt`."""
        if not self._continues_chunks:
            return self.model.encode(*self._pad(rows, "left"))
        unit = self.model.config.codec_config.length_multiple
        rows = [row[: len(row) // unit * unit] for row in rows]
        if not any(rows):
            return None
        ids, mask = self._pad(rows, "left")
        context = self.model.encode(ids, mask)
        hidden = (~context.mask).sum(1, keepdim=True)
        index = torch.arange(context.mask.shape[1], device=hidden.device) - hidden
        context.position_ids = self.model.codec.positions(index.clamp_min(0))
        return context

    def _to_prompts(self, prompt: Any) -> list[Any]:
        """One text or dialogue, or several, as a list of texts."""
        several = isinstance(prompt, (list, tuple)) and not (prompt and isinstance(prompt[0], dict))
        prompts = list(prompt) if several else [prompt]
        for i, turns in enumerate(prompts):
            if not isinstance(turns, (list, tuple)) or not turns:
                continue
            if not all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in turns):
                raise ValueError(f"a dialogue must be a list of {{'role', 'content'}}, not {turns!r}.")
            if getattr(self.tokenizer, "chat_template", None):
                text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
                prompts[i] = _Rendered(text)
            else:
                prompts[i] = "\n".join(turn["content"] for turn in turns)
        return prompts

    def _continue(
        self, prompts: list[str], gen_length: int, latents: torch.Tensor | None, generator, **sampling
    ) -> tuple[list[list[int]], list[int], Iterator[tuple[torch.Tensor, torch.Tensor | None]]]:
        """The prompts' ids, and what `_continue_rows` gives for them."""
        rows = self._prompt_rows(prompts)
        return rows, *self._continue_rows(rows, gen_length, latents, generator, **sampling)

    def _continue_rows(
        self,
        rows: list[list[int]],
        gen_length: int,
        latents: torch.Tensor | None,
        generator,
        noise_scale: float = 1.0,
        **sampling,
    ) -> tuple[list[int], Iterator[tuple[torch.Tensor, torch.Tensor | None]]]:
        """How many tokens of its prompt each row's first blocks repeat, and an iterator over blocks (latents and ids)."""
        context = self._encode_rows(rows)
        unit = self.model.config.codec_config.length_multiple if self._continues_chunks else 1
        tails = [row[len(row) // unit * unit :] for row in rows]
        skip = [len(tail) for tail in tails]
        length = self._num_latents(max(skip) + gen_length)
        known = 0 if context is None else context.mask.shape[1]
        self._check_length(known + length)
        noise = self.prepare_latents(len(rows), length, generator, latents) * noise_scale
        places = torch.arange(length, device=noise.device).expand(len(rows), -1)
        if context is not None:
            before = context.mask.sum(1, keepdim=True) if self._continues_chunks else known
            places = places + before
        blocks = self._sample_blocks(
            noise,
            context,
            self.model.codec.positions(places),
            generator=generator,
            given=self._given(tails, length) if any(skip) else None,
            skip=skip,
            **sampling,
        )
        return skip, blocks

    def _given(self, tails: list[list[int]], length: int) -> TokComGiven:
        """Rows of ids at the beginning of `length` latents, as what is known of them."""
        ids = torch.full((len(tails), length * self.chunk_size), self._pad_token_id)
        mask = torch.zeros_like(ids)
        for row, tail in enumerate(tails):
            ids[row, : len(tail)] = torch.tensor(tail, dtype=torch.long)
            mask[row, : len(tail)] = 1
        device = self._execution_device
        return TokComGiven(*self.model.codec.symbols(ids.to(device), mask.to(device)))

    def _num_latents(self, tokens: int) -> int:
        """Latents that hold at least so many tokens."""
        multiple = self.model.config.codec_config.length_multiple
        return -(-tokens // multiple) * multiple // self.chunk_size

    def _feed(self, streamer: BaseStreamer, blocks: Iterator, gen_length: int, skip: int) -> Iterator:
        """Pass blocks of one text on, and the ids of each, up to EOS or `gen_length`, to the streamer; the first `skip`
        ids are those of the prompt."""
        left = gen_length
        for block in blocks:
            new = block[1][:, skip : skip + left]
            skip = max(0, skip - block[1].shape[1])
            ids, mask = self._end_at_eos(new)
            if mask.any():
                streamer.put(ids[mask.bool()].cpu())
            yield block
            left -= new.shape[1]
            if self._ended(ids):
                break
        streamer.end()

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
            raise ValueError(f"`prompt` must be one text, not {prompt!r}; call stream_batch for several.")
        settings = num_inference_steps, guidance_scale, temperature, top_p, generator
        for (piece,) in self.stream_batch([prompt], gen_length, *settings):
            if piece.text:
                yield piece.text

    @torch.no_grad()
    def stream_batch(
        self,
        prompts: list[str],
        gen_length: int | list[int] = 256,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        temperature: float | None = None,
        top_p: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Iterator[list[TokComPiece]]:
        """Continue several prompts at once, `gen_length` tokens or as many as it says for each, and yield a list with the
        new piece of every text whenever a block is finished. A text that has ended gives empty pieces. With a generator for
        each prompt, a text does not depend on its company, unless the model is bidirectional and lengths differ. It ends early
        when `should_stop()`, which is asked after every denoising step."""
        lengths = [gen_length] * len(prompts) if isinstance(gen_length, int) else list(gen_length)
        if not prompts or len(lengths) != len(prompts):
            raise ValueError(f"`gen_length` has {len(lengths)} entries for {len(prompts)} prompts; give one each.")
        self.check_inputs(min(lengths), num_inference_steps, "text", [])
        stopped = False

        def after_step(pipe, step, timestep, x):
            nonlocal stopped
            stopped = pipe._interrupt = should_stop()
            return x

        known, skip, blocks = self._continue(
            prompts,
            max(lengths),
            None,
            generator,
            on_step_end=None if should_stop is None else after_step,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            temperature=temperature,
            top_p=top_p,
            stop_at_eos=True,
        )
        pieces, ids, shown = [TokComPiece("", 0, None)] * len(prompts), [[] for _ in prompts], [""] * len(prompts)
        for _, block in blocks:
            if stopped:
                break
            for i, new in enumerate(block.tolist()):
                skipped = min(skip[i], len(new))
                new, skip[i] = new[skipped:], skip[i] - skipped
                if pieces[i].finish_reason is not None:
                    pieces[i] = pieces[i]._replace(text="")
                    continue
                ended = self._eos_token_id in new
                new = new[: new.index(self._eos_token_id) + 1] if ended else new
                ended = ended and len(ids[i]) + len(new) <= lengths[i]
                ids[i] = (ids[i] + new)[: lengths[i]]
                reason = "stop" if ended else "length" if len(ids[i]) == lengths[i] else None
                text = self._continue_text(prompts[i], known[i], ids[i])
                text = text if reason else text.rstrip("\ufffd")
                pieces[i] = TokComPiece(text[len(shown[i]) :], len(ids[i]), reason)
                shown[i] = max(shown[i], text, key=len)
            yield list(pieces)
            if all(piece.finish_reason for piece in pieces):
                break
        self.maybe_free_model_hooks()

    def _check_length(self, length: int) -> None:
        """Block-causal models generate any length over a sliding window; bidirectional ones see all at once."""
        tokens = length * self.chunk_size
        if self.model.config.transformer_config.block_size is None and tokens > self.max_length:
            raise ValueError(
                f"prompt and generated text are {tokens} tokens together, more than the model's maximum of "
                f"{self.max_length}; reduce `gen_length` or the prompt."
            )

    def _finish(
        self,
        latents: torch.Tensor,
        ids: torch.Tensor | None,
        gen_length: int,
        output_type: str,
        skip: list[int] | None = None,
    ) -> TokComPipelineOutput:
        """End texts at EOS, pad to `gen_length`; the first `skip` ids of each row are those of its prompt."""
        if output_type == "latent":
            self.maybe_free_model_hooks()
            return TokComPipelineOutput(latents=latents)
        if skip is not None and any(skip):
            places = torch.tensor(skip, device=ids.device)[:, None] + torch.arange(gen_length, device=ids.device)
            padded = torch.nn.functional.pad(ids, (0, max(skip) + gen_length), value=self._pad_token_id)
            ids = padded.gather(1, places)[:, : max(0, ids.shape[1] - min(skip))]
        sequences, mask = self._end_at_eos(ids[:, :gen_length])
        missing = gen_length - sequences.shape[1]
        if missing > 0:
            sequences = torch.nn.functional.pad(sequences, (0, missing), value=self._pad_token_id)
            mask = torch.nn.functional.pad(mask, (0, missing))
        self.maybe_free_model_hooks()
        texts = self._to_texts(sequences, mask) if output_type == "text" else None
        return TokComPipelineOutput(texts=texts, sequences=sequences, latents=latents, attention_mask=mask)

    # ---- the other modes ----

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
        self.require_tokens()
        self.check_inputs(num_chunks, num_inference_steps, output_type, [])
        multiple = self.model.config.codec_config.latents_multiple
        if num_chunks % multiple:
            raise ValueError(
                f"`num_chunks` ({num_chunks}) must be a multiple of {multiple}, a row of patches of this model."
            )
        self._check_length(num_chunks)
        noise = self.prepare_latents(batch_size, num_chunks, generator, latents)
        sampling = {"num_inference_steps": num_inference_steps, "temperature": temperature, "top_p": top_p}
        result = self._sample(noise, generator=generator, decode=output_type != "latent", **sampling)
        return self._finish(*result, num_chunks * self.chunk_size, output_type)

    @torch.no_grad()
    def encode(self, text: str | list[str], output_file: str | os.PathLike | None = None) -> TokComPipelineOutput:
        """Mode 4: texts -> latents, and a safetensors file with `latents` and `attention_mask` if a name is given.

        A codec with a quantiser also gives `codes`, which are what the file then holds.
        """
        self.require_tokens()
        texts = list(text) if isinstance(text, (list, tuple)) else [text]
        if not texts:
            raise ValueError("`text` is an empty list; give at least one text.")
        ids, mask = self._pad(self._tokenize(texts, "text"), "right")
        encoded = self.model.encode(ids, mask)
        latents, codes = encoded.latents, encoded.codes
        self.maybe_free_model_hooks()
        if output_file is not None:
            tensors = {"latents": latents.float().cpu().contiguous(), "attention_mask": mask.cpu().contiguous()}
            if codes is not None:
                small = [t for t in (torch.int16, torch.int32) if int(codes.max()) <= torch.iinfo(t).max]
                tensors = {
                    "codes": codes.to([*small, codes.dtype][0]).cpu(),
                    "attention_mask": mask.to(torch.uint8).cpu(),
                }
            save_file(tensors, str(output_file), metadata={"format": "pt", "chunk_size": str(self.chunk_size)})
        return TokComPipelineOutput(sequences=ids, latents=latents, attention_mask=mask, codes=codes)

    @torch.no_grad()
    def decode(
        self, latents: torch.Tensor | str | os.PathLike, attention_mask: torch.Tensor | None = None
    ) -> TokComPipelineOutput:
        """Latents `(B, N, C)`, integer codes `(B, N, R)`, or a file that `encode` wrote, -> text.

        `attention_mask (B, N * K)` hides padding.
        """
        self.require_tokens()
        if not isinstance(latents, torch.Tensor):
            latents, attention_mask = _read_latents(latents, self.chunk_size)
        form = {}
        if not latents.is_floating_point():
            latents, form = self.model.from_codes(latents.long().to(self._execution_device)), {"quantized": True}
        channels = self.model.config.codec_config.latent_channels
        if latents.ndim != 3 or latents.shape[-1] != channels:
            raise ValueError(f"`latents` has shape {tuple(latents.shape)} but (B, N, {channels}) is needed.")
        sequences = self.model.to_ids(latents.to(self._execution_device), **form)
        self.maybe_free_model_hooks()
        mask = torch.ones_like(sequences) if attention_mask is None else attention_mask.to(sequences.device)
        if mask.shape != sequences.shape:
            raise ValueError(f"`attention_mask` has shape {tuple(mask.shape)} but {tuple(sequences.shape)} is needed.")
        return TokComPipelineOutput(
            texts=self._to_texts(sequences, mask), sequences=sequences, latents=latents, attention_mask=mask
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
        model that predicts tokens keeps each token with that probability, and draws the others with what stands around
        them; a token that is kept at one level is kept at every higher one. A model that regresses latents keeps that
        share of them, `noise_level * latents + (1 - noise_level) * noise`, and takes the remaining
        `num_inference_steps * (1 - noise_level)` steps, at least one. How many tokens survive is in docs/modes.md.
        """
        if not 0.0 <= noise_level <= 1.0:
            raise ValueError(f"`noise_level` ({noise_level}) must be in [0, 1]: 0 is pure noise, 1 is the clean text.")
        self.check_inputs(1, num_inference_steps, "text", [])
        encoded = self.encode(text)
        if noise_level == 1.0:
            return self.decode(encoded.latents, encoded.attention_mask)
        self._check_length(encoded.latents.shape[1])
        settings = {"num_inference_steps": num_inference_steps, "temperature": temperature, "top_p": top_p}
        if self._continues_chunks:
            return self._redraw(encoded, noise_level, generator, **settings)
        latents = encoded.latents.float()
        noise = self.prepare_latents(latents.shape[0], latents.shape[1], generator)
        sampler = self._sampler(**settings)
        steps = max(1, round(sampler.num_inference_steps * (1 - noise_level)))
        result, _ = self._sample(
            sampler.add_noise(latents, noise, noise_level),
            valid=encoded.attention_mask.unflatten(1, (-1, self.chunk_size)).any(-1),
            generator=generator,
            sigma_start=1 - noise_level,
            decode=False,
            **settings | {"num_inference_steps": steps},
        )
        return self.decode(result, encoded.attention_mask)

    def _redraw(self, encoded: TokComPipelineOutput, share: float, generator, **settings) -> TokComPipelineOutput:
        """Texts of which each token is kept with probability `share`, and the others are drawn."""
        sources = spawn_generators(generator, len(encoded.sequences))
        sequences = encoded.sequences.clone()
        for row, source in enumerate(sources):
            real = encoded.attention_mask[row].bool()
            ids = encoded.sequences[row, real].tolist()
            filled, _ = self._fill(ids, kept_tokens(len(ids), share, source), generator=source, **settings)
            sequences[row, real] = torch.tensor(filled, device=sequences.device)
        self.maybe_free_model_hooks()
        texts = self._to_texts(sequences, encoded.attention_mask)
        return TokComPipelineOutput(texts=texts, sequences=sequences, attention_mask=encoded.attention_mask)

    @torch.no_grad()
    def infill(
        self,
        text: str,
        gap_length: int = 16,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        temperature: float | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> TokComPipelineOutput:
        """Fill every gap `____` in `text` with `gap_length` tokens that see what stands before and after it.

        Returns the whole text. Raises `ValueError` when there is no gap or nothing but gaps.
        """
        self.check_inputs(gap_length, num_inference_steps, "text", [])
        if not isinstance(text, str):
            raise ValueError(f"`text` must be one text, not {text!r}; call infill for each.")
        pieces = text.split(GAP)
        if len(pieces) < 2 or not any(piece.strip() for piece in pieces):
            raise ValueError(f"`text` ({text!r}) must hold known text and at least one gap, written {GAP!r}.")
        rows = []
        for i, piece in enumerate(pieces):
            last = i == len(pieces) - 1
            kept = piece if last else piece.rstrip(" ")  # the gap's first word brings its own space
            rows.append(self._tokenize([kept], "text")[0] if piece.strip() else [])
        settings = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "temperature": temperature,
            "top_p": top_p,
            "generator": generator,
        }
        fill = self._fill_gaps if self._continues_chunks else self._fill_latents
        gaps, latents = fill(rows, gap_length, **settings)
        self.maybe_free_model_hooks()
        filled = pieces[0]
        for row, gap, piece in zip(rows, gaps, pieces[1:]):
            filled += self._continue_text(filled, row, gap) + piece
        return TokComPipelineOutput(texts=[filled], sequences=torch.tensor(gaps), latents=latents)

    def _check_filled_length(self, tokens: int) -> None:
        if tokens > self.max_length:
            raise ValueError(
                f"`text` with its gaps has {tokens} tokens, more than the model's maximum of {self.max_length}; shorten it."
            )

    def _fill_gaps(
        self, rows: list[list[int]], gap_length: int, **settings
    ) -> tuple[list[list[int]], torch.Tensor | None]:
        """Ids that fill the gaps between `rows` of ids, and the latents `(1, n, C)` that hold them, of a model that predicts
        tokens."""
        ids, known, starts = [], [], []
        for i, row in enumerate(rows):
            ids += row
            known += [True] * len(row)
            if i < len(rows) - 1:
                starts.append(len(ids))
                ids += [0] * gap_length
                known += [False] * gap_length
        filled, latents = self._fill(ids, known, **settings)
        return [filled[start : start + gap_length] for start in starts], latents

    def _fill(
        self, ids: list[int], known: list[bool], generator=None, **settings
    ) -> tuple[list[int], torch.Tensor | None]:
        """Draw the ids of one text that are not `known`, which may stand anywhere in a chunk; all ids, and the latents of what
        was generated.

        Chunks of which everything is known are context. The others are generated in reading order, with what is known of
        them; where a gap ends inside a chunk, its known end is in the context, too.
        """
        if all(known):
            return ids, None
        codec, size, device = self.model.codec, self.chunk_size, self._execution_device
        length = self._num_latents(len(ids))
        self._check_filled_length(length * size)
        padding = length * size - len(ids)
        tokens = torch.tensor([ids + [self._pad_token_id] * padding], device=device)
        is_known = torch.tensor([known + [False] * padding], device=device)
        wanted = torch.tensor([[not k for k in known] + [False] * padding], device=device)
        given = TokComGiven(*codec.symbols(tokens, is_known.long()))
        open_chunks = ~given.mask[0].all(-1)  # (n,)
        needed = codec.to_chunks(wanted.long(), None)[0][0].bool().any(-1)
        gaps, context_at = None, (~open_chunks).nonzero()[:, 0].tolist()
        generated = (open_chunks & needed).nonzero()[:, 0].tolist()
        if self.model.config.transformer_config.start_latents:
            gaps, context_at, generated = _gap_layout(open_chunks.tolist(), needed.tolist(), given.mask[0])
        context = None
        if context_at:
            clean = self.model.encode(tokens, is_known.long())
            index = torch.tensor(context_at, device=device)
            context = TokComCodecOutput(clean.latents[:, index], codec.positions(index[None]), clean.mask[:, index])
        places = torch.tensor(generated, device=device)
        edges = [i for i in range(1, len(generated)) if generated[i] != generated[i - 1] + 1]
        noise = self.prepare_latents(1, len(generated), generator)
        latents, drawn = self._sample(
            noise,
            context,
            codec.positions(places[None]),
            generator=generator,
            edges=tuple(edges),
            given=TokComGiven(given.chunks[:, places], given.mask[:, places]),
            gaps=gaps,
            **settings,
        )
        # tokens of chunks that were not generated are known, so they never show
        chunks = codec.to_chunks(tokens, None)[0].clone()
        chunks[0, places] = codec.to_chunks(drawn, None)[0][0]
        whole = chunks.flatten(1) if not hasattr(codec, "from_patches") else codec.from_patches(chunks)
        return torch.where(is_known, tokens, whole)[0, : len(ids)].tolist(), latents

    def _fill_latents(
        self, rows: list[list[int]], gap_length: int, generator=None, **settings
    ) -> tuple[list[list[int]], torch.Tensor]:
        """The same of a model that regresses latents: gaps are whole chunks, and the text before is padded on its left."""
        known, mask, known_at, gap_at, position = [], [], [], [], 0
        gap_latents = self._num_latents(gap_length)
        for i, row in enumerate(rows):
            if row:
                ids, real = self._pad([row], "left" if i == 0 else "right")
                size = ids.shape[1] // self.chunk_size
                known.append(ids)
                mask.append(real)
                known_at.extend(range(position, position + size))
                position += size
            if i < len(rows) - 1:
                gap_at.extend(range(position, position + gap_latents))
                position += gap_latents
        self._check_filled_length(position * self.chunk_size)
        context = self.model.encode(torch.cat(known, dim=1), torch.cat(mask, dim=1))
        positions = self.model.codec.positions
        context.position_ids = positions(torch.tensor([known_at], device=context.latents.device))
        latents, ids = self._sample(
            self.prepare_latents(1, len(gap_at), generator),
            context,
            positions(torch.tensor([gap_at], device=context.latents.device)),
            generator=generator,
            edges=tuple(range(gap_latents, len(gap_at), gap_latents)),
            **settings,
        )
        return ids.view(len(rows) - 1, -1)[:, :gap_length].tolist(), latents

    # ---- texts as pictures, for models whose tokens are pixels ----

    def _color_codec(self) -> TokComColorCodec:
        if not isinstance(self.model.codec, TokComColorCodec):
            raise ValueError(
                f"the tokens of this model are no pixels (codec {self.model.codec.config.model_type!r}); load a pixel model."
            )
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


def kept_tokens(count: int, share: float, source: torch.Generator) -> list[bool]:
    """Which of `count` tokens are kept when each is with probability `share`; those of one share are among those of a larger."""
    return (torch.rand(count, generator=source) < share).tolist()


def _gap_layout(
    open_chunks: list[bool], needed: list[bool], known: torch.Tensor
) -> tuple[TokComGaps | None, list[int], list[int]]:
    """How a text with gaps is read and generated by a model with `start_latents`.

    Args: which chunks are not wholly known, which of them are to be generated, and `known (n, K)` tokens.
    Returns: the gaps, the chunks of the context and the chunks to generate.
    """
    count = len(open_chunks)
    is_last = [open_chunks[i] and (i + 1 == count or not open_chunks[i + 1]) for i in range(count)]
    ends_inside = [is_last[i] and bool(known[i].any()) for i in range(count)]
    context_at = [i for i in range(count) if not open_chunks[i] or ends_inside[i]]
    generated = [i for i in range(count) if open_chunks[i] and needed[i]]
    lengths, anchors, ends_known = [], [], []
    for i, place in enumerate(generated):
        if i == 0 or generated[i - 1] != place - 1:
            lengths.append(0)
            anchors.append(context_at.index(place - 1) if place else None)
            ends_known.append(False)
        lengths[-1] += 1
        ends_known[-1] = ends_inside[place]
    partial = ~known[torch.tensor(context_at, dtype=torch.long, device=known.device)][None]
    return TokComGaps(lengths, anchors, ends_known, partial), context_at, generated


def join_blocks(
    blocks: Iterator[tuple[torch.Tensor, torch.Tensor | None]], like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Blocks of latents and ids -> all latents `(B, n, C)` and ids `(B, n * K)`, None if some are; of no block at all n is 0 and
    the rest as `like (B, ..., C)`."""
    found = list(blocks)
    if not found:
        return like[:, :0], torch.zeros(len(like), 0, dtype=torch.long, device=like.device)
    latents, ids = zip(*found)
    return torch.cat(latents, dim=1), None if any(x is None for x in ids) else torch.cat(ids, dim=1)


def _read_latents(file: str | os.PathLike, chunk_size: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Latents and mask of a file that `encode` wrote; `ValueError` if it is none or belongs to another model."""
    try:
        with safe_open(str(file), framework="pt") as tensors:
            found = (tensors.metadata() or {}).get("chunk_size", str(chunk_size))
            latents = tensors.get_tensor("codes" if "codes" in tensors.keys() else "latents")
            mask = tensors.get_tensor("attention_mask") if "attention_mask" in tensors.keys() else None
    except SafetensorError as error:
        raise ValueError(f"{file} is not a latents file written by encode ({error}).") from error
    if found != str(chunk_size):
        raise ValueError(f"{file} holds chunks of {found} tokens, this model's hold {chunk_size}.")
    return latents, mask


__all__ = [
    "GAP",
    "TokComPiece",
    "TokComPipelineOutput",
    "TokComTextMixin",
    "join_blocks",
    "kept_tokens",
    "text_ids",
    "vocabulary_size",
    "with_pad_token",
]
