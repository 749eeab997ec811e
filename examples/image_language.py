"""Train a small causal language model that speaks text and images: caption -> codes of a picture, and codes -> caption.

    python examples/image_language.py --model CODED --train pictures.parquet --test others.parquet --output_dir image-llama

CODED is a model of images with a codebook (`tokcom kmeans`). Its tokenizer gets one more token for every code, and
`<image>` and `</image>`; the model is a Llama of transformers, so `AutoModelForCausalLM` and `generate` do the rest.
"""

import argparse
import sys
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList

from tokcom.pipeline_media_tokcom import TokComImagePipeline
from tokcom.training.images import encode_all, picture_grid, read_pictures

BEGIN, END = "<image>", "</image>"


class CodesOnly(LogitsProcessor):
    """Allow only codes of images."""

    def __init__(self, first: int, count: int):
        self.allowed = slice(first, first + count)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        masked = torch.full_like(scores, float("-inf"))
        masked[:, self.allowed] = scores[:, self.allowed]
        return masked


def read_codes(
    pipe: TokComImagePipeline, source: str, image_column: str, limit: int
) -> tuple[list[str], torch.Tensor]:
    """Captions and codes `(M, N)` of the pictures of a source."""
    dataset = read_pictures(source, pipe.model.config.codec_config, image_column, limit=limit)
    codes = pipe.model.codec.to_codes(encode_all(pipe.model, dataset))
    return list(dataset.records["caption"]), codes[..., 0]


def sequences(tokenizer, captions: list[str], codes: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids `(2 M, L)` and labels: each picture after its caption, and each caption after its picture."""
    begin, end = tokenizer.convert_tokens_to_ids([BEGIN, END])
    texts = tokenizer(captions, add_special_tokens=False)["input_ids"]
    pictures = [[begin, *row, end] for row in (codes + first).tolist()]
    rows = [text + picture for text, picture in zip(texts, pictures)]
    rows += [picture + text + [tokenizer.eos_token_id] for text, picture in zip(texts, pictures)]
    length = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.eos_token_id] * (length - len(row)) for row in rows])
    real = torch.arange(length) < torch.tensor([len(row) for row in rows])[:, None]
    return ids, torch.where(real, ids, -100)


def train(model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor, steps: int, batch_size: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    bar = tqdm(range(steps), desc="language model", unit="step")
    for _ in bar:
        rows = torch.randint(len(ids), (batch_size,))
        loss = model(input_ids=ids[rows], labels=labels[rows]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)


@torch.no_grad()
def draw(model, tokenizer, caption: str, first: int, pipe: TokComImagePipeline):
    """A picture for a caption."""
    config = pipe.model.config.codec_config
    ids = tokenizer(caption + BEGIN, add_special_tokens=False, return_tensors="pt")["input_ids"]
    only = LogitsProcessorList([CodesOnly(first, config.num_codes)])
    options = {"do_sample": True, "top_k": 0, "pad_token_id": tokenizer.eos_token_id, "logits_processor": only}
    count = config.num_tokens
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), min_new_tokens=count, max_new_tokens=count, **options
    )
    return pipe.decode(output[:, ids.shape[1] :, None] - first).images[0]


@torch.no_grad()
def describe(model, tokenizer, codes: torch.Tensor, first: int) -> list[str]:
    """Captions for pictures of codes `(B, N)`."""
    begin, end = tokenizer.convert_tokens_to_ids([BEGIN, END])
    edge = codes.new_ones(len(codes), 1)
    ids = torch.cat((begin * edge, codes + first, end * edge), dim=1)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=48,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)


def word_accuracy(found: list[str], wanted: list[str]) -> float:
    """Share of the places of the wanted captions at which the same word stands."""
    pairs = [(a.split(), b.split()) for a, b in zip(found, wanted)]
    return sum(x == y for a, b in pairs for x, y in zip(a, b)) / sum(len(b) for _, b in pairs)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model of images with captions and a codebook")
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--num_hidden_layers", type=int, default=4)
    parser.add_argument("--max_steps", type=int, default=600)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--limit", type=int, default=5000, help="pictures of each source")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    pipe = TokComImagePipeline.from_pretrained(args.model)
    if pipe.image_processor is None or pipe.tokenizer is None or not pipe.model.config.codec_config.num_codes:
        sys.exit(f"error: {args.model} needs captions and a codebook; run tokcom kmeans first.")
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    words, codes = len(tokenizer), pipe.model.config.codec_config.num_codes
    tokenizer.add_tokens([f"<image_{i}>" for i in range(codes)] + [BEGIN, END], special_tokens=True)
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size * 8 // 3,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    captions, seen = read_codes(pipe, args.train, args.image_column, args.limit)
    train(model, *sequences(tokenizer, captions, seen, words), args.max_steps, args.batch_size)
    model.eval().save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    captions, seen = read_codes(pipe, args.test, args.image_column, args.limit)
    with torch.no_grad():
        ids, labels = (x[:256] for x in sequences(tokenizer, captions, seen, words))
        print(f"held-out loss, caption -> codes: {model(input_ids=ids, labels=labels).loss.item():.3f} nats")
    found = describe(model, tokenizer, seen[:128], words)
    print(f"codes -> caption: {word_accuracy(found, captions[:128]):.1%} of words at their places")
    for text, wanted in list(zip(found, captions))[:3]:
        print(f"  {text!r}\n  {wanted!r}, wanted")
    drawn = [draw(model, tokenizer, caption, words, pipe) for caption in captions[:8]]
    picture_grid([drawn], scale=3).save(args.output_dir / "drawn.png")
    print(f"pictures for the first captions: {args.output_dir / 'drawn.png'}")


if __name__ == "__main__":
    main()
