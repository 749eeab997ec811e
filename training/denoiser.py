"""A TokCom model as the plain denoiser that distillation needs: `(x_t, t, context) -> estimate of
x1`.

Shape legend: B samples, N latents, C channels; times `(B,)`.
"""

import numpy as np
import torch
from torch import nn

from tokcom.codec_chunk_tokcom import TokComCodecOutput
from tokcom.modeling_tokcom import TokComModel
from tokcom.transformer_tokcom import block_causal_mask

Context = dict[str, torch.Tensor]


class ModelDenoiser(nn.Module):
    """A model's estimate, given captions or the clean text before each block.

    Args:
        guidance_scale (`float`): how far the estimate is pushed away from the one without context;
            1 is no guidance, and one evaluation of the network instead of two.
    """

    def __init__(self, model: TokComModel, guidance_scale: float = 1.0):
        super().__init__()
        self.model = model
        self.guidance_scale = guidance_scale

    def forward(self, x: torch.Tensor, t: torch.Tensor, context: Context) -> torch.Tensor:
        """Estimate of x1 `(B, N, C)` for `x (B, N, C)` at times `t (B,)`; `context` is what
        `context` returns."""
        guided = self._estimate(x, t, context, sees_context=True)
        if self.guidance_scale == 1.0:
            return guided
        free = self._estimate(x, t, context, sees_context=False)
        return free + self.guidance_scale * (guided - free)

    def _estimate(
        self, x: torch.Tensor, t: torch.Tensor, context: Context, sees_context: bool
    ) -> torch.Tensor:
        if self.model.config.transformer_config.block_size is None:
            return self._estimate_at_once(x, t, context, sees_context)
        return self._estimate_blocks(x, t, context, sees_context)

    def _estimate_at_once(self, x, t, context: Context, sees_context: bool) -> torch.Tensor:
        """Bidirectional models, whose context is a caption, or latents that are known at t = 1."""
        model = self.model
        length = x.shape[1]
        known = context.get("known")
        times = t[:, None].expand(-1, length)  # (B, N)
        prefix = None
        if sees_context and model.condition_embedding is not None:
            prefix = model.condition(context["input_ids"], context["attention_mask"])
        if sees_context and known is not None:
            # given latents are clean at t = 1 whatever the time of the others, as in training
            x = torch.where(known[..., None], context["latents"], x)
            times = torch.where(known, 1.0, times)
        seen = context.get("valid")
        # the pipeline guides so, too: without what is given in the sequence
        if known is not None and not sees_context:
            seen = ~known if seen is None else seen & ~known
        positions = model.codec.positions(torch.arange(length, device=x.device)).expand(
            len(x), -1, -1
        )
        size = model.config.codec_config.group_size
        estimate = model.denoise(x, times, positions, seen, prefix=prefix, group_size=size)
        estimate = estimate.latents.float()
        if known is None:
            return estimate
        # what is given needs no estimate, and must not pull the student anywhere
        return torch.where(known[..., None], context["latents"], estimate)

    def _estimate_blocks(self, x, t, context: Context, sees_context: bool) -> torch.Tensor:
        """Block-causal models: all blocks at once, each after the clean text before it."""
        model = self.model
        length = x.shape[1]
        sees = torch.full((len(x),), sees_context, device=x.device)
        # (B, 2 N, 2 N): the clean half first, which noisy latents of a larger order see
        mask = block_causal_mask(context["order"], context["valid"], sees)
        positions = model.codec.positions(torch.arange(length, device=x.device).expand(len(x), -1))
        # (B, 2 N)
        times = torch.cat((t.new_ones(len(x), length), t[:, None].expand(-1, length)), dim=1)
        both = torch.cat((context["latents"], x), dim=1)  # (B, 2 N, C)
        latents = model.denoise(
            both, times, positions.repeat(1, 2, 1), mask, num_context=length
        ).latents
        # the noisy half; of clean latents nothing is asked
        return latents[:, -length:].float()

    @torch.no_grad()
    def context(self, batch: dict[str, torch.Tensor], rows: np.ndarray | None = None) -> Context:
        """What the estimate depends on, of a batch of the data.

        A bidirectional model of clips is given the first i mod F of the F moments of row i of the
        data, so `rows (B,)` must say which rows these are.
        """
        model = self.model
        codec = model.config.codec_config
        block_size = model.config.transformer_config.block_size
        captions = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        if codec.has_tokens:
            clean = model.codec.encode(batch["input_ids"], batch["attention_mask"])
            context = _clean_blocks(clean, block_size)
            if block_size is None and "known_mask" in batch:
                # of dialogues the prompt is given, as in training
                context["known"] = model.codec.whole_chunks(batch["known_mask"])
            return context
        if block_size is None and codec.group_size == 1:
            return captions  # a picture is one group, of which no part can be given
        clean = model.codec.encode(batch["pixel_values"])
        if block_size is None:
            return {**captions, **_first_moments(clean, codec.group_size, rows)}
        return _clean_blocks(clean, block_size)


def _clean_blocks(clean: TokComCodecOutput, block_size: int | None) -> Context:
    """The clean latents, of which each block sees those of smaller order."""
    length = clean.mask.shape[1]
    # without blocks all latents are one, of order 0
    order = torch.arange(length, device=clean.mask.device) // (block_size or length)
    return {
        "latents": clean.latents,
        "order": order.expand(len(clean.mask), -1),  # (B, N)
        "valid": clean.mask,
    }


def _first_moments(clean: TokComCodecOutput, group_size: int, rows: np.ndarray) -> Context:
    """The first i mod F of the F moments of row i: none for some rows, all but one for others."""
    length = clean.mask.shape[1]
    device = clean.mask.device
    moments = torch.arange(length, device=device) // group_size  # (N,)
    given = torch.as_tensor(rows, device=device) % (length // group_size)  # (B,)
    return {"latents": clean.latents, "known": moments < given[:, None]}
