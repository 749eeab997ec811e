"""A page to play with a TokCom model: text that emerges from noise, gaps, noise levels and a map of latents.

    python app.py                      # the model in this directory, on http://127.0.0.1:7860
    python app.py --checkpoint DIR --pixels PIXEL_MODEL_DIR --images IMAGE_MODEL_DIR

In a Space, TOKCOM_MODEL names the model's repository. A tab for texts as pictures appears if there is a pixel model.
"""

import argparse
import html
import os
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before the import, which reads it

import gradio as gr
import matplotlib
import torch
from huggingface_hub.errors import StrictDataclassError
from matplotlib.figure import Figure
from PIL import Image

from tokcom.evaluation.reconstruction import token_losses_at
from tokcom.pipeline_media_tokcom import load_pipeline
from tokcom.pipeline_tokcom import GAP, TokComPipeline
from tokcom.processing_tokcom import decode_ids, text_ids
from tokcom.sampling_tokcom import kept_tokens, spawn_generators

matplotlib.use("Agg")
ROOT = Path(__file__).resolve().parent
LONGEST = 512  # tokens that the page generates or reads at once
SLOWEST = 120  # seconds that slow motion may add
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}  # nothing is fetched from elsewhere
CSS = """
.tokcom-text {font-size: 1.1rem; line-height: 1.9; overflow-wrap: anywhere; white-space: pre-wrap; min-height: 6rem}
.tokcom-text span {border-radius: 3px; padding: 1px 0; color: #111}
.tokcom-text .given {background: none; color: inherit; opacity: .75}
"""
NOTE = (
    "The shipped model has 8.9 million parameters and has read 219 children's books: expect sentences, not stories. While text "
    "emerges, colours go from red (noise) to green (denoised); when it is done they say how much the model expected each token, "
    "from red (a surprise) to green (certain). Point at a token for the number."
)


def colored(tokens: list[tuple[str, float]], given: str = "") -> str:
    """HTML of a `given` text and of tokens with confidences in [0, 1]."""
    spans = [
        f'<span style="background:hsl({120 * score:.0f},70%,80%)" title="{100 * score:.0f} %">{html.escape(text)}</span>'
        for text, score in tokens
    ]
    before = f'<span class="given">{html.escape(given)}</span>' if given else ""
    return f'<div class="tokcom-text" role="status">{before}{"".join(spans)}</div>'


def _generator(seed: float | None) -> torch.Generator:
    """Numbered noise; without a seed noise of its own."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
        return generator
    return generator.manual_seed(int(seed) % 2**63)


def _explained(error: Exception) -> gr.Error:
    return gr.Error(str(error), title="This cannot be done", print_exception=False)


class Demo:
    """The page's functions for one pipeline; each raises `gr.Error` with a message for people."""

    def __init__(
        self, pipe: TokComPipeline, pixels: TokComPipeline | None = None, images: TokComPipeline | None = None
    ):
        self.pipe, self.pixels, self.images, self.busy = pipe, pixels, images, threading.Lock()
        for each in (pipe, pixels, images):
            if each is not None:
                each.set_progress_bar_config(disable=True)

    def _tokens(self, ids: list[int]) -> list[str]:
        """What each id adds to the text: a character made of several tokens belongs to the last of them."""
        shown, pieces = "", []
        for end in range(1, len(ids) + 1):
            text = decode_ids(self.pipe.tokenizer, ids[:end])
            whole = text if end == len(ids) else text.rstrip("\ufffd")
            pieces.append(whole[len(shown) :] if whole.startswith(shown) else "")
            shown = whole if len(whole) >= len(shown) else shown
        return pieces

    @torch.no_grad()
    def emerging(self, latents: torch.Tensor, time: float) -> list[tuple[str, float]]:
        """What the noisy latents `(1, n, C)` of a block at `time` decode to, and t of each token: 0 is noise, 1 is clean."""
        model, count = self.pipe.model, latents.shape[1]
        times = torch.full((1, count), time)
        if model.token_head is None:
            t = times.clamp(0, 1)[0].repeat_interleave(self.pipe.chunk_size)
        else:
            t = model.token_head.place_times(times).flatten()
        return list(zip(self._tokens(model.to_ids(latents)[0].tolist()), t.tolist()))

    @torch.no_grad()
    def probabilities(self, prompt: str, ids: list[int]) -> list[float]:
        """The model's probability of each of the last tokens of a text, given the text before its chunk and, where the model
        decides one after the other, the tokens before it; of the decoder alone for models that regress latents."""
        row = self.pipe._tokenize([prompt.rstrip(" ")], "prompt")[0] + ids
        size = self.pipe.chunk_size
        beyond = max(0, len(row) - self.pipe.max_length)
        row = row[-(-beyond // size) * size :]  # what is cut off is whole chunks
        whole, mask = self.pipe._pad([row], "right")
        if self.pipe.model.token_head is None:
            losses = self.pipe.model.codec.loss(self.pipe.model.encode(whole, mask).latents, whole, mask)
        else:
            torch.manual_seed(0)
            losses = token_losses_at(self.pipe.model, whole, 0.0, mask)
        return (-losses.flatten()).exp()[len(row) - len(ids) : len(row)].tolist()

    def write(
        self,
        prompt: str,
        length: int,
        steps: int,
        temperature: float,
        top_p: float,
        guidance: float,
        seed: int,
        slowly: float = 0.0,
    ) -> Iterator[tuple[str, str]]:
        """Frames `(HTML, speed)` of a continuation: with `slowly` seconds for each, one for every denoising step."""
        frames, stop = queue.Queue(), threading.Event()
        tokens = self.pipe.model.config.prediction_type == "tokens"
        done, current, spent = [], [], 0.0

        def after_step(pipe, step, timestep, tensors):
            nonlocal done, current, spent
            started = time.perf_counter()
            pipe._interrupt = stop.is_set()
            index = step % len(pipe.scheduler.timesteps)
            if index == 0:
                done = done + current
            current = self.emerging(tensors["latents"].float(), 1 - float(pipe.scheduler.sigmas[index + 1]))
            frames.put((done + current)[: int(length)])
            spent += time.perf_counter() - started
            return tensors

        def run() -> None:
            try:
                with self.busy:
                    started = time.perf_counter()
                    output = self.pipe(
                        prompt,
                        gen_length=int(length),
                        num_inference_steps=int(steps),
                        guidance_scale=guidance,
                        temperature=temperature if tokens else None,
                        top_p=top_p if tokens else None,
                        generator=_generator(seed),
                        callback_on_step_end=after_step,
                    )
                    seconds = time.perf_counter() - started - spent
                    count = int(output.attention_mask.sum())
                    ids = output.sequences[0, :count].tolist()
                    frames.put((ids, self.probabilities(prompt, ids), seconds))
            except Exception as error:  # shown on the page
                frames.put(error)

        thread, until = threading.Thread(target=run, daemon=True), time.monotonic() + SLOWEST
        thread.start()
        try:
            while isinstance(frame := frames.get(), list):
                if slowly and time.monotonic() < until:
                    time.sleep(slowly)
                elif not frames.empty():  # the page is slower than the model: show the newest
                    continue
                yield colored(frame, prompt), "denoising"
            if isinstance(frame, Exception):
                raise _explained(frame) from frame
        finally:
            stop.set()
            thread.join()
        ids, probabilities, seconds = frame
        count, text = len(ids), list(zip(self._tokens(ids), probabilities))
        speed = f"{count} tokens in {seconds:.2f} s: {1000 * seconds / count:.1f} ms per token, {count / seconds:.0f} tokens/s"
        yield colored(text, prompt), speed

    def fill(self, text: str, gap_length: int, temperature: float, seed: int) -> str:
        try:
            tokens = self.pipe.model.config.prediction_type == "tokens"
            generator = _generator(seed)
            with self.busy:
                filled = self.pipe.infill(
                    text, int(gap_length), temperature=temperature if tokens else None, generator=generator
                ).texts[0]
        except ValueError as error:
            raise _explained(error) from error
        parts, rest = [], filled
        for before, after in zip(text.split(GAP), text.split(GAP)[1:]):
            rest = rest.removeprefix(before)
            end = rest.find(after) if after else len(rest)
            parts.append((before, rest[:end]))
            rest = rest[end:]
        shown = "".join(
            f'<span class="given">{html.escape(b)}</span><span style="background:#bfe3bf">{html.escape(g)}</span>'
            for b, g in parts
        )
        return f'<div class="tokcom-text" role="status">{shown}<span class="given">{html.escape(rest)}</span></div>'

    def _check(self, text: str) -> None:
        """Raise `ValueError` for a text that would keep the page from all others."""
        count = len(text_ids(self.pipe.tokenizer, text))
        if count > LONGEST:
            raise ValueError(f"the text has {count} tokens, and this page reads at most {LONGEST}; shorten it.")

    def renoise(self, text: str, noise_level: float, seed: int) -> tuple[str, str, str]:
        """What the noisy latents of a text decode to, what denoising makes of them, and the plain reconstruction."""
        try:
            self._check(text)
            with self.busy, torch.no_grad():
                encoded = self.pipe.encode(text)
                generator = _generator(seed)
                again = torch.Generator()
                again.set_state(generator.get_state())
                seen = self._seen(encoded, noise_level, generator)
                denoised = self.pipe.denoise_reconstruct(text, noise_level, generator=again).texts[0]
                return colored(seen), denoised, self.pipe.reconstruct(text).texts[0]
        except ValueError as error:
            raise _explained(error) from error

    def _seen(self, encoded, noise_level: float, generator: torch.Generator) -> list[tuple[str, float]]:
        """What the model is shown of an encoded text at a noise level: its tokens, and how clean each is."""
        count = int(encoded.attention_mask.sum())
        if self.pipe.model.token_head is None:
            noise = self.pipe.prepare_latents(1, encoded.latents.shape[1], generator)
            noisy = self.pipe._sampler().add_noise(encoded.latents.float(), noise, noise_level)
            return self.emerging(noisy, noise_level)[:count]
        kept = kept_tokens(count, noise_level, spawn_generators(generator, 1)[0])
        tokens = self._tokens(encoded.sequences[0, :count].tolist())
        return [(token, 1.0) if keep else ("·", 0.0) for token, keep in zip(tokens, kept)]

    def latent_map(self, text: str) -> Figure:
        """The chunk latents of a text in the plane of their two largest principal components."""
        try:
            self._check(text)
            with self.busy:
                encoded = self.pipe.encode(text)
        except ValueError as error:
            raise _explained(error) from error
        size, latents = self.pipe.chunk_size, encoded.latents[0].float()
        if len(latents) < 3:
            raise _explained(ValueError(f"a map needs at least three chunks, {3 * size} tokens; give a longer text."))
        centred = latents - latents.mean(0)
        _, sizes, axes = torch.linalg.svd(centred, full_matrices=False)
        points = centred @ axes[:2].T
        shares = sizes.square() / sizes.square().sum()
        ids, real = encoded.sequences[0].tolist(), encoded.attention_mask[0].tolist()
        tokens = [t if r else "" for t, r in zip(self._tokens(ids), real)]
        figure = Figure(figsize=(8, 6), layout="constrained")
        plot = figure.subplots()
        plot.plot(*points.T, color="0.85", zorder=0)
        plot.scatter(*points.T, c=range(len(points)), cmap="viridis", s=40)
        for i, (x, y) in enumerate(points.tolist()):
            label = "".join(tokens[i * size : (i + 1) * size]).replace("\n", "⏎").replace("$", r"\$")
            plot.annotate(label, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=9)
        plot.set_xlabel(f"first principal component ({100 * shares[0]:.0f} % of the variance)")
        plot.set_ylabel(f"second ({100 * shares[1]:.0f} %)")
        plot.set_title(f"{len(points)} latents of {latents.shape[1]} numbers, in reading order from dark to light")
        return figure

    def to_picture(self, text: str):
        try:
            image = self.pixels.text_to_image(text)
        except ValueError as error:
            raise _explained(error) from error
        return image.resize((image.width * 8, image.height * 8), 0), self.pixels.image_to_text(image)

    def draw(self, caption: str, steps: int, guidance: float, seed: int) -> list[tuple[Image.Image, str]]:
        """Pictures for a caption: of its first tokens only, and of all."""
        prompt = caption.strip() or None
        try:
            with self.busy:
                settings = {"guidance_scale": guidance if prompt else 1.0, "generator": _generator(seed)}
                latents = self.images(prompt, 1, int(steps), **settings, output_type="latent").latents
                return self._prefixes(latents)
        except ValueError as error:
            raise _explained(error) from error

    def rebuild(self, picture: Image.Image | None) -> list[tuple[Image.Image, str]]:
        """A picture as its first tokens, and all of them, remember it."""
        try:
            if picture is None:
                raise ValueError("there is no picture; give one first.")
            with self.busy:
                return self._prefixes(self.images.encode(picture).latents)
        except ValueError as error:
            raise _explained(error) from error

    def _prefixes(self, latents: torch.Tensor) -> list[tuple[Image.Image, str]]:
        count = self.images.model.config.codec_config.num_tokens
        kept = [k for k in (1, 2, 4, 8, 16, 32) if k < count] + [count]
        pictures = [self.images.decode(latents, k).images[0] for k in kept]
        scale = max(1, 192 // pictures[0].width)
        large = [picture.resize((picture.width * scale, picture.height * scale), 0) for picture in pictures]
        return [(picture, f"{k} of {count} tokens") for picture, k in zip(large, kept)][::-1]


def build_page(demo: Demo) -> gr.Blocks:
    """The page of tabs."""
    config = demo.pipe.model.config
    tokens = config.prediction_type == "tokens"
    story = "Once upon a time there was a little rabbit who lived in a big wood."
    with gr.Blocks(title="TokCom") as page:
        gr.Markdown(f"# TokCom\n{NOTE}")
        with gr.Tab("Write"):
            with gr.Row():
                with gr.Column(scale=2):
                    prompt = gr.Textbox("Once upon a time", label="Prompt", lines=2, max_length=4000, elem_id="prompt")
                    with gr.Row():
                        length = gr.Slider(4, LONGEST, 96, step=4, label="Tokens to write")
                        steps = gr.Slider(1, 32, config.num_inference_steps, step=1, label="Denoising steps per block")
                    with gr.Accordion("Sampling", open=False):
                        temperature = gr.Slider(
                            0.1, 1.5, config.sampling_temperature, label="Temperature", interactive=tokens
                        )
                        top_p = gr.Slider(0.1, 1, config.sampling_top_p, label="Top-p", interactive=tokens)
                        guidance = gr.Slider(1, 4, 1, label="Guidance (1 is off)")
                        seed = gr.Number(0, label="Seed", precision=0)
                    slowly = gr.Slider(0, 1, 0.05, step=0.05, label="Slow motion: seconds per step")
                    with gr.Row():
                        button = gr.Button("Write", variant="primary", elem_id="write")
                        stop = gr.Button("Stop")
                with gr.Column(scale=3):
                    output = gr.HTML(colored([]), label="Text", elem_id="text")
                    speed = gr.Textbox(label="Speed", interactive=False, elem_id="speed")
            inputs = [prompt, length, steps, temperature, top_p, guidance, seed, slowly]
            writing = button.click(demo.write, inputs, [output, speed], show_progress="hidden")
            submitting = prompt.submit(demo.write, inputs, [output, speed], show_progress="hidden")
            stop.click(None, cancels=[writing, submitting])
        with gr.Tab("Fill gaps"):
            gapped = gr.Textbox(
                f"Once upon a time there was a {GAP} who lived in a big wood.",
                label=f"Text with gaps, written {GAP}",
                lines=2,
            )
            gap_length = gr.Slider(4, 64, 4, step=4, label="Tokens per gap")
            fill_temperature = gr.Slider(
                0.1, 1.5, config.sampling_temperature, label="Temperature", interactive=tokens
            )
            fill_seed = gr.Number(0, label="Seed", precision=0)
            filled = gr.HTML(colored([]), elem_id="filled")
            gr.Button("Fill", variant="primary", elem_id="fill").click(
                demo.fill, [gapped, gap_length, fill_temperature, fill_seed], filled
            )
        with gr.Tab("Noise"):
            noised = gr.Textbox(story, label="Text", lines=2)
            level = gr.Slider(0, 1, 0.6, step=0.05, label="Noise level (0 is pure noise, 1 is the clean text)")
            noise_seed = gr.Number(0, label="Seed", precision=0)
            seen = gr.HTML(colored([]), label="The noisy latents decode to")
            denoised = gr.Textbox(label="After denoising", interactive=False)
            kept = gr.Textbox(label="Encoded and decoded without noise", interactive=False)
            changes = [noised, level, noise_seed], [seen, denoised, kept]
            gr.Button("Mix and denoise", variant="primary").click(demo.renoise, *changes)
            level.release(demo.renoise, *changes)
        with gr.Tab("Latent map"):
            mapped = gr.Textbox(story, label="Text", lines=3)
            figure = gr.Plot(label="Latents of the text's chunks")
            gr.Button("Draw", variant="primary").click(demo.latent_map, mapped, figure)
        if demo.pixels is not None:
            with gr.Tab("Pixels"):
                pixel_text = gr.Textbox(story, label="Text", lines=3)
                picture = gr.Image(label="One pixel per token", format="png")
                back = gr.Textbox(label="Read back from the picture", interactive=False)
                gr.Button("Draw", variant="primary").click(demo.to_picture, pixel_text, [picture, back])
        if demo.images is not None:
            _image_tab(demo)
    return page


def _image_tab(demo: Demo) -> None:
    config = demo.images.model.config
    with gr.Tab("Images"):
        captioned = config.condition_vocab_size > 0
        caption = gr.Textbox(label="Caption", interactive=captioned, max_length=400, elem_id="caption")
        with gr.Row():
            steps = gr.Slider(1, 100, config.num_inference_steps, step=1, label="Denoising steps")
            guidance = gr.Slider(1, 6, 2 if captioned else 1, label="Guidance (1 is off)", interactive=captioned)
            seed = gr.Number(0, label="Seed", precision=0)
        drawn = gr.Gallery(label="All tokens, and the first ones", columns=7, elem_id="drawn")
        gr.Button("Draw", variant="primary", elem_id="draw").click(demo.draw, [caption, steps, guidance, seed], drawn)
        picture = gr.Image(label="Picture", type="pil")
        rebuilt = gr.Gallery(label="Encoded and decoded: all tokens, and the first ones", columns=7)
        gr.Button("Encode and decode", variant="primary").click(demo.rebuild, picture, rebuilt)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", default=os.environ.get("TOKCOM_MODEL", str(ROOT)), help="model directory or Hub id"
    )
    parser.add_argument("--pixels", help="a pixel model, for a tab of texts as pictures")
    parser.add_argument("--images", help="a model of images, for a tab that draws captions and rebuilds pictures")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--host", default="0.0.0.0" if "SPACE_ID" in os.environ else "127.0.0.1")
    parser.add_argument("--port", type=int, default=7860)
    args = parser.parse_args(argv)
    try:
        pipes = [
            None if path is None else load_pipeline(path).to(args.device)
            for path in (args.checkpoint, args.pixels, args.images)
        ]
    except (ValueError, OSError, StrictDataclassError) as error:
        parser.exit(1, f"error: {error}\n")
    if not pipes[0].model.config.codec_config.has_tokens:
        kind = pipes[0].model.config.codec_config.modality
        remedy = "give it as --images" if kind == "image" else "this page shows none of its kind"
        parser.exit(1, f"error: {args.checkpoint} is a model of {kind!r} data, not of text alone; {remedy}.\n")
    if pipes[2] is not None and pipes[2].model.config.codec_config.modality != "image":
        parser.exit(1, f"error: {args.images} makes no pictures; --images is for a model such as style-tiny.\n")
    page = build_page(Demo(*pipes))
    page.queue(default_concurrency_limit=1).launch(
        server_name=args.host, server_port=args.port, css=CSS, theme=gr.themes.Default(**FONTS)
    )


if __name__ == "__main__":
    main()
