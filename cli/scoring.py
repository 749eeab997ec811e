"""Exact log-probabilities of the tokens of a text, for the server's `logprobs`."""

from functools import lru_cache

import torch

from tokcom.modeling_causal_tokcom import TokComForCausalLM
from tokcom.modeling_tokcom import TokComModel

causal_model = lru_cache(maxsize=1)(TokComForCausalLM.sharing)  # a server has one


@torch.no_grad()
def score_tokens(model: TokComModel, ids: list[int]) -> torch.Tensor:
    """Log-probabilities `(T - 1, V)` of what stands behind each of T `ids` but the last, given all
    up to it.

    Raises `ValueError` for models without exact probabilities, and for texts longer than the model
    can see.
    """
    row = torch.tensor([ids], device=model.device)
    return causal_model(model)(row).logits[0, :-1].log_softmax(-1)


__all__ = ["score_tokens"]
