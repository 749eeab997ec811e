"""Train an autoregressive Llama on TokCom's tokens, as peer in comparisons or judge of samples.

    python -m tokcom.evaluation.autoregressive --checkpoint . --data books.parquet \
        --output_dir peer --num_parameters 9400000 --training_flops 3.1e14
    python -m tokcom.evaluation.autoregressive --checkpoint . --data books.parquet \
        --output_dir judge --hidden_size 256 --num_hidden_layers 4 --max_steps 1000 --seed 1234

The tokenizer is that of `--checkpoint`. `--num_parameters` widens the feed-forward layers until the
total matches. `--training_flops` sets the number of steps. `--output_dir` receives the model, its
tokenizer and `training.json` (tokens, operations, seconds); `AutoModelForCausalLM` loads it. Under
`accelerate launch -m` every process takes `--batch_size` rows.
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from tokcom.cli.errors import report_errors
from tokcom.evaluation.flops import training_flops_per_step
from tokcom.processing_tokcom import vocabulary_size
from tokcom.training.config import DataConfig
from tokcom.training.data import PackedDataset, WindowShape, load_documents, tokenize_documents
from tokcom.training.ema import ShardedEMAModel, decay_from_half_life
from tokcom.training.optimizer import build_optimizer, build_schedule
from tokcom.training.precision import has_fast_bfloat16
from tokcom.training.tokens import load_tokenizer

PROCESSES = int(os.environ.get("WORLD_SIZE", 1))


class CausalWindows(torch.utils.data.Dataset):
    """Windows of packed documents with labels for a causal language model; each epoch has another
    offset."""

    def __init__(self, tokens: np.ndarray, sequence_length: int, eos_token_id: int, seed: int):
        # a multiple of 1, since there are no chunks; a text begins after the EOS of the one before
        shape = WindowShape(sequence_length, 1, lead=1)
        self.windows = PackedDataset(tokens, shape, eos_token_id, seed, training=True)
        self.served = 0

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        # the Trainer tells no epoch to a dataset, so count what this process has served
        # each process serves a share of every epoch
        self.windows.set_epoch(self.served * PROCESSES // len(self.windows))
        self.served += 1
        ids = self.windows[index]["input_ids"]  # (T,)
        # transformers shifts labels itself
        return {"input_ids": ids, "labels": ids}


class Averaging(TrainerCallback):
    """Keeps the moving average of the weights, which the model has at the end."""

    def __init__(self, model: LlamaForCausalLM, half_life: float):
        self.average = ShardedEMAModel(model.parameters(), decay=decay_from_half_life(half_life))

    def on_step_end(self, args, state, control, model, **kwargs):
        self.average.step(model.parameters())

    def on_train_end(self, args, state, control, model, **kwargs):
        self.average.copy_to(model.parameters())


def llama_config(
    vocab_size: int,
    hidden_size: int,
    num_hidden_layers: int,
    num_parameters: int | None,
    eos_token_id: int,
) -> LlamaConfig:
    """A Llama with tied embeddings. `num_parameters` sets the width of its feed-forward layers.

    Raises `ValueError` if the rest of the model already has more parameters.
    """
    if hidden_size % 64:
        raise ValueError(f"`hidden_size` ({hidden_size}) must be a multiple of the head size, 64.")
    intermediate = -(-8 * hidden_size // 3 // 64) * 64  # 8/3 of the width, as Llama has it
    if num_parameters is not None:
        # embeddings, final norm, and attention with its two norms in every layer
        layers = num_hidden_layers * (4 * hidden_size + 2) * hidden_size
        others = vocab_size * hidden_size + hidden_size + layers
        # gate, up and down: three matrices of hidden x intermediate in every layer
        intermediate = round((num_parameters - others) / (3 * hidden_size * num_hidden_layers))
        if intermediate < hidden_size:
            raise ValueError(
                f"{num_parameters} parameters leave a feed-forward width of {intermediate}; lower "
                f"`hidden_size` ({hidden_size}) or `num_hidden_layers` ({num_hidden_layers})."
            )
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 64,
        # rotary positions cost nothing, so more than any window of the comparisons
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        # as TokCom: a document is ended by EOS and begun by nothing
        bos_token_id=None,
        eos_token_id=eos_token_id,
    )


def training_arguments(
    directory: Path, max_steps: int, batch_size: int, seed: int, torch_compile: bool = False
) -> TrainingArguments:
    """Settings of the Trainer. Raises `ValueError` if one process would use several GPUs."""
    options = TrainingArguments(
        output_dir=str(directory),
        max_steps=max_steps,
        per_device_train_batch_size=batch_size,
        max_grad_norm=1.0,
        bf16=has_fast_bfloat16("cuda" if torch.cuda.is_available() else "cpu"),
        use_cpu=not torch.cuda.is_available(),
        logging_steps=50,
        # the model is small and is saved at the end, with its tokenizer
        save_strategy="no",
        report_to=[],
        seed=seed,
        torch_compile=torch_compile,
    )
    if options.n_gpu > 1:
        raise ValueError(
            f"{options.n_gpu} GPUs in one process would multiply the batch, and with it the "
            "budget; use accelerate launch, or set CUDA_VISIBLE_DEVICES=0."
        )
    return options


def train(
    tokens: np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: str | Path,
    hidden_size: int = 320,
    num_hidden_layers: int = 6,
    num_parameters: int | None = None,
    training_flops: float | None = None,
    max_steps: int = 1000,
    batch_size: int = 8,
    sequence_length: int = 512,
    learning_rate: float = 1.5e-3,
    muon_learning_rate: float = 0.0,
    seed: int = 0,
    torch_compile: bool = False,
    ema_half_life: float = 0.0,
    cooldown_share: float = 0.0,
) -> LlamaForCausalLM:
    """Train on `tokens (T,)` with TokCom's optimizer and schedules, then save the model.

    With `ema_half_life`, a share of the steps, the weights are averaged as TokCom's are. Uses
    bfloat16 where it is fast. Raises `ValueError` if one process would use several GPUs.
    """
    set_seed(seed)  # before the model is built, whose weights are drawn from it
    config = llama_config(
        vocabulary_size(tokenizer),
        hidden_size,
        num_hidden_layers,
        num_parameters,
        tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)

    def optimizer_of(model: LlamaForCausalLM) -> torch.optim.Optimizer:
        return build_optimizer(model, learning_rate, muon_learning_rate, weight_decay=0.01)

    # counted on the real code, the optimizer included: Muon's products are not free
    per_step = training_flops_per_step(model, batch_size * PROCESSES, sequence_length, optimizer_of)
    if training_flops is not None:
        max_steps = max(1, round(training_flops / per_step))
    options = training_arguments(
        Path(output_dir) / "run", max_steps, batch_size, seed, torch_compile
    )
    started = time.perf_counter()
    optimizer = optimizer_of(model)
    # 200 steps of warm-up, or a tenth of a short run
    warmup_steps = max(1, min(200, max_steps // 10))
    schedule = build_schedule(optimizer, max_steps, warmup_steps, cooldown_share)
    data = CausalWindows(tokens, sequence_length, tokenizer.eos_token_id, seed)
    trainer = Trainer(model, options, train_dataset=data, optimizers=(optimizer, schedule))
    if ema_half_life:
        trainer.add_callback(Averaging(model, ema_half_life * max_steps))
    loss = trainer.train().training_loss
    model = model.eval()
    if not trainer.is_world_process_zero():  # one process writes the files
        return model
    facts = {
        "steps": max_steps,
        "tokens": max_steps * batch_size * PROCESSES * sequence_length,
        "training_flops": per_step * max_steps,
        "seconds": time.perf_counter() - started,
        "mean_training_loss": loss,
        "seed": seed,
    }
    save(model, tokenizer, Path(output_dir), facts)
    return model


def save(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, directory: Path, facts: dict
) -> None:
    """Write the model, its tokenizer and `training.json`."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    facts = {"parameters": sum(p.numel() for p in model.parameters()), **facts}
    (directory / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


@report_errors()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint", default=".", help="model or directory whose tokenizer is used"
    )
    parser.add_argument("--data", required=True, help="training text: file, folder or Hub dataset")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument(
        "--num_parameters", type=int, help="total to match; default: a feed-forward width of 8/3"
    )
    parser.add_argument("--training_flops", type=float, help="total to match; default: max_steps")
    numbers = {
        "hidden_size": 320,
        "num_hidden_layers": 6,
        "max_steps": 1000,
        "batch_size": 8,
        "seed": 0,
    }
    for name, value in {**numbers, "sequence_length": 512}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--learning_rate", type=float, default=1.5e-3, help="AdamW's learning rate")
    parser.add_argument(
        "--muon_learning_rate",
        type=float,
        default=0.0,
        help="Muon's learning rate for inner matrices; 0 trains all with AdamW",
    )
    parser.add_argument(
        "--ema_half_life",
        type=float,
        default=0.0,
        help="half-life of the averaged weights, as a share of the steps; 0: no average",
    )
    parser.add_argument(
        "--cooldown_share",
        type=float,
        default=0.0,
        help="share of the steps in which a constant rate falls to 0; 0: a cosine instead",
    )
    parser.add_argument("--torch_compile", action="store_true", help="compile the network")
    args = vars(parser.parse_args(argv))
    tokenizer = load_tokenizer(args.pop("checkpoint"))
    column = args.pop("text_column")
    documents = load_documents(args.pop("data"), DataConfig(text_column=column), "train")
    train(tokenize_documents(documents, tokenizer, column, "training text"), tokenizer, **args)


if __name__ == "__main__":
    main()
