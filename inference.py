"""Command line for the five modes of TokCom, for filling gaps, for texts as pictures, and for models of images, clips and several streams.

    python inference.py --mode conditional --prompt "Once upon a time"
    python inference.py --mode generate --num_chunks 64 --temperature 0.7 --batch_size 2
    python inference.py --mode reconstruct --input_text "Some text"
    python inference.py --mode denoise_reconstruct --input_text "Some text" --noise_level 0.5
    python inference.py --mode encode --input_text "Some text" --output_file latents.safetensors
    python inference.py --mode decode --latents_file latents.safetensors
    python inference.py --mode infill --input_text "Once there was a ____ in the wood." --gap_length 4
    python inference.py --checkpoint pixels --mode text_to_image --input_text "Some text" --image_file text.png
    python inference.py --checkpoint pixels --mode image_to_text --image_file text.png
    python inference.py --checkpoint images --mode draw --prompt "a caption" --image_file drawn.png
    python inference.py --checkpoint images --mode reconstruct_image --input_image photo.png --image_file rebuilt.png
    python inference.py --checkpoint clips --mode animate --input_image first.png --video_file clip.gif
    python inference.py --checkpoint streams --mode any_to_any --input_text "a frog" --image_file frog.png --audio_file frog.wav
    python inference.py --checkpoint streams --mode any_to_any --input_audio word.wav

`--checkpoint` is a model directory, a Hub id, or a published v5.2 `.pt` file, which is converted in memory; by default it is the model
beside this file. A continuation of one prompt is printed while it is written.
"""

import argparse
import sys
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError

from tokcom import pipeline_media_tokcom as media
from tokcom.cli.convert import load_published_pipeline
from tokcom.pipeline_tokcom import TokComPipeline, TokComPipelineOutput
from tokcom.processing_tokcom import write_wav
from tokcom.training.checkpoints import first_line
from tokcom.training.films import write_film
from tokcom.training.images import Frames

ROOT = Path(__file__).resolve().parent
MODES = ("generate", "reconstruct", "denoise_reconstruct", "encode", "conditional", "decode", "infill")
MODES += ("text_to_image", "image_to_text", "draw", "reconstruct_image", "animate", "any_to_any")
NEEDS = {
    "reconstruct": ["input_text"],
    "denoise_reconstruct": ["input_text"],
    "encode": ["input_text"],
    "infill": ["input_text"],
    "conditional": ["prompt"],
    "decode": ["latents_file"],
    "text_to_image": ["input_text", "image_file"],
    "image_to_text": ["image_file"],
    "draw": ["image_file"],
    "reconstruct_image": ["input_image", "image_file"],
    "animate": ["video_file"],
}
SEVERAL = ("generate", "conditional", "any_to_any")  # modes that take --batch_size
DRAWS = ("generate", "conditional", "denoise_reconstruct", "infill")  # modes that draw tokens


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint",
        default=str(ROOT),
        help="model directory, Hub id, or published .pt file (default: the directory of this script)",
    )
    parser.add_argument("--mode", default="generate", choices=MODES, help="what to do (default: %(default)s)")
    parser.add_argument(
        "--input_text",
        help="text for reconstruct, denoise_reconstruct, encode; with ____ for infill; what is given (any_to_any)",
    )
    parser.add_argument("--prompt", help="text to continue (conditional); caption (draw, animate)")
    parser.add_argument("--latents_file", help="file written by encode (decode)")
    parser.add_argument("--image_file", help="picture to write, or to read (image_to_text)")
    parser.add_argument(
        "--input_image",
        help="picture to read (reconstruct_image); first frame, or a film of them (animate); what is given (any_to_any)",
    )
    parser.add_argument("--input_audio", help=".wav file that is given (any_to_any)")
    parser.add_argument("--audio_file", help=".wav file to write (any_to_any)")
    parser.add_argument("--video_file", help=".gif, .webp or .mp4 to write (animate)")
    parser.add_argument("--num_frames", type=int, help="frames of the clip (animate); by default the model's")
    parser.add_argument("--fps", type=float, default=8, help="frames a second of the file (animate)")
    parser.add_argument("--num_tokens", type=int, help="tokens to keep (reconstruct_image); by default all")
    parser.add_argument("--image_width", type=int, help="pixels in a row (text_to_image); by default the model's")
    parser.add_argument("--num_chunks", type=int, default=256, help="chunks to generate (generate)")
    parser.add_argument(
        "--num_generate_chunks",
        type=int,
        default=64,
        help="chunks after the prompt (conditional; default: %(default)s)",
    )
    parser.add_argument("--gap_length", type=int, default=8, help="tokens per gap (infill; default: %(default)s)")
    parser.add_argument("--temperature", type=float, help="of token probabilities; below 1 is safer text")
    parser.add_argument("--top_p", type=float, help="draw from the fewest tokens that reach this probability")
    parser.add_argument("--num_steps", type=int, help="denoising steps per block; by default the model's own")
    parser.add_argument("--noise_level", type=float, default=0.5, help="0 pure noise ... 1 clean text")
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="above 1 follows the prompt more closely")
    parser.add_argument("--batch_size", type=int, default=1, help=f"texts to make ({', '.join(SEVERAL)})")
    parser.add_argument(
        "--num_candidates", type=int, default=1, help="texts to choose the best guess from (any_to_any)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, help="for reproducible samples")
    parser.add_argument("--int8", action="store_true", help="8-bit weights in the transformer (torchao)")
    parser.add_argument("--compile", action="store_true", help="compile the transformer: slower to start, then faster")
    parser.add_argument("--output_file", help="where texts, or the latents of encode, are written")
    return parser


def load_pipeline(checkpoint: str, device: str) -> TokComPipeline:
    """A pipeline from a directory, a Hub id or a published `.pt`; errors say what is missing."""
    path = Path(checkpoint)
    if path.suffix == ".pt":
        return load_published_pipeline(path).to(device)
    looks_local = path.is_absolute() or checkpoint.startswith(".") or checkpoint.count("/") != 1
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise FileNotFoundError(f"{checkpoint} holds no model_index.json, so it is not a TokCom model directory.")
    if not path.exists() and looks_local:
        raise FileNotFoundError(f"checkpoint {checkpoint} does not exist; give a model directory, Hub id or .pt file.")
    try:
        pipe = media.load_pipeline(checkpoint)
    except (SafetensorError, RuntimeError) as error:
        reason = first_line(error)
        raise ValueError(
            f"the weights in {checkpoint} are truncated or do not fit its config.json ({reason}); download them again."
        ) from error
    try:
        return pipe.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used ({first_line(error)}); try --device cpu.") from error


def accelerate_pipeline(pipe: TokComPipeline, int8: bool, compiled: bool) -> None:
    """Give the transformer 8-bit weights and compile it, as asked; `ValueError` without torchao."""
    pipe.model.requires_grad_(False)
    if int8:
        try:
            from torchao.quantization import Int8WeightOnlyConfig, quantize_
        except ImportError as error:
            raise ValueError("--int8 needs torchao; install it with: pip install torchao") from error
        quantize_(pipe.model.transformer, Int8WeightOnlyConfig())
    if compiled:
        pipe.model.transformer.compile()


def translate(pipe: TokComPipeline, args: argparse.Namespace, **sampling) -> TokComPipelineOutput:
    """Of a model of several streams: a text, a picture or a sound, those a file is named for, for those that are given."""
    kinds = {codec.kind: name for name, codec in pipe.model.config.codec_config.stream_configs().items()}
    inputs = {"text": args.input_text, "audio": args.input_audio, "image": args.input_image}
    outputs = {"image": args.image_file, "audio": args.audio_file}
    wanted = [kind for kind, file in outputs.items() if file is not None] or ["text"]
    given = {kind: value for kind, value in inputs.items() if value is not None}
    if missing := {*given, *wanted} - set(kinds):
        raise ValueError(f"this model has no {sorted(missing)}; its streams are {sorted(kinds)}.")
    if args.batch_size > 1 and wanted != ["text"]:
        raise ValueError(
            f"--batch_size {args.batch_size}: --image_file and --audio_file hold one each; leave it at 1."
        )
    if "image" in given:
        given["image"] = Frames(given["image"], "--input_image")[0]
    streams = {kinds[kind]: [value] * args.batch_size for kind, value in given.items()}
    options = {"guidance_scale": args.guidance_scale, "batch_size": args.batch_size, **sampling}
    options["num_candidates"] = args.num_candidates
    made = pipe(streams, [kinds[kind] for kind in wanted], **options).streams
    if "image" in wanted:
        made[kinds["image"]][0].save(args.image_file)
    if "audio" in wanted:
        write_wav(made[kinds["audio"]][0], args.audio_file, pipe.sampling_rates[kinds["audio"]])
    files = [f"{kind} written to {outputs[kind]}" for kind in wanted if kind in outputs]
    return TokComPipelineOutput(texts=files or [str(text) for text in made[kinds["text"]]])


def run(pipe: TokComPipeline, args: argparse.Namespace) -> TokComPipelineOutput:
    generator = None if args.seed is None else torch.Generator().manual_seed(args.seed)
    sampling = {"num_inference_steps": args.num_steps, "generator": generator}
    drawing = {"temperature": args.temperature, "top_p": args.top_p}
    modality = {"draw": "image", "reconstruct_image": "image", "animate": "video", "any_to_any": "several"}
    wanted = media.PIPELINES[modality.get(args.mode, "text")]
    if not isinstance(pipe, wanted):
        raise ValueError(f"--mode {args.mode} needs a model for {wanted.__name__}, not for {type(pipe).__name__}.")
    if args.mode not in DRAWS and any(value is not None for value in drawing.values()):
        raise ValueError(f"--temperature and --top_p are of the modes {', '.join(DRAWS)}, not of {args.mode}.")
    if args.mode == "generate":
        return pipe.generate(args.num_chunks, args.batch_size, **drawing, **sampling)
    if args.mode == "reconstruct":
        return pipe.reconstruct(args.input_text)
    if args.mode == "denoise_reconstruct":
        return pipe.denoise_reconstruct(args.input_text, args.noise_level, **drawing, **sampling)
    if args.mode == "encode":
        return pipe.encode(args.input_text, args.output_file)
    if args.mode == "decode":
        return pipe.decode(args.latents_file)
    if args.mode == "text_to_image":
        image = pipe.text_to_image(args.input_text, args.image_width)
        image.save(args.image_file)
        return TokComPipelineOutput(texts=[f"{image.width} x {image.height} pixels written to {args.image_file}"])
    if args.mode == "image_to_text":
        return TokComPipelineOutput(texts=[pipe.image_to_text(args.image_file)])
    if args.mode == "draw":
        images = pipe(args.prompt, guidance_scale=args.guidance_scale, **sampling).images
        images[0].save(args.image_file)
        return TokComPipelineOutput(texts=[f"picture written to {args.image_file}"])
    if args.mode == "reconstruct_image":
        with Image.open(args.input_image) as picture:
            pipe.reconstruct(picture, args.num_tokens).images[0].save(args.image_file)
        return TokComPipelineOutput(texts=[f"picture written to {args.image_file}"])
    if args.mode == "animate":
        source = None if args.input_image is None else Frames(args.input_image, "--input_image")
        given = None if source is None else [source.clip(0, len(source))]
        options = {"num_frames": args.num_frames, "guidance_scale": args.guidance_scale, **sampling}
        frames = pipe(args.prompt, given, **options).videos[0]
        write_film(frames, args.video_file, args.fps)
        return TokComPipelineOutput(texts=[f"{len(frames)} frames written to {args.video_file}"])
    if args.mode == "any_to_any":
        return translate(pipe, args, **sampling)
    options = {"guidance_scale": args.guidance_scale, **drawing, **sampling}
    if args.mode == "infill":
        return pipe.infill(args.input_text, args.gap_length, **options)
    tokens = args.num_generate_chunks * pipe.chunk_size
    if args.batch_size == 1 and pipe.tokenizer is not None:
        return TokComPipelineOutput(texts=[args.prompt + stream(pipe, args.prompt, tokens, options)])
    output = pipe([args.prompt] * args.batch_size, tokens, **options)
    output.texts = None if output.texts is None else [args.prompt + text for text in output.texts]
    return output


def stream(pipe: TokComPipeline, prompt: str, tokens: int, options: dict) -> str:
    """The continuation of one prompt, printed while it is written."""
    pipe.set_progress_bar_config(disable=True)
    pieces = []
    for piece in pipe.stream(prompt, tokens, **options):
        print(piece if pieces else f"[1] {prompt}{piece}", end="", flush=True)
        pieces.append(piece)
    print("" if pieces else f"[1] {prompt}")
    return "".join(pieces)


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    for needed in NEEDS.get(args.mode, []):
        if getattr(args, needed) is None:
            parser.error(f"--{needed} is required for mode {args.mode}")
    if args.batch_size < 1 or (args.batch_size > 1 and args.mode not in SEVERAL):
        parser.error(
            f"--batch_size {args.batch_size}: at least 1, and 1 for mode {args.mode} (more: {', '.join(SEVERAL)})"
        )
    if args.output_file and not Path(args.output_file).resolve().parent.is_dir():
        parser.error(f"--output_file {args.output_file}: its directory does not exist")
    try:
        pipe = load_pipeline(args.checkpoint, args.device)
        accelerate_pipeline(pipe, args.int8, args.compile)
        output = run(pipe, args)
    except (ValueError, OSError, StrictDataclassError) as error:
        sys.exit(f"error: {error}")
    if args.mode == "encode":
        latents = output.latents.float()
        print(f"latents {tuple(latents.shape)}: mean {latents.mean():.4f}, std {latents.std():.4f}")
        if output.codes is not None:
            codec = pipe.model.config.codec_config
            print(f"codes {tuple(output.codes.shape)}: {codec.bits_per_token:.2f} bits per token")
        if args.output_file:
            print(f"written to {args.output_file}")
        return
    texts = output.texts if output.texts is not None else [str(row) for row in output.sequences.tolist()]
    streamed = args.mode == "conditional" and args.batch_size == 1 and pipe.tokenizer is not None
    for i, text in enumerate(() if streamed else texts):
        print(f"[{i + 1}] {text}")
    if args.output_file:
        Path(args.output_file).write_text("".join(f"[{i + 1}] {text}\n" for i, text in enumerate(texts)))
        print(f"written to {args.output_file}")


if __name__ == "__main__":
    main()
