"""The work of `tokcom convert`, `tokcom kmeans` and `tokcom publish`.

    tokcom convert best_diffusion.pt OUT_DIR
    tokcom kmeans MODEL_DIR OUT_DIR --data PICTURES
    tokcom publish MODEL_DIR USER/NAME

A published TokCom v5.2 checkpoint becomes a model directory that gives the published numbers: its
latents are raw (no standardisation), its time is not scaled by 1000, its noise has the file's
`noise_std`, and prompt and noise are told one time. The `.pt` is read with `weights_only=True`, so
it cannot run code.
"""

import argparse
import re
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from tokcom.cli.loading import check_model_path
from tokcom.configuration_tokcom import TokComConfig
from tokcom.modeling_tokcom import TokComModel
from tokcom.pipeline_base_tokcom import with_section
from tokcom.pipeline_media_tokcom import TokComImagePipeline
from tokcom.pipeline_tokcom import TokComPipeline
from tokcom.processing_tokcom import vocabulary_size
from tokcom.scheduling_tokcom import TokComFlowMatchScheduler
from tokcom.training.card import evaluation_section
from tokcom.training.checkpoints import first_line
from tokcom.training.images import FiledLatents, read_pictures
from tokcom.training.pipelines import load_pipeline
from tokcom.training.presets import preset_config
from tokcom.training.tokens import load_tokenizer

# keys by which a published checkpoint is told from any other file
REQUIRED = ("model_args", "config", "vae_model_state_dict", "denoised_model_state_dict")
MODEL_ARGS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
)
MODEL_ARGS += ("vocab_size", "omni_token_id")
LLAMA_EOS = 2  # the published padding, when the tokenizer cannot be asked

CODEC_NAMES = [
    # tied or derived
    (r"^(encoder|decoder)\.embed_tokens\.weight$|^decoder\.lm_head\.weight$|\.rope\.", None),
    (r"\.input_layernorm\.", ".attention_norm."),
    (r"\.post_attention_layernorm\.", ".mlp_norm."),
]
TRANSFORMER_NAMES = [
    (r"\.rope\.", None),
    (r"^time_mlp\.0\.", "time_embedding.linear_1."),
    (r"^time_mlp\.2\.", "time_embedding.linear_2."),
    (r"\.adaln_attn\.norm\.", ".attention_norm."),
    (r"\.adaln_mlp\.norm\.", ".mlp_norm."),
    (r"^output_proj\.", "proj_out."),
]


def _rename(
    state: dict[str, torch.Tensor], rules: list[tuple[str, str | None]]
) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, tensor in state.items():
        # what DDP and torch.compile put in front
        name = re.sub(r"^(module\.|_orig_mod\.)+", "", name)
        for pattern, replacement in rules:
            # the first rule that fits: names have one meaning each
            if re.search(pattern, name):
                # None is a tensor that is tied to another or follows from the configuration
                name = replacement and re.sub(pattern, replacement, name)
                break
        if name:
            renamed[name] = tensor
    return renamed


def _merge_modulation(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Join the two Linears of a published block, for attention and MLP, to our one."""
    merged = {}
    for name, tensor in state.items():
        if ".adaln_attn.scale_shift_mlp.1." in name:
            # loading reports what is missing
            other = state.get(name.replace("adaln_attn", "adaln_mlp"), tensor[:0])
            merged[name.replace("adaln_attn.scale_shift_mlp.1", "modulation")] = torch.cat(
                (tensor, other)
            )
        elif ".adaln_mlp.scale_shift_mlp.1." not in name:
            merged[name] = tensor
    return merged


def read_published(path: str | Path) -> dict:
    """Load a published `.pt`; `FileNotFoundError` or `ValueError` says what is wrong with it."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    # the unpickler raises nearly anything on bytes that are no checkpoint
    except Exception as error:
        raise ValueError(
            f"checkpoint {path} cannot be read ({type(error).__name__}); it is truncated, is no "
            "checkpoint, or holds more than tensors and plain values, which is never loaded."
        ) from error
    missing = [key for key in REQUIRED if not isinstance(checkpoint, dict) or key not in checkpoint]
    if missing:
        raise ValueError(
            f"checkpoint {path} lacks {', '.join(missing)}; it is not a published TokCom v5.2 "
            "checkpoint."
        )
    absent = [key for key in MODEL_ARGS if key not in checkpoint["model_args"]]
    if absent:
        raise ValueError(
            f"`model_args` in {path} lacks {', '.join(absent)}, so the shape of the model is "
            "unknown."
        )
    return checkpoint


def published_config(checkpoint: dict, pad_token_id: int) -> TokComConfig:
    """Preset `v5.2` with what a checkpoint's `model_args` and `config` say."""
    args = checkpoint["model_args"]
    settings = checkpoint["config"]
    width = args["hidden_size"]
    shape = {
        "hidden_size": width,
        "latent_channels": width,
        "intermediate_size": args["intermediate_size"],
        "num_hidden_layers": args["num_hidden_layers"],
        "num_attention_heads": args["num_attention_heads"],
        "num_key_value_heads": args["num_key_value_heads"],
        "rms_norm_eps": args.get("rms_norm_eps", 1e-6),
        "rope_theta": args.get("rope_theta", 1e6),
    }
    tokens = {
        "vocab_size": args["vocab_size"],
        "mask_token_id": args["omni_token_id"],
        "pad_token_id": pad_token_id,
    }
    chunk_size = settings.get("chunk_size", 4)
    # in latents
    length = settings.get("max_length", 1024) // chunk_size
    return preset_config(
        "v5.2",
        codec_config={**shape, **tokens, "embedding_size": width, "chunk_size": chunk_size},
        transformer_config={**shape, "conditioning_size": width, "max_position_embeddings": length},
        noise_std=settings.get("noise_std", 0.05),
    )


def _load_tokenizer(name: str | None, vocab_size: int) -> PreTrainedTokenizerBase | None:
    remedy = "copy its files into the output directory, or convert again with --tokenizer PATH"
    if not name:
        warnings.warn(
            f"the checkpoint names no tokenizer; ids and latents work, text does not: {remedy}.",
            stacklevel=3,
        )
        return None
    try:
        tokenizer = load_tokenizer(name)
    except Exception as error:
        # a missing, gated or unreachable tokenizer must not cost the user the conversion
        reason = first_line(error)
        warnings.warn(f"tokenizer {name!r} cannot be reached ({reason}); {remedy}.", stacklevel=3)
        return None
    # one more for the omni token
    if vocabulary_size(tokenizer) + 1 != vocab_size:
        warnings.warn(
            f"tokenizer {name!r} has {vocabulary_size(tokenizer)} tokens, but the checkpoint was "
            f"trained with {vocab_size - 1}; it is left out: {remedy}.",
            stacklevel=3,
        )
        return None
    return tokenizer


def load_published_pipeline(path: str | Path, tokenizer: str | None = None) -> TokComPipeline:
    """A pipeline with the weights of a published `.pt`, and `tokenizer` or the one it names."""
    checkpoint = read_published(path)
    name = tokenizer or checkpoint["config"].get("tokenizer_path")
    loaded = _load_tokenizer(name, checkpoint["model_args"]["vocab_size"])
    # v5.2 pads with EOS
    eos = loaded.eos_token_id if loaded is not None else LLAMA_EOS
    config = published_config(checkpoint, eos)
    codec = _rename(checkpoint["vae_model_state_dict"], CODEC_NAMES)
    transformer = _rename(
        _merge_modulation(checkpoint["denoised_model_state_dict"]), TRANSFORMER_NAMES
    )
    state = {f"codec.{name}": tensor for name, tensor in codec.items()}
    state |= {f"transformer.{name}": tensor for name, tensor in transformer.items()}
    channels = config.codec_config.latent_channels
    # its latents are raw, for which our standardisation is the identity
    state |= {"codec.latent_mean": torch.zeros(channels), "codec.latent_std": torch.ones(channels)}
    # no memory for weights that are replaced at once by `assign`
    with torch.device("meta"):
        model = TokComModel(config)
    try:
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    except RuntimeError as error:
        # the first line only says that loading failed
        problems = str(error).splitlines()[1:]
        raise ValueError(
            f"the weights in {path} do not fit its own model_args ({len(problems)} problems): "
            f"{problems[0].strip()}"
        ) from error
    return TokComPipeline(model.eval(), TokComFlowMatchScheduler.from_model_config(config), loaded)


def convert(args: argparse.Namespace) -> None:
    """Turn a published `.pt` file into a model directory."""
    pipe = load_published_pipeline(args.checkpoint, args.tokenizer)
    pipe.save_pretrained(args.output_dir)
    codec = sum(p.numel() for p in pipe.model.codec.parameters())
    transformer = sum(p.numel() for p in pipe.model.transformer.parameters())
    print(f"written to {args.output_dir}")
    print(f"{codec:,} parameters in the codec, {transformer:,} in the transformer")
    if pipe.tokenizer is None:
        print("no tokenizer was saved; see the warning above")


def publish(args: argparse.Namespace) -> None:
    """Push a model directory to the Hub, with its code, its card and the card's pictures."""
    directory = Path(args.model)
    if not (directory / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{directory} holds no model_index.json, so it is not a TokCom model directory."
        )
    pipe = load_pipeline(directory)
    card = directory / "README.md"
    # a card that somebody has written is kept
    text = (
        card.read_text(encoding="utf-8")
        if card.is_file()
        else pipe.model_card(args.repo_id.split("/")[-1])
    )
    if args.evaluation:
        text = with_section(text, "Evaluation", evaluation_section(args.evaluation))
    url = pipe.push_to_hub(
        args.repo_id,
        card=text,
        pictures=directory,
        private=args.private,
        token=args.token,
        revision=args.revision,
        create_pr=args.create_pr,
        max_shard_size=args.max_shard_size,
    )
    print(f"published at {url}")


def fit_codebook(args: argparse.Namespace) -> None:
    """Cluster the tokens of pictures by k-means, so that an image model gives codes."""
    check_model_path(args.model, "MODEL")
    pipe = TokComImagePipeline.from_pretrained(args.model)
    dataset = read_pictures(
        args.data, pipe.model.config.codec_config, args.image_column, seed=args.seed
    )
    rows = np.random.default_rng(args.seed).permutation(len(dataset))[: args.limit]
    with tempfile.TemporaryDirectory() as folder:  # for more pictures than fit into memory
        latents = FiledLatents(Path(folder) / "latents.f32", pipe.model, dataset, rows)
        settings = args.num_codes, args.metric, args.iterations, args.seed
        facts = pipe.model.codec.fit_codebook(latents, *settings)
    pipe.save_pretrained(args.output_dir)
    told = ", ".join(f"{name} {value:.4g}" for name, value in facts.items())
    print(f"written to {args.output_dir}")
    print(f"{args.num_codes} codes of {len(rows)} pictures; {told}")
