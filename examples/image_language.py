"""Train a small causal language model that reads and writes pictures as codes between words.

    python examples/image_language.py --model CODED --train a.parquet --test b.parquet \\
        --output_dir llama

CODED is an image model with captions and a codebook (`tokcom kmeans`). Its tokenizer gets one more
token for every code, and `<image>` and `</image>`. The language model is a Llama of transformers,
so `AutoModelForCausalLM` and `generate` do the rest: caption -> codes, and codes -> caption.

With `--proxy_codes 256` there are two vocabularies and two heads, as the published document plans:
the ordered codes are predicted one after the other, and then the codes of a proxy, one for each
patch of the picture, all in one step. The proxy is a codebook of patches, made by k-means.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
)

from tokcom import TokComImagePipeline
from tokcom.cli.errors import report_errors
from tokcom.cli.loading import add_device_option
from tokcom.evaluation.classifier import by_parts
from tokcom.evaluation.images import psnr
from tokcom.quantization_tokcom import kmeans, nearest_codes
from tokcom.training.images import encode_all, picture_grid, read_pictures
from tokcom.training.tokens import load_tokenizer

PATCH = 4  # pixels of a side of what one code of the proxy stands for
BEGIN = "<image>"
END = "</image>"


class CodesOnly(LogitsProcessor):
    """Allow only codes of images."""

    def __init__(self, first: int, count: int):
        self.allowed = slice(first, first + count)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        masked = torch.full_like(scores, float("-inf"))
        masked[:, self.allowed] = scores[:, self.allowed]
        return masked


class ProxyHead(nn.Module):
    """The second head: the codes of all patches in one step, from the states of the ordered codes.

    Each patch has a query of its own, which attends to these states. `centres (S, C)` are the
    patches that the codes stand for.
    """

    def __init__(self, width: int, patches: int, centres: torch.Tensor):
        super().__init__()
        self.centres = nn.Buffer(centres)
        self.queries = nn.Parameter(torch.randn(1, patches, width) * 0.02)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.logits = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, len(centres))
        )

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """States of the ordered codes `(B, N, D)` -> logits of the patches `(B, P, S)`."""
        queries = self.queries.expand(len(states), -1, -1)
        return self.logits(self.norm(self.attention(queries, states, states)[0] + queries))

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Pictures `(B, 3, H, W)` -> the nearest codes of their patches `(B, P)`."""
        patches = cut_patches(images)  # (B, P, 3 * PATCH^2)
        return nearest_codes(patches.flatten(0, 1), self.centres).view(patches.shape[:2])

    def decode(self, codes: torch.Tensor, side: int) -> torch.Tensor:
        """Codes `(B, P)` -> pictures `(B, 3, side, side)`."""
        return F.fold(self.centres[codes].transpose(1, 2), side, PATCH, stride=PATCH)


def cut_patches(images: torch.Tensor) -> torch.Tensor:
    """Pictures `(B, 3, H, W)` -> patches `(B, P, 3 * PATCH^2)`, row after row."""
    return F.unfold(images, PATCH, stride=PATCH).transpose(1, 2)


def read_codes(
    pipe: TokComImagePipeline, source: str, image_column: str, limit: int
) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Captions, codes `(M, N)` and pixels `(M, 3, H, W)` of the pictures of a source."""
    dataset = read_pictures(source, pipe.model.config.codec_config, image_column, limit=limit)
    codes = pipe.model.codec.to_codes(encode_all(pipe.model, dataset).to(pipe.device)).cpu()
    pixels = torch.stack([dataset[i]["pixel_values"] for i in range(len(dataset))])
    return list(dataset.records["caption"]), codes[..., 0], pixels


def sequences(
    tokenizer, captions: list[str], codes: torch.Tensor, first: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids `(2 M, L)` and labels: pictures after their captions, and captions after pictures."""
    begin, end = tokenizer.convert_tokens_to_ids([BEGIN, END])
    texts = tokenizer(captions, add_special_tokens=False)["input_ids"]
    pictures = [[begin, *row, end] for row in (codes + first).tolist()]
    rows = [text + picture for text, picture in zip(texts, pictures)]
    # a caption ends with EOS; a picture ends with its own mark
    rows += [picture + text + [tokenizer.eos_token_id] for text, picture in zip(texts, pictures)]
    length = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.eos_token_id] * (length - len(row)) for row in rows])
    real = torch.arange(length) < torch.tensor([len(row) for row in rows])[:, None]  # (2 M, L)
    # -100 is what transformers leaves out of the loss
    return ids, torch.where(real, ids, -100)


def code_states(hidden_states: torch.Tensor, ids: torch.Tensor, first: int, count: int):
    """The states `(B, N, D)` at the codes of rows `ids (B, L)`, each of which has one picture."""
    is_code = (ids >= first) & (ids < first + count)
    # each row has as many codes, so the flat selection can be folded back
    return hidden_states[is_code].view(len(ids), -1, hidden_states.shape[-1])


def train(
    model: LlamaForCausalLM,
    ids: torch.Tensor,
    labels: torch.Tensor,
    steps: int,
    batch_size: int,
    proxy: tuple[ProxyHead, torch.Tensor, int] | None = None,
) -> None:
    """Train on rows `ids (M, L)`, and with `proxy`, a head, the codes of the patches `(M, P)` and
    the id of the first ordered code, the second head, too."""
    parameters = list(model.parameters())
    if proxy is not None:
        parameters += proxy[0].parameters()
    device = model.device
    optimizer = torch.optim.AdamW(parameters, 1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    bar = tqdm(range(steps), desc="language model", unit="step")
    for _ in bar:
        rows = torch.randint(len(ids), (batch_size,))
        shows = proxy is not None
        read = ids[rows].to(device)
        output = model(input_ids=read, labels=labels[rows].to(device), output_hidden_states=shows)
        loss = output.loss
        if proxy is not None:
            head, patches, first = proxy
            # the vocabulary is words, codes and two marks, in this order
            count = model.config.vocab_size - first - len((BEGIN, END))
            states = code_states(output.hidden_states[-1], read, first, count)
            wanted = patches[rows].flatten().to(device)
            loss = loss + F.cross_entropy(head(states).flatten(0, 1), wanted)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)


@torch.no_grad()
def draw(model, tokenizer, caption: str, first: int, pipe: TokComImagePipeline):
    """A picture for a caption."""
    config = pipe.model.config.codec_config
    ids = tokenizer(caption + BEGIN, add_special_tokens=False, return_tensors="pt")["input_ids"]
    ids = ids.to(model.device)
    only = LogitsProcessorList([CodesOnly(first, config.num_codes)])
    options = {
        "do_sample": True,
        "top_k": 0,
        "pad_token_id": tokenizer.eos_token_id,
        "logits_processor": only,
    }
    count = config.num_tokens
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        # exactly as many codes as a picture has
        min_new_tokens=count,
        max_new_tokens=count,
        **options,
    )
    # ids of the vocabulary to codes, (1, N, 1)
    return pipe.decode(output[:, ids.shape[1] :, None] - first).images[0]


@torch.no_grad()
def describe(model, tokenizer, codes: torch.Tensor, first: int) -> list[str]:
    """Captions for pictures of codes `(B, N)`."""
    begin, end = tokenizer.convert_tokens_to_ids([BEGIN, END])
    edge = codes.new_ones(len(codes), 1)
    ids = torch.cat((begin * edge, codes + first, end * edge), dim=1).to(model.device)  # (B, N + 2)
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


def build_llama(words: int, args: argparse.Namespace, tokenizer) -> LlamaForCausalLM:
    """A small Llama for `words` and the codes and marks that `tokenizer` has besides."""
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
    # new rows at random: the mean of words says nothing about codes
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return model


def build_proxy(pixels: torch.Tensor, args: argparse.Namespace) -> ProxyHead:
    """A head for a codebook of the patches of these pictures `(M, 3, H, W)`."""
    parts = [cut_patches(part).flatten(0, 1) for part in pixels.split(256)]
    centres = kmeans(parts, args.proxy_codes, 10, seed=args.seed)
    head = ProxyHead(args.hidden_size, (pixels.shape[-1] // PATCH) ** 2, centres)
    return head.to(args.device)


@torch.no_grad()
def report_proxy(
    model, head: ProxyHead, ids: torch.Tensor, codes, pixels, pipe, words: int, args
) -> None:
    """Print how well the patches follow from the ordered codes, and draw them beside the
    decoder."""
    ids = ids.to(model.device)
    pixels = pixels.to(model.device)
    states = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]  # (B, L, D)
    count = pipe.model.config.codec_config.num_codes
    logits = head(code_states(states, ids, words, count))  # (B, P, S)
    wanted = head.encode(pixels)
    loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten()).item()
    side = pixels.shape[-1]
    drawn = head.decode(logits.argmax(-1), side)
    decoded = pipe.decode(codes[..., None], output_type="pt").images
    print(f"held-out loss, ordered codes -> all patches in one step: {loss:.3f} nats")
    for name, pictures in (
        ("patches in one step", drawn),
        ("the decoder of the ordered codes", decoded),
        ("the codebook of patches itself", head.decode(wanted, side)),
    ):
        print(f"  {psnr(pictures.clamp(-1, 1), pixels).mean().item():.2f} dB by {name}")
    rows = [pixels[:8], decoded[:8], drawn[:8].clamp(-1, 1)]
    show = pipe.image_processor.postprocess
    picture_grid([show(row) for row in rows], scale=3).save(args.output_dir / "proxy.png")


@torch.no_grad()
def report(model, tokenizer, pipe: TokComImagePipeline, words: int, args, proxy=None) -> None:
    """Print how well the pictures of `args.test` are described, and draw some of their captions."""
    captions, codes, pixels = read_codes(pipe, args.test, args.image_column, args.limit)
    ids, labels = sequences(tokenizer, captions, codes, words)
    device = model.device
    count = min(256, len(captions))  # behind these rows come those of the other direction
    loss = model(input_ids=ids[:count].to(device), labels=labels[:count].to(device)).loss.item()
    print(f"held-out loss, caption -> codes: {loss:.3f} nats")
    if proxy is not None:
        shown = min(128, len(codes))
        report_proxy(model, proxy, ids[:shown], codes[:shown], pixels[:shown], pipe, words, args)
    found = describe(model, tokenizer, codes[:128], words)
    share = word_accuracy(found, captions[:128])
    print(f"codes -> caption: {share:.1%} of words at their places")
    for text, wanted in list(zip(found, captions))[:3]:
        print(f"  {text!r}\n  {wanted!r}, wanted")
    drawn = [draw(model, tokenizer, caption, words, pipe) for caption in captions[:8]]
    file = args.output_dir / "drawn.png"
    picture_grid([drawn], scale=3).save(file)
    print(f"pictures for the first captions: {file}")


@report_errors()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="image model with captions and a codebook")
    add("--train", required=True, help="pictures to learn, with captions")
    add("--test", required=True, help="other pictures with captions")
    add("--output_dir", type=Path, required=True, help="folder for the language model")
    add("--image_column", default="image", help="field of the picture (default: image)")
    add("--hidden_size", type=int, default=256, help="width (default: 256)")
    add("--num_hidden_layers", type=int, default=4, help="layers (default: 4)")
    add("--max_steps", type=int, default=600, help="training steps (default: 600)")
    add("--batch_size", type=int, default=32, help="texts in each step (default: 32)")
    add("--limit", type=int, default=5000, help="pictures of each source (default: 5000)")
    add("--proxy_codes", type=int, default=0, help="patches of the second head (default: 0, none)")
    add("--seed", type=int, default=0, help="of everything (default: 0)")
    add_device_option(parser)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    pipe = TokComImagePipeline.from_pretrained(args.model).to(args.device)
    num_codes = pipe.model.config.codec_config.num_codes
    if pipe.tokenizer is None or not num_codes:
        sys.exit(f"error: {args.model} needs captions and a codebook; run tokcom kmeans first.")
    tokenizer = load_tokenizer(args.model)
    words = len(tokenizer)  # the id of the first code
    marks = [f"<image_{i}>" for i in range(num_codes)] + [BEGIN, END]
    # special, so that no text can spell a code and BPE does not cut one
    tokenizer.add_tokens(marks, special_tokens=True)
    model = build_llama(words, args, tokenizer).to(args.device)
    captions, codes, pixels = read_codes(pipe, args.train, args.image_column, args.limit)
    ids, labels = sequences(tokenizer, captions, codes, words)
    head = build_proxy(pixels, args) if args.proxy_codes else None
    proxy = None
    if head is not None:  # a picture is in two rows: after its caption, and before it
        patches = by_parts(head.encode, pixels, head)
        proxy = head, patches.repeat(2, 1), words
    train(model, ids, labels, args.max_steps, args.batch_size, proxy)
    model.eval().save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    if head is not None:
        save_file(head.eval().state_dict(), args.output_dir / "proxy_head.safetensors")
    report(model, tokenizer, pipe, words, args, head)


if __name__ == "__main__":
    main()
