"""TokComForCausalLM: a TokCom model as the causal language model that other people's tools expect.

Notable choices:
- A model whose blocks are one chunk and whose tokens take turns gives each token an exact
  probability given all tokens before it. Nothing is sampled or approximated to compute `logits`.
- Chunks count from the first real token of each row, so rows with different padding are at
  different places of their chunks. What the cache holds is therefore addressed by row.
- The context network runs once per finished chunk, the light head once per token.

Shape legend: B rows, S new tokens, K tokens per chunk, N chunks, R rows that pass the head,
D width, V vocabulary.
"""

import inspect
from dataclasses import dataclass

import torch
from transformers import (
    Cache,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,  # noqa: F401  diffusers looks the base class up in the module of a component
)
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_tokcom import TokComConfig
from .modeling_tokcom import TokComModel
from .transformer_tokcom import START_OF_TEXT

# transformers 5.24 renames the cache in `generate`, and passes it to `forward` by its new name
PREPARE = inspect.signature(GenerationMixin.prepare_inputs_for_generation)
CACHE = "cache" if "cache" in PREPARE.parameters else "past_key_values"
MODES = "use greedy decoding, sampling or beams (`do_sample`, `num_beams`)"
# arguments of `generate` that do nothing sensible here, and what to do instead
REFUSED = {
    "assistant_model": MODES,
    "prompt_lookup_num_tokens": MODES,
    "assistant_early_exit": MODES,
    "penalty_alpha": MODES,
    "dola_layers": MODES,
    "num_beam_groups": MODES,
    "force_words_ids": MODES,
    "constraints": MODES,
    "guidance_scale": "use TokComPipeline, whose `guidance_scale` strengthens the prompt",
    "cache_implementation": "leave it out, the model has a cache of its own",
    "prefill_chunk_size": "leave it out, a prompt is read at once",
    "token_healing": "leave it out, a prompt may end inside a chunk",
    "inputs_embeds": "give `input_ids`, the model reads chunks of ids",
    "output_attentions": "leave it out, the layers read chunks and not tokens",
    "output_hidden_states": "leave it out, the layers read chunks and not tokens",
}


@dataclass
class TokComCausalOutput(CausalLMOutputWithPast):
    """What `TokComForCausalLM.forward` returns.

    Args:
        loss (`torch.FloatTensor`, *optional*): mean nats of the labels.
        logits (`torch.FloatTensor` of shape `(B, S, V)`): of the token after each.
        past_key_values (`TokComTextCache`, *optional*): what the next call needs.
        last_hidden_state (`torch.FloatTensor` of shape `(B, S, E)`): what the output layer,
            `get_output_embeddings()`, turns into logits; trainers with a fused loss read it.
    """

    last_hidden_state: torch.FloatTensor | None = None


class TokComTextCache:
    """What has been read of texts: ids, the context layers' keys and values, a state per chunk.

    Place 0 of keys, values and states is the learned start of a text, place n + 1 is chunk n. Rows
    are independent: each has `lengths` real tokens, whatever padding stood before or between them.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, num_layers: int):
        # asked by `generate`: no layer has a state instead of keys
        self.is_linear = [False] * num_layers
        self.keys: list[torch.Tensor | None] = [None] * num_layers
        self.values: list[torch.Tensor | None] = [None] * num_layers
        self.states: torch.Tensor | None = None  # (B, 1 + N, D)
        self.ids: torch.Tensor | None = None  # (B, N * K)
        self.lengths: torch.Tensor | None = None  # (B,), real tokens of each row
        self.lengths_before: torch.Tensor | None = None  # the same before this call
        self.symbols = None  # of the token head
        self.seen = 0  # tokens, padding included
        self.keeps_expected = False  # whether somebody wants to see drafts
        # states (K - k, E) of the last chunk's tokens from k on
        self.expected: torch.Tensor | None = None
        self.rows: torch.Tensor | None = None  # that read chunks now, (R,)
        self.places: torch.Tensor | None = None  # of those chunks, (R, m)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that were read, padding included."""
        return self.seen

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add keys and values `(R, H, m, size)` at `places` of `rows`; returns all of those rows.

        The first call of a layer, for all rows, makes its buffers; whoever sets `places` makes room
        for them.
        """
        if self.rows is None:
            self.keys[layer_idx] = keys
            self.values[layer_idx] = values
            return keys, values
        found = []
        for store, new in ((self.keys, keys), (self.values, values)):
            buffer = store[layer_idx]
            # indices on both sides of a slice come first in the result: (R, m, H, size)
            buffer[self.rows[:, None], :, self.places] = new.transpose(1, 2)
            found.append(buffer[self.rows])  # (R, H, W, size)
        return found[0], found[1]

    def _map(self, function) -> None:
        """Replace every tensor `(B, ...)` by `function` of it."""
        self.keys = [None if x is None else function(x) for x in self.keys]
        self.values = [None if x is None else function(x) for x in self.values]
        self.states = function(self.states)
        self.ids = function(self.ids)
        self.lengths = function(self.lengths)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map(lambda x: x[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))


class DraftProcessor:
    """Shows a streamer what the model makes of the chunk at hand before each token is drawn.

    A logits processor of `generate`. The draft is the likeliest token of every place of the chunk
    that is still open.
    """

    def __init__(self, streamer, model: "TokComForCausalLM", cache: TokComTextCache):
        self.streamer = streamer
        self.model = model
        self.cache = cache

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logits = self.model.token_head.logits(self.cache.expected)
        draft = logits.argmax(-1)  # (K - k,)
        draft[0] = scores[0].argmax()  # what the other processors allow
        self.streamer.put_draft(draft.cpu())
        return scores


def _grown(tensor: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """`tensor` with zeros behind it, to at least `size` places along `dim` and often more."""
    missing = size - tensor.shape[dim]
    if missing <= 0:
        return tensor
    shape = list(tensor.shape)
    # at least twice as many: a place at a time would copy the cache for every chunk
    shape[dim] = max(missing, tensor.shape[dim])
    return torch.cat((tensor, tensor.new_zeros(shape)), dim=dim)


class TokComForCausalLM(TokComModel, GenerationMixin):
    """A text model that predicts tokens in turn, with the interface of a causal language model.

    Its weights are those of `TokComModel`. `generate` takes what it takes for other models of
    transformers: greedy decoding, sampling with its processors, beams, stop strings, streamers.
    Raises `ValueError` for other models: those that regress latents, decide several chunks at once
    or have no turns have no exact probability of a next token.
    """

    main_input_name = "input_ids"
    _supports_cache_class = False

    def __init__(self, config: TokComConfig):
        if not config.is_causal_lm:
            transformer = config.transformer_config
            raise ValueError(
                "only a model whose blocks are one chunk and whose tokens take turns is a causal "
                f"language model; this one has `prediction_type` {config.prediction_type!r}, "
                f"`block_size` {transformer.block_size}, `start_latents` "
                f"{transformer.start_latents} and `token_stagger` {config.token_stagger}. Load it "
                "with AutoModel, and generate with its pipeline."
            )
        super().__init__(config)

    @classmethod
    def sharing(cls, model: TokComModel) -> "TokComForCausalLM":
        """The causal language model that has the modules of `model`, such as a pipeline's.

        Nothing is copied. Raises `ValueError` for a model that is none.
        """
        if isinstance(model, cls):
            return model
        with torch.device("meta"):  # no memory, as all of its modules are replaced
            causal = cls(model.config)
        for name, module in model.named_children():
            setattr(causal, name, module)
        causal.training = model.training
        return causal

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` makes its own

    def get_output_embeddings(self):
        return self.token_head

    def resize_token_embeddings(self, *args, **kwargs):
        """Refused: the codec's latents stand for the vocabulary it was trained with."""
        raise ValueError(
            f"the vocabulary of {self.config.vocab_size} ids cannot be resized: the codec's "
            "latents stand for these tokens. Use the tokenizer saved beside the model, or train a "
            "model for another one."
        )

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        past_key_values: TokComTextCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: TokComTextCache | None = None,
        **loss_kwargs,
    ) -> TokComCausalOutput:
        """Exact logits of every next token.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, S)`): any S; with a cache only what is new.
            attention_mask (`torch.Tensor` of shape `(B, S)` or `(B, past + S)`, *optional*): 0
                marks padding, on either side. Chunks count from the first real token of each row.
            labels (`torch.LongTensor` of shape `(B, S)`, *optional*): the same ids, -100 where
                nothing is scored. They are shifted here, so the first token of a text is never
                scored, nor is one behind padding.
            past_key_values (`TokComTextCache`, *optional*): what an earlier call returned; `cache`
                is its name in newer versions of transformers.
            use_cache (`bool`, *optional*): return a cache; by default only if one is given.
            logits_to_keep (`int` or `torch.LongTensor`): compute the logits of the last tokens
                only, or of these places; 0 is all.
            position_ids: not needed, the mask says where tokens stand.
            loss_kwargs: those of transformers' loss, such as `num_items_in_batch`.

        Returns `logits (B, S, V)`, of which `logits[:, i]` belong to the token after
        `input_ids[:, i]`, given all up to it; `loss` (mean nats of the labels) and the cache.
        Logits of padding are 0, but the first ones that are kept continue the text before them.
        Raises `ValueError` for ids outside the vocabulary, texts longer than
        `max_position_embeddings`, a filled cache of another model, and labels of which only a part
        has logits.
        """
        if inputs_embeds is not None or output_attentions or output_hidden_states:
            raise ValueError(
                "`inputs_embeds`, `output_attentions` and `output_hidden_states` do not exist "
                "here: the model reads chunks of ids. Give `input_ids`."
            )
        if input_ids is None or input_ids.ndim != 2 or input_ids.is_floating_point():
            found = None if input_ids is None else f"{input_ids.dtype} {tuple(input_ids.shape)}"
            raise ValueError(f"`input_ids` ({found}) must be whole numbers of shape (B, S).")
        if input_ids.device.type == "cpu":
            self._check_ids(input_ids)
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError(
                "`labels` need the logits of all tokens; leave out `logits_to_keep` "
                f"({logits_to_keep})."
            )
        given = past_key_values if cache is None else cache
        is_kept = bool(use_cache) or given is not None
        cache = self._open_cache(given)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        real = mask[:, -input_ids.shape[1] :].bool()  # without what the cache holds
        where = self._append(cache, input_ids, real)  # (B, S)
        self._read_chunks(cache, is_kept)
        kept = logits_to_keep
        if isinstance(kept, int):
            kept = slice(-min(kept or input_ids.shape[1], input_ids.shape[1]), None)
        states, logits = self._next_logits(cache, where[:, kept], real[:, kept])
        loss = None
        if labels is not None:
            # the logits before such a token are those of padding
            behind_padding = torch.nn.functional.pad(~real[:, :-1], (1, 0))
            labels = labels.masked_fill(behind_padding, -100)
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=logits.shape[-1], **loss_kwargs
            )
        memory = {CACHE: cache if is_kept else None}  # under the name of this transformers
        output = TokComCausalOutput(loss=loss, logits=logits, last_hidden_state=states, **memory)
        return output.to_tuple() if return_dict is False else output

    def _open_cache(self, given: TokComTextCache | Cache | None) -> TokComTextCache:
        cache = given
        if not isinstance(given, TokComTextCache):
            # tools hand out an empty cache of transformers as if there were none
            if given is not None and given.get_seq_length():
                raise ValueError(
                    f"`past_key_values` is a {type(given).__name__} that holds tokens, and this "
                    "model has a cache of its own; leave it out, or give what an earlier call "
                    "returned."
                )
            cache = TokComTextCache(self.config.transformer_config.num_context_layers)
        if cache.symbols is None:
            cache.symbols = self.symbols()
        return cache

    def _append(
        self, cache: TokComTextCache, input_ids: torch.Tensor, real: torch.Tensor
    ) -> torch.Tensor:
        """Add the real tokens to the ids of their rows; returns each one's place, `(B, S)`."""
        size = self.config.codec_config.chunk_size
        batch = len(input_ids)
        if cache.ids is None:
            cache.ids = input_ids.new_zeros(batch, 0)
            cache.lengths = input_ids.new_zeros(batch)
        # counted among the real tokens of a row; padding gets some place, which is not used
        where = cache.lengths[:, None] + real.cumsum(1) - 1  # (B, S)
        lengths = cache.lengths + real.sum(1)
        longest = int(lengths.max())
        if longest > self.config.max_position_embeddings:
            raise ValueError(
                f"a text has {longest} tokens, more than the model's maximum of "
                f"{self.config.max_position_embeddings} (`max_position_embeddings`); shorten it, "
                "or generate with TokComPipeline, which goes on over a window."
            )
        # whole chunks that also hold the token to be predicted
        room = -(-(longest + 1) // size) * size
        ids = input_ids.new_zeros(batch, room + 1)  # padding goes to the last place
        ids[:, : min(room, cache.ids.shape[1])] = cache.ids[:, :room]
        ids.scatter_(1, torch.where(real, where, room), input_ids)
        cache.ids = ids[:, :room]
        cache.lengths_before = cache.lengths
        cache.lengths = lengths
        cache.seen += input_ids.shape[1]
        return where

    def _read_chunks(self, cache: TokComTextCache, is_kept: bool) -> None:
        """Let the context network read the chunks that are whole now; at first also the start."""
        size = self.config.codec_config.chunk_size
        done = cache.lengths // size  # (B,), whole chunks
        chunks = cache.ids.unflatten(1, (-1, size))  # (B, N, K)
        if cache.states is None:
            count = int(done.max())
            # (B, 1 + n)
            places = torch.arange(-1, count, device=chunks.device).expand(len(chunks), -1)
            # causal; rows with fewer chunks read some that are not whole, whose states nobody uses
            sees = places[:, None, :] <= places[:, :, None]
            features = self._features(cache, chunks[:, :count])
            # a row for the learned start, which `read_context` puts there
            features = torch.nn.functional.pad(features, (0, 0, 1, 0))
            places = torch.where(places < 0, START_OF_TEXT, places)
            memory = cache if is_kept else None
            cache.states = self.transformer.read_context(features, places[..., None], sees, memory)
            return
        before = cache.lengths_before // size  # (B,)
        rows = (done > before).nonzero()[:, 0]
        if not len(rows):
            return
        count = int((done - before).max())
        index = before[rows, None] + torch.arange(count, device=rows.device)  # (R, m)
        # a row with fewer new chunks reads one that is not whole; it is read again when it is
        index = index.clamp_max(chunks.shape[1] - 1)
        cache.rows = rows
        cache.places = index + 1  # behind the start
        # attention reads the whole buffer, and `sees` hides what is not filled
        used = max(int(cache.places.max()) + 1, cache.keys[0].shape[2])
        cache.keys = [_grown(keys, 2, used) for keys in cache.keys]
        cache.values = [_grown(values, 2, used) for values in cache.values]
        # (R, m, W)
        sees = torch.arange(cache.keys[0].shape[2], device=rows.device) <= cache.places[..., None]
        features = self._features(cache, chunks[rows[:, None], index])
        found = self.transformer.read_context(features, index[..., None], sees, cache)
        states = _grown(cache.states, 1, used)
        states[rows[:, None], cache.places] = found.to(states.dtype)
        cache.states = states

    def _features(self, cache: TokComTextCache, chunks: torch.Tensor) -> torch.Tensor:
        """What the network reads of whole chunks `(B, n, K)`: `(B, n, K * E)`."""
        return self.token_head.read(
            cache.symbols, None, torch.ones_like(chunks, dtype=torch.float32), chunks
        )

    def _next_logits(
        self, cache: TokComTextCache, where: torch.Tensor, real: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """States `(B, S, E)` and logits `(B, S, V)` of what follows `where`; 0 on padding, except
        that the first column continues the text before it."""
        head = self.token_head
        size = self.config.codec_config.chunk_size
        # `generate` asks for the last column alone, which is padding in rows that end earlier
        real = torch.cat((where[:, :1] >= 0, real[:, 1:]), dim=1)
        row, column = real.nonzero(as_tuple=True)  # (R,) each
        following = where[row, column] + 1
        chunk = following // size
        place = following % size  # inside the chunk
        known = place  # (R,), how many tokens of the chunk
        index = torch.arange(len(row), device=row.device)  # (R,), of what passes the head
        if self.config.transformer_config.local_head:
            # one pass over a chunk serves all of its places, which read only what is before them
            pairs, index = torch.stack((row, chunk)).unique(dim=1, return_inverse=True)
            row, chunk = pairs
            known = cache.lengths[row] - chunk * size
        own = cache.ids.unflatten(1, (-1, size))[row, chunk]  # (R, K)
        # tokens before this one are clean, this one and those after it are noise
        times = (torch.arange(size, device=row.device) < known[:, None]).float()
        features = head.read(cache.symbols, None, times[None], own[None])  # (1, R, K * E)
        # latents only give the shape here: `features` are read
        noise = features.new_zeros(1, len(row), self.config.codec_config.latent_channels)
        states = self.transformer(
            noise,
            # a turn begins at this time, and place n of the states is before chunk n
            (known / size)[None],
            features=features,
            entry=cache.states[row, chunk][None].to(features.dtype),
        ).latents[0]
        states = states.unflatten(-1, (size, -1))  # (R, K, E)
        if cache.keeps_expected:
            # of the last token of the last row: a streamer shows one text
            cache.expected = states[index[-1], int(place[-1]) :]
        states = states[index, place]  # (R, E), one for each real token
        found = head.logits(states)  # (R, V)
        whole = states.new_zeros(*where.shape, states.shape[-1]).masked_scatter(
            real[..., None], states
        )
        logits = found.new_zeros(*where.shape, found.shape[-1]).masked_scatter(
            real[..., None], found
        )
        return whole, logits

    # ---- generation ----

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ) -> None:
        """Refuse texts that are too long before anything is done; `forward` makes the cache."""
        longest = self.config.max_position_embeddings
        if max_cache_length > longest:
            raise ValueError(
                f"prompt and new tokens are {max_cache_length + 1}, more than the model's maximum "
                f"of {longest + 1} tokens; lower `max_new_tokens`, shorten the prompt, or use "
                "TokComPipeline, which goes on over a window."
            )

    def _refuse_unsupported(self, arguments: dict) -> None:
        """Raise `ValueError` if the arguments or settings of `generate` ask for what is refused."""
        settings = arguments.get("generation_config") or self.generation_config
        for name, remedy in REFUSED.items():
            value = arguments.get(name)
            if value is None:
                value = getattr(settings, name, None)
            # values that change nothing, which configurations may hold
            is_neutral = name in ("guidance_scale", "num_beam_groups") and value == 1
            if value is None or value is False or is_neutral:
                continue
            shown = value if isinstance(value, (str, int, float)) else type(value).__name__
            raise ValueError(f"`{name}` ({shown}) does not exist here; {remedy}.")

    def _draft_arguments(self, streamer, arguments: dict) -> dict:
        """The arguments of `generate` with which a streamer gets drafts: the cache holds them."""
        if arguments.get("use_cache") is False:
            raise ValueError(
                f"{type(streamer).__name__} shows drafts, which come from the cache; leave out "
                "`use_cache=False`, or use TextStreamer."
            )
        cache = arguments.get(CACHE)
        if cache is None:
            cache = TokComTextCache(self.config.transformer_config.num_context_layers)
        cache.keeps_expected = True
        processors = arguments.get("logits_processor") or []
        # behind the caller's, so that the draft begins with a token that they allow
        processors = LogitsProcessorList([*processors, DraftProcessor(streamer, self, cache)])
        return {**arguments, CACHE: cache, "logits_processor": processors}

    @torch.no_grad()
    def generate(
        self,
        inputs=None,
        *args,
        temperature: float | None = None,
        seed: int | None = None,
        streamer: BaseStreamer | None = None,
        **kwargs,
    ):
        """`GenerationMixin.generate` with a `seed`, and in which `temperature=0` is greedy.

        A `streamer` with `put_draft` (`TextDiffusionStreamer`) also receives, before each token,
        the likeliest ones of the whole chunk.
        """
        self._refuse_unsupported(kwargs)
        if hasattr(streamer, "put_draft"):
            kwargs = self._draft_arguments(streamer, kwargs)
        kwargs["streamer"] = streamer
        if temperature is not None and temperature == 0:
            # transformers refuses a temperature of 0
            kwargs["do_sample"] = False
        elif temperature is not None:
            kwargs["temperature"] = temperature
        if seed is None:
            return super().generate(inputs, *args, **kwargs)
        # the caller's random numbers on the CPU go on as if nothing had been drawn
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return super().generate(inputs, *args, **kwargs)


TokComForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["TokComCausalOutput", "TokComForCausalLM", "TokComTextCache"]
