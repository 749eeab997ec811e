"""Would a head do better whose layers attend to the tokens before theirs in the chunk?

    python -m tokcom.evaluation.studies.chunk_attention --train stories.parquet \\
        --validation held_out.parquet --training_flops 4e13

The head of a text model reads a chunk as one vector. Here each token of a chunk has a place of its
own in layers of causal attention over the chunk, behind the same context layers: one pass scores all
K tokens, and costs about as many operations as K turns of the head. Only its likelihood is measured:
the model has no sampler. The row `recipe` of the ablations is what it compares with.

Shape legend: B batch, N latents, K tokens per chunk, D width, E embedding.
"""

import argparse
import json
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tokcom import modeling_tokcom, objective_tokcom
from tokcom.cli.errors import report_errors
from tokcom.evaluation.ablation import ROWS, data_settings, train_row, trained_codec
from tokcom.evaluation.protocol import PROMPT
from tokcom.evaluation.studies.masked import held_out_objective_nll, training_of
from tokcom.evaluation.texts import likelihood_windows, read_tokens, study_parser
from tokcom.layers_tokcom import TokComMLP, TokComRMSNorm
from tokcom.modeling_tokcom import TokComModel
from tokcom.objective_tokcom import TokComNextChunkObjective
from tokcom.training import card
from tokcom.training.pipelines import build_pipeline
from tokcom.training.tokens import load_tokenizer
from tokcom.transformer_tokcom import TokComTransformer, read_text


class ChunkLayer(nn.Module):
    """Causal attention over the K tokens of a chunk, and a feed-forward layer."""

    def __init__(self, width: int, intermediate: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = TokComRMSNorm(width)
        self.queries = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.mlp_norm = TokComRMSNorm(width)
        self.mlp = TokComMLP(width, intermediate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.queries(self.attention_norm(x)).chunk(3, dim=-1)
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2) for part in parts
        )
        found = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.output(found.transpose(-3, -2).flatten(-2))
        return x + self.mlp(self.mlp_norm(x))


class ChunkTransformer(TokComTransformer):
    """The network of a text model with `num_hidden_layers - num_context_layers` layers of attention
    inside the chunk in the place of its head."""

    def __init__(self, config):
        super().__init__(config)
        width = config.hidden_size
        count = config.num_hidden_layers - config.num_context_layers
        self.layers = self.layers[: config.num_context_layers]
        self.proj_out = self.time_embedding = None  # of the head
        size = 4  # tokens of a chunk of the preset
        self.token_in = nn.Linear(config.feature_size // size, width, bias=False)
        self.places = nn.Parameter(torch.randn(size, width) * config.initializer_range)
        self.chunk_layers = nn.ModuleList(
            ChunkLayer(width, config.intermediate_size, config.num_attention_heads)
            for _ in range(count)
        )
        self.token_out = nn.Linear(width, config.feature_size // size, bias=False)

    def score(self, tokens: torch.Tensor, entry: torch.Tensor) -> torch.Tensor:
        """Embeddings `(B, N, K, E)` and what stands before each chunk `(B, N, D)` -> what is
        expected of each token, `(B, N, K * E)`."""
        before = F.pad(tokens, (0, 0, 1, -1))  # a place reads the token before its own
        x = self.token_in(before) + self.places + entry[:, :, None]
        for layer in self.chunk_layers:
            x = layer(x)
        return self.token_out(self.norm(x)).flatten(2)


@dataclass
class ChunkObjective(TokComNextChunkObjective):
    """Mean cross-entropy of all tokens of every next chunk, each given those before it."""

    def loss(
        self, model, input_ids, attention_mask=None, known_mask=None, text_start=None, **kwargs
    ):
        head = model.token_head
        symbols = model.symbols()
        chunks, real = model.codec.symbols(input_ids, attention_mask)  # (B, N, K)
        rows = self._draw_rows(model, chunks, known_mask, input_ids, False)
        given, has_gaps, dropped = rows
        begins = torch.ones_like(dropped) if text_start is None else text_start.bool()
        states = read_text(model, symbols, chunks, real, given, has_gaps, begins & ~dropped)
        before = torch.where(dropped[:, None, None], states[:, :1], states[:, :-1])  # (B, N, D)
        clean = torch.ones(chunks.shape, device=chunks.device)
        tokens = head.read(symbols, None, clean, chunks).unflatten(-1, (chunks.shape[-1], -1))
        found = model.transformer.score(tokens, before)
        wanted = real & ~given
        # tokens are predicted as if they were pure noise, from those before them alone
        mean, losses = head.nll(found, symbols, found, torch.zeros_like(clean), chunks, wanted)
        return objective_tokcom._token_output(mean, losses, wanted)


@contextmanager
def chunk_attention():
    """A context in which text models are built and trained with attention inside the chunk."""
    with (
        training_of(ChunkObjective),
        mock.patch.object(modeling_tokcom, "TokComTransformer", ChunkTransformer),
        mock.patch.object(card, "_samples", lambda pipe: "None: this model has no sampler."),
    ):
        yield


def with_codec_of(plain: TokComModel, work: Path, tokenizer) -> Path:
    """A directory of a model with attention inside the chunk and the codec of a `plain` one."""
    with chunk_attention():
        model = TokComModel(plain.config)
        model.codec.load_state_dict(plain.codec.state_dict())
        build_pipeline(model, tokenizer).save_pretrained(work / "codecs" / "chunk_attention")
    return work / "codecs" / "chunk_attention"


def own_nll(model: TokComModel, windows: np.ndarray) -> float:
    """Exact nats per token of windows that begin inside a text, without their first tokens."""
    model.set_stage("flow")
    return held_out_objective_nll(model, windows, PROMPT)


@report_errors()
def main(argv: list[str] | None = None) -> None:
    parser = study_parser(__doc__, "outputs/ablation")
    parser.add_argument("--training_flops", type=float, default=4e13, help="default: %(default)s")
    args = parser.parse_args(argv, argparse.Namespace(row="recipe", init_from=None))
    work = Path(args.work_dir)
    tokenizer = load_tokenizer(args.checkpoint)
    plain = trained_codec(ROWS["rows"]["recipe"]["codec"], data_settings(args), work)
    donor = with_codec_of(TokComModel.from_pretrained(plain), work, tokenizer)
    with chunk_attention():
        directory, facts = train_row(args, [f"codec_from={donor}"], "chunk_attention")
        model = TokComModel.from_pretrained(directory).eval()
        tokens = read_tokens(args.validation, tokenizer, "validation")
        facts["held_out_nll"] = own_nll(model, likelihood_windows(tokens))
    facts["row"] = "chunk_attention"
    file = work / "rows" / f"chunk_attention-{args.seed}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
