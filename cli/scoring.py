"""Exact log-probabilities of the tokens of a text, for the server's `logprobs`.

One function, so that a causal language model class can replace it.
"""

import torch

from tokcom.modeling_tokcom import TokComModel
from tokcom.transformer_tokcom import read_text


def require_exact_scores(model: TokComModel) -> None:
    """Raise `ValueError` if the model does not decide one token after the other, so that its probabilities are not exact."""
    head = model.token_head
    transformer = model.config.transformer_config
    takes_turns = head is not None and (head.stagger == 1 or head.num_symbols == 1)
    if not takes_turns or transformer.block_size != 1 or not transformer.start_latents:
        raise ValueError(
            "`logprobs`: this model does not decide its tokens one after the other, so it has no exact probabilities of them; "
            "use a model with `token_stagger=1`, `block_size=1` and `start_latents=True`, or leave `logprobs` out."
        )


@torch.no_grad()
def score_tokens(model: TokComModel, ids: list[int]) -> torch.Tensor:
    """Log-probabilities `(T, V)` of what stands at each place of a text of T `ids`, given all tokens before it.

    Row 0 is given nothing but that a text starts. Raises `ValueError` for models without exact probabilities, and for texts
    longer than the model can see.
    """
    require_exact_scores(model)
    head = model.token_head
    codec = model.codec
    size = head.num_symbols
    length = -(-len(ids) // size)
    limit = model.config.transformer_config.max_position_embeddings * size
    if length * size > limit:
        raise ValueError(
            f"`logprobs`: the text has {len(ids)} tokens, more than the model's {limit}; shorten it."
        )

    row = torch.tensor(
        [ids + [0] * (length * size - len(ids))], device=model.device
    )  # what follows changes nothing
    chunks, real = codec.symbols(row, torch.ones_like(row))  # (1, N, K) each
    symbols = model.symbols()
    nothing = torch.zeros_like(real)  # is known beforehand
    no_gaps = torch.zeros(1, dtype=torch.bool, device=model.device)
    begins = torch.ones_like(no_gaps)
    states = read_text(model, symbols, chunks, real, nothing, no_gaps, begins)  # (1, 1 + N, D)
    before = states[:, :-1]  # what is known when a chunk begins

    logprobs = []
    for turn in range(size):  # those before are clean, the others pure noise, which says nothing
        time = torch.full(chunks.shape[:2], turn / size, device=model.device)
        times = head.place_times(time)
        latents = torch.where(
            (times == 1).repeat_interleave(codec.config.latent_channels // size, dim=-1),
            head.latents_of(symbols, chunks),
            0.0,
        )
        expected = model.transformer(
            latents.to(model.dtype),
            time,
            features=head.read(symbols, latents, times, chunks),
            entry=before,
        ).latents.unflatten(-1, (size, -1))[:, :, turn]  # (1, N, E)
        logprobs.append(head.logits(expected)[0].log_softmax(-1))
    return torch.stack(logprobs, dim=1).flatten(0, 1)[: len(ids)]  # (T, V)


__all__ = ["require_exact_scores", "score_tokens"]
