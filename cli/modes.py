"""The work of `tokcom generate`, `infill`, `draw` and so on, and of `inference.py`.

Each function takes a pipeline and the parsed arguments, prints what it made, and returns it as a
list of texts.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from tokcom.cli.loading import check_modality, num_fillings, open_pipeline, speed_up
from tokcom.cli.options import MODES, READ, WRITTEN, spelt
from tokcom.cli.terminal import TerminalStreamer
from tokcom.configuration_codec_tokcom import TokComCodecConfig
from tokcom.processing_tokcom import tokenize_texts, write_wav

LOSSLESS = (".png", ".bmp", ".tif", ".tiff")  # what keeps every pixel


def check_files(args: argparse.Namespace) -> None:
    """Raise `FileNotFoundError` for a missing input, or for an output whose folder is missing, and
    `ValueError` for an output that is a folder or whose ending names no format."""
    command = getattr(args, "command", None)  # `inference.py` has none
    written = WRITTEN
    read = READ
    if MODES[args.mode].reads_picture:
        # `--image_file` is written by most modes, and read by this one
        read = (*READ, "image_file")
        written = tuple(name for name in WRITTEN if name != "image_file")
    for name in read:
        file = getattr(args, name, None)
        if file is not None and not Path(file).is_file():
            raise FileNotFoundError(
                f"{spelt(name, command)} {file} does not exist, so there is nothing to read."
            )
    # before anything is loaded: a missing folder should not cost the sample
    for name in written:
        file = getattr(args, name, None)
        if file is not None and Path(file).is_dir():
            raise ValueError(f"--{name} {file} is a folder; name a file in it.")
        if file is not None and not Path(file).resolve().parent.is_dir():
            folder = Path(file).parent
            raise FileNotFoundError(
                f"--{name} {file}: the folder {folder} does not exist; create it first."
            )
    if "image_file" in written:
        check_picture_file(args.mode, getattr(args, "image_file", None))
    sound = getattr(args, "audio_file", None)
    if sound is not None and Path(sound).suffix.lower() != ".wav":
        raise ValueError(f"--audio_file {sound}: sounds are written as .wav; name a .wav file.")
    film = getattr(args, "video_file", None)
    if film is not None:
        from tokcom.training.films import check_film_file

        check_film_file(film)


def check_watch(args: argparse.Namespace) -> None:
    """Raise `ValueError` if there is no terminal to watch a text in, or more than one text."""
    if not getattr(args, "watch", False) or args.mode != "conditional":
        return
    if args.batch_size > 1:
        raise ValueError(
            f"--watch shows one text, not --batch_size {args.batch_size}; leave one of the two out."
        )
    # drafts are drawn over, which a file cannot do
    if not sys.stdout.isatty():
        raise ValueError(
            "--watch draws in a terminal, but the output goes elsewhere; leave it out."
        )


def check_picture_file(mode: str, file: str | None) -> None:
    """Raise `ValueError` for a file to write whose ending names no format of pictures."""
    if file is None:
        return
    ending = Path(file).suffix.lower()
    # Pillow can read more formats than it writes
    if Image.registered_extensions().get(ending) not in Image.SAVE:
        raise ValueError(
            f"--image_file {file}: {ending!r} is no picture that can be written; name a .png file."
        )
    if mode == "text_to_image" and ending not in LOSSLESS:
        raise ValueError(
            f"--image_file {file}: {ending!r} may change pixels, and each of them is a token; name "
            "a .png file."
        )


def run_mode(args: argparse.Namespace) -> None:
    """Load the model and do what `args.mode` says."""
    check_files(args)
    check_watch(args)
    pipe = open_pipeline(args.checkpoint, args.device)
    check_modality(pipe, args.checkpoint, MODES[args.mode].modality)
    speed_up(pipe, args.int8, args.compile)
    texts = RUN[args.mode](pipe, args)
    output_file = getattr(args, "output_file", None)
    if output_file is None:
        return
    if args.mode != "encode":  # which has written its latents already
        Path(output_file).write_text(
            "".join(f"[{i + 1}] {text}\n" for i, text in enumerate(texts)), encoding="utf-8"
        )
    print(f"written to {output_file}")


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of every sampler."""
    generator = None if args.seed is None else torch.Generator().manual_seed(args.seed)
    return {"num_inference_steps": args.num_steps, "generator": generator}


def token_sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of a sampler of tokens; None leaves one to the model."""
    return {"temperature": args.temperature, "top_p": args.top_p, **sampling(args)}


def show(output) -> list[str]:
    """Print the texts of an output, or without a tokenizer its ids."""
    texts = output.texts
    if texts is None:
        texts = [str(row) for row in output.sequences.tolist()]
    for i, text in enumerate(texts):
        print(f"[{i + 1}] {text}")
    return texts


def tell(message: str) -> list[str]:
    print(f"[1] {message}")
    return [message]


# ---- texts ----


def generate(pipe, args: argparse.Namespace) -> list[str]:
    return show(pipe.generate(args.num_chunks, args.batch_size, **token_sampling(args)))


def continue_prompt(pipe, args: argparse.Namespace) -> list[str]:
    """Print one continuation while it is written; several appear together at the end."""
    tokens = args.num_generate_chunks * pipe.chunk_size
    options = {
        "guidance_scale": args.guidance_scale,
        "truncation": args.truncation,
        **token_sampling(args),
    }
    if args.watch:
        return [watch(pipe, args, tokens, options)]
    # several texts cannot be written into one terminal at a time
    if args.batch_size == 1 and pipe.tokenizer is not None:
        return [stream(pipe, args.prompt, tokens, options)]
    output = pipe([args.prompt] * args.batch_size, tokens, **options)
    if output.texts is not None:
        output.texts = [args.prompt + text for text in output.texts]
    return show(output)


def stream(pipe, prompt: str, tokens: int, options: dict[str, Any]) -> str:
    """Print a prompt and its continuation piece by piece; returns both."""
    pipe.set_progress_bar_config(disable=True)  # the text itself is the progress
    text = prompt
    for piece in pipe.stream(prompt, tokens, **options):
        # the prompt appears with the first piece, so that a refused prompt leaves nothing but its
        # error
        print(piece if text != prompt else f"[1] {prompt}{piece}", end="", flush=True)
        text += piece
    print("" if text != prompt else f"[1] {prompt}")
    return text


def watch(pipe, args: argparse.Namespace, tokens: int, options: dict[str, Any]) -> str:
    """Draw a prompt and its continuation while it is denoised; returns both."""
    if pipe.tokenizer is None:
        raise ValueError("--watch shows a text of a model with a tokenizer; leave it out.")
    pipe.set_progress_bar_config(disable=True)
    output = pipe(args.prompt, tokens, streamer=TerminalStreamer(pipe.tokenizer), **options)
    return args.prompt + output.texts[0]


def infill(pipe, args: argparse.Namespace) -> list[str]:
    options = {"guidance_scale": args.guidance_scale, **token_sampling(args)}
    options["num_candidates"] = args.num_candidates
    if args.num_candidates is None:
        options["num_candidates"] = num_fillings(pipe)
    pipe.set_progress_bar_config(disable=True)  # a bar for each length tells nothing
    return show(pipe.infill(args.input_text, args.gap_length, **options))


def reconstruct(pipe, args: argparse.Namespace) -> list[str]:
    return show(pipe.reconstruct(args.input_text))


def denoise(pipe, args: argparse.Namespace) -> list[str]:
    return show(pipe.denoise_reconstruct(args.input_text, args.noise_level, **token_sampling(args)))


def encode(pipe, args: argparse.Namespace) -> list[str]:
    output = pipe.encode(args.input_text, args.output_file)
    latents = output.latents.float()
    print(f"latents {tuple(latents.shape)}: mean {latents.mean():.4f}, std {latents.std():.4f}")
    if output.codes is not None:
        bits = pipe.model.config.codec_config.bits_per_token
        print(f"codes {tuple(output.codes.shape)}: {bits:.2f} bits per token")
    return []


def decode(pipe, args: argparse.Namespace) -> list[str]:
    return show(pipe.decode(args.latents_file))


def text_to_image(pipe, args: argparse.Namespace) -> list[str]:
    if args.image_width is not None:
        # a wider picture would be filled up with pixels that mean nothing
        count = len(tokenize_texts(pipe.tokenizer, [args.input_text], "text")[0])
        if args.image_width > count:
            raise ValueError(
                f"--image_width {args.image_width} is wider than the text, of {count} tokens with "
                f"one pixel each; give at most {count}."
            )
    image = pipe.text_to_image(args.input_text, args.image_width)
    image.save(args.image_file)
    return tell(f"{image.width} x {image.height} pixels written to {args.image_file}")


def image_to_text(pipe, args: argparse.Namespace) -> list[str]:
    return tell(pipe.image_to_text(args.image_file))


# ---- pictures, clips and several streams ----


def draw(pipe, args: argparse.Namespace) -> list[str]:
    images = pipe(args.prompt, guidance_scale=args.guidance_scale, **sampling(args)).images
    images[0].save(args.image_file)
    return tell(f"picture written to {args.image_file}")


def reconstruct_image(pipe, args: argparse.Namespace) -> list[str]:
    images = pipe.reconstruct(args.input_image, num_tokens=args.num_tokens).images
    images[0].save(args.image_file)
    return tell(f"picture written to {args.image_file}")


def animate(pipe, args: argparse.Namespace) -> list[str]:
    from tokcom.training.films import write_film

    options = {
        "num_frames": args.num_frames,
        "guidance_scale": args.guidance_scale,
        **sampling(args),
    }
    try:
        frames = pipe(args.prompt, frames=args.input_image, **options).videos[0]
    except ValueError as error:
        if args.input_image is None:
            raise
        # how many frames a clip may have depends on the model, and on how many the file holds
        raise ValueError(f"with --input_image {args.input_image}: {error}") from error
    write_film(frames, args.video_file, args.fps)
    return tell(f"{len(frames)} frames written to {args.video_file}")


class StreamFile(NamedTuple):
    """How a kind of stream is given and written on the command line."""

    kind: str  # of the configuration of the stream's codec
    given_by: str  # an option: a text, or the name of a file
    written_to: str | None = None  # an option: the name of a file; without one it is printed
    save: Callable[[Any, str, TokComCodecConfig], None] | None = None


def save_picture(picture: Image.Image, file: str, codec: TokComCodecConfig) -> None:
    picture.save(file)


def save_sound(sound: np.ndarray, file: str, codec: TokComCodecConfig) -> None:
    write_wav(sound, file, codec.sampling_rate)


STREAM_FILES = {
    stream.kind: stream
    for stream in (
        StreamFile("text", "input_text"),
        StreamFile("image", "input_image", "image_file", save_picture),
        StreamFile("audio", "input_audio", "audio_file", save_sound),
    )
}


def any_to_any(pipe, args: argparse.Namespace) -> list[str]:
    """The streams that an output file is named for, or a text, from those that are given."""
    codecs = pipe.model.config.codec_config.stream_configs()
    names = {codec.kind: name for name, codec in codecs.items()}
    given = {}
    files = {}
    for kind, options in STREAM_FILES.items():
        value = getattr(args, options.given_by)
        if value is not None:
            given[kind] = value
        if options.written_to is not None and getattr(args, options.written_to) is not None:
            files[kind] = getattr(args, options.written_to)
    # a text needs no file
    wanted = list(files) or ["text"]
    missing = {*given, *wanted} - set(names)
    if missing:
        raise ValueError(f"this model has no {sorted(missing)}; its streams are {sorted(names)}.")
    if args.batch_size > 1 and files:
        raise ValueError(
            f"--batch_size {args.batch_size}: --image_file and --audio_file hold one sample each; "
            "leave it at 1."
        )
    made = pipe(
        {names[kind]: [value] * args.batch_size for kind, value in given.items()},
        [names[kind] for kind in wanted],
        batch_size=args.batch_size,
        guidance_scale=args.guidance_scale,
        num_candidates=1 if args.num_candidates is None else args.num_candidates,
        **sampling(args),
    ).streams
    if not files:
        texts = [str(text) for text in made[names["text"]]]
        for i, text in enumerate(texts):
            print(f"[{i + 1}] {text}")
        return texts
    lines = []
    for kind, file in files.items():
        name = names[kind]
        STREAM_FILES[kind].save(made[name][0], file, codecs[name])
        lines += tell(f"{kind} written to {file}")
    return lines


RUN: dict[str, Callable[[Any, argparse.Namespace], list[str]]] = {
    "generate": generate,
    "conditional": continue_prompt,
    "infill": infill,
    "reconstruct": reconstruct,
    "denoise_reconstruct": denoise,
    "encode": encode,
    "decode": decode,
    "text_to_image": text_to_image,
    "image_to_text": image_to_text,
    "draw": draw,
    "reconstruct_image": reconstruct_image,
    "animate": animate,
    "any_to_any": any_to_any,
}
