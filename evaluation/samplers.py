"""One sampling interface for TokCom and its autoregressive peer, so the same code measures both.

`sampler.sample(prompts, length, seed, count)` returns ids `(B, length)` that continue
`prompts (B, P)`, or `count` unconditional samples if `prompts` is None. `AutoregressivePipeline`
puts the peer behind the server.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel

from tokcom.interface_tokcom import StreamedText
from tokcom.pipeline_tokcom import TokComPiece, TokComPipeline
from tokcom.processing_tokcom import vocabulary_size
from tokcom.sampling_tokcom import TokComSampling
from tokcom.tasks_tokcom import TokComTask, num_latents
from tokcom.training.precision import half_precision


@dataclass
class TokComSampler:
    """Sample from a TokCom pipeline.

    `noise_scale` multiplies the initial noise, and for few-step students also the noise drawn in
    each step. `eta` is the scheduler's.
    """

    pipe: TokComPipeline
    num_inference_steps: int | None = None
    guidance_scale: float = 1.0
    noise_scale: float = 1.0
    eta: float = 0.0
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int = 256

    @torch.no_grad()
    def sample(
        self, prompts: np.ndarray | None, length: int, seed: int, count: int = 0
    ) -> np.ndarray:
        pipe = self.pipe
        rows = []
        pipe.scheduler.register_to_config(eta=self.eta)
        # such a scheduler draws noise at every step, whose size it knows as `noise_std`
        if pipe.scheduler.config.get("stochastic_sampling"):
            pipe.scheduler.register_to_config(
                noise_std=pipe.model.config.noise_std * self.noise_scale
            )
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(seed)
        total = count if prompts is None else len(prompts)
        for start in tqdm(range(0, total, self.batch_size), desc="TokCom", leave=False):
            size = min(self.batch_size, total - start)
            sampling = TokComSampling(
                self.num_inference_steps,
                self.guidance_scale,
                temperature=self.temperature,
                top_p=self.top_p,
                generator=generator,
            )
            with half_precision(pipe._execution_device.type):
                if prompts is None:  # not `pipe.generate`, which cannot scale the noise
                    noise = pipe.prepare_latents(
                        size, num_latents(pipe.model.config, length), generator
                    )
                    _, ids = pipe.sample_latents(TokComTask(noise * self.noise_scale), sampling)
                else:
                    known = prompts[start : start + size].tolist()
                    # held-out prompts are cut from the middle of texts
                    inside = [True] * len(known)
                    skip, blocks = pipe.continue_ids(
                        known, length, sampling, noise_scale=self.noise_scale, inside=inside
                    )
                    # all prompts have one length, so the known tokens of the first chunk are as
                    # many in every row
                    ids = torch.cat([ids for _, ids in blocks], dim=1)[:, skip[0] :]
            rows.append(ids[:, :length].cpu().numpy())
        ids = np.concatenate(rows)
        # judges have no pad token
        return np.where(ids < vocabulary_size(pipe.tokenizer), ids, pipe.tokenizer.eos_token_id)


@dataclass
class AutoregressiveSampler:
    """Sample from a causal language model with its key/value cache."""

    model: PreTrainedModel
    start_token: int
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int = 256

    @torch.no_grad()
    def sample(
        self, prompts: np.ndarray | None, length: int, seed: int, count: int = 0
    ) -> np.ndarray:
        torch.manual_seed(seed)
        # samples have a fixed length: EOS is a token like any other
        self.model.generation_config.eos_token_id = None
        if prompts is None:  # a new text begins after the end of a document
            prompts = np.full((count, 1), self.start_token)
        rows = []
        for start in tqdm(
            range(0, len(prompts), self.batch_size), desc="autoregressive", leave=False
        ):
            ids = torch.from_numpy(prompts[start : start + self.batch_size].astype(np.int64)).to(
                self.model.device
            )
            with half_precision(ids.device.type):
                output = self.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=length,
                    do_sample=True,
                    temperature=self.temperature,
                    top_p=self.top_p,
                    top_k=0,
                    pad_token_id=self.start_token,
                )
            rows.append(output[:, ids.shape[1] :].cpu().numpy())
        return np.concatenate(rows)


class AutoregressivePipeline:
    """A causal language model with the part of `TokComPipeline` that the server uses.

    One turn writes as many tokens of every text as a block of the pipeline `like`, whose tokenizer
    and limits it has. It knows no denoising steps and no guidance, and ignores them.
    """

    def __init__(self, model: PreTrainedModel, like: TokComPipeline):
        self.network = model
        self.model = SimpleNamespace(config=like.model.config)
        self.tokenizer = like.tokenizer
        self.max_length = like.max_length
        self.turn = like.chunk_size * (like.model.config.transformer_config.block_size or 1)

    @torch.no_grad()
    def stream_batch(
        self,
        prompts: list[list[int]],
        gen_length: list[int],
        num_inference_steps: int | None,
        guidance_scale: float,
        temperature: float | None,
        top_p: float | None,
        generator: list[torch.Generator],
        should_stop: Callable[[], bool],
    ) -> Iterator[list[TokComPiece]]:
        """As `TokComPipeline.stream_batch`; prompts are padded on the left."""
        if top_p not in (None, 1.0):
            raise ValueError(f"`top_p` ({top_p}) must be 1 for this peer.")
        width = max(map(len, prompts))
        device = self.network.device
        ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
        mask = mask.to(device)
        eos = self.tokenizer.eos_token_id
        texts = [
            StreamedText(self.tokenizer, row, row, length, 0, eos)
            for row, length in zip(prompts, gen_length)
        ]
        cache = DynamicCache(config=self.network.config)
        while not all(text.piece.finish_reason for text in texts):
            block = []
            for _ in range(self.turn):
                if should_stop():
                    return
                # a token's place among those that are no padding; the last columns are the new
                # tokens
                position_ids = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
                logits = self.network(
                    ids,
                    attention_mask=mask,
                    position_ids=position_ids,
                    past_key_values=cache,
                    logits_to_keep=1,
                ).logits[:, -1]
                edges = (logits / (temperature or 1.0)).softmax(-1).cumsum(-1)  # (B, V)
                # each row from its own generator, so company in a batch does not change a text
                # (B, 1)
                uniform = torch.stack([torch.rand(1, generator=source) for source in generator])
                # inverse transform sampling, as TokCom's token head draws
                # (B, 1)
                ids = torch.searchsorted(edges, uniform.to(device) * edges[:, -1:], right=True)
                # a number that rounds up to the sum would lie behind the last token
                ids = ids.clamp_max(edges.shape[1] - 1)
                mask = torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)
                block.append(ids)
            rows = torch.cat(block, dim=1).tolist()
            yield [text.add(row) for text, row in zip(texts, rows)]
