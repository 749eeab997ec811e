"""Judges: causal language models that score text they did not write."""

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from tokcom.training.precision import half_precision
from tokcom.training.tokens import load_tokenizer


def load_language_model(path: str, device: str = "cpu") -> PreTrainedModel:
    """A causal language model of transformers in float32; one with code of its own is refused."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=False)
    return model.eval().to(device)


@torch.no_grad()
def logits_of_text(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """Logits `(T, V)` after each of `ids (T,)`, in float32.

    A text that is longer than the positions the model was trained for is read in windows that
    overlap by half: rotary positions beyond them raise no error, but mean nothing to the model.
    """
    limit = getattr(model.config, "max_position_embeddings", None) or len(ids)
    row = torch.tensor([ids], device=model.device)
    found = [model(input_ids=row[:, :limit]).logits[0].float()]
    stride = max(1, limit // 2)
    for done in range(limit, len(ids), stride):
        # the next `stride` tokens, after the `limit - stride` before them
        window = row[:, max(0, done + stride - limit) : done + stride]
        logits = model(input_ids=window).logits[0].float()
        found.append(logits[-min(stride, len(ids) - done) :])
    return torch.cat(found)


def has_tokens_of(path: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the model in a directory gives ids the meaning that `tokenizer` gives them."""
    return load_tokenizer(path).get_vocab() == tokenizer.get_vocab()


def check_tokens(path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` if the model in a directory gives ids another meaning than `tokenizer`."""
    if not has_tokens_of(path, tokenizer):
        raise ValueError(
            f"{path} has another tokenizer than the model that it is compared with, so the ids of "
            "a text mean something else to it; give one that was trained with that tokenizer "
            "(`python -m tokcom.evaluation.autoregressive --checkpoint ...`)."
        )


def load_peer(
    path: str, tokenizer: PreTrainedTokenizerBase, device: str = "cpu"
) -> PreTrainedModel:
    """`load_language_model` of one that reads and writes ids of `tokenizer`; raises `ValueError`
    if its own tokenizer is another one."""
    check_tokens(path, tokenizer)
    return load_language_model(path, device)


@torch.no_grad()
def token_nll(
    model, ids: np.ndarray, prompts: np.ndarray | None = None, batch_size: int = 64
) -> np.ndarray:
    """Nats `(B, T)` of every token of `ids (B, T)` under a causal language model, given
    `prompts (B, P)` and the tokens before it.

    Without a prompt the first token has no context and is NaN: use `np.nanmean` for means.
    """
    whole = ids if prompts is None else np.concatenate((prompts, ids), axis=1)  # (B, P + T)
    rows = []
    for start in range(0, len(whole), batch_size):
        batch = torch.from_numpy(whole[start : start + batch_size].astype(np.int64)).to(
            model.device
        )
        with half_precision(batch.device.type):
            # the last position predicts what is not there
            logits = model(input_ids=batch).logits[:, :-1]  # (B, T - 1, V)
        # in float32: a sum over the vocabulary in bfloat16 has two digits
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="none"
        )
        rows.append(losses.view(len(batch), -1).cpu().numpy())
    # the first token of a row has no prediction
    losses = np.pad(np.concatenate(rows), ((0, 0), (1, 0)), constant_values=np.nan)
    # prompts are context, not scored
    return losses[:, -ids.shape[1] :]


class TokenJudge:
    """A causal language model with TokCom's tokenizer, as `evaluation.autoregressive` trains it."""

    def __init__(self, path: str, tokenizer: PreTrainedTokenizerBase, device: str = "cpu"):
        self.model = load_peer(path, tokenizer, device)

    def nll(self, ids: np.ndarray, prompts: np.ndarray | None = None) -> np.ndarray:
        """`token_nll` of the judge."""
        return token_nll(self.model, ids, prompts)


class TextJudge:
    """Any causal language model of transformers. It scores plain text with its own tokenizer."""

    def __init__(self, path: str, device: str = "cpu"):
        self.tokenizer = load_tokenizer(path)
        self.model = load_language_model(path, device)

    @torch.no_grad()
    def nats_per_character(self, texts: list[str], prompts: list[str] | None = None) -> np.ndarray:
        """Nats per character of each text `(B,)`, given its prompt; NaN for an empty text."""
        prompts = prompts or [""] * len(texts)
        results = []
        for prompt, text in zip(prompts, texts):
            encoded = self.tokenizer(prompt + text, return_offsets_mapping=True)
            ids = encoded["input_ids"]
            # a token that begins in the prompt but reaches into the text is scored
            known = max(1, sum(end <= len(prompt) for _, end in encoded["offset_mapping"]))
            if len(ids) <= known:
                results.append(float("nan"))
                continue
            logits = logits_of_text(self.model, ids)[known - 1 : -1]  # (scored tokens, V)
            targets = torch.tensor(ids[known:], device=logits.device)
            total = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
            results.append(float(total) / max(1, len(text)))
        return np.array(results)
