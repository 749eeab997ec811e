"""The work of `tokcom app`: a page to play with a model.

Text that emerges from noise, gaps, noise levels and a map of latents; and a tab for every model of
`--models`, by default those in `zoo/`. In a Space, TOKCOM_MODEL names the model's repository.
"""

import argparse
import html
import os
import queue
import re
import threading
import time
from collections.abc import Iterator, Sequence

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before the import, which reads it

import gradio as gr
import matplotlib
import torch
from matplotlib.figure import Figure

from tokcom.cli.app_zoo import BUSY, ShownModel, explained, numbered_noise
from tokcom.cli.loading import check_modality, check_model_path, num_fillings, open_pipeline
from tokcom.evaluation.reconstruction import token_losses_at
from tokcom.pipeline_tokcom import GAP, TokComPipeline
from tokcom.processing_tokcom import decode_ids, text_ids
from tokcom.sampling_tokcom import kept_tokens, spawn_generators

matplotlib.use("Agg")
LONGEST = 512  # tokens that the page generates or reads at once
SLOWEST = 120  # seconds that slow motion may add
# of the visitor's system, so that nothing is fetched from elsewhere
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}
CSS = """
.tokcom-text {
  font-size: 1.1rem; line-height: 1.9; min-height: 6rem;
  overflow-wrap: anywhere; white-space: pre-wrap; padding-top: 1.2rem;
}
.tokcom-text span {border-radius: 3px; padding: 1px 0; color: #111}
.tokcom-text .given {background: none; color: inherit; opacity: .75}
"""
NOTE = (
    "The text model has {size:.1f} million parameters and writes {chunk} tokens at a time, from "
    "noise."
)
COLORS = (
    "While text emerges, colours go from red (noise) to green (denoised). Then they say how much "
    "the model expected each token, from red (a surprise) to green (certain). Point at a token for "
    "the number."
)
GAPPED = f"Lily was sad because she lost her {GAP}. Her mom helped her find it."
STORY = "Once upon a time there was a little rabbit who lived in a big wood."
LONGER_STORY = f"{STORY} One day he saw a red ball. He was very happy and ran home to his mom."


def text_box(content: str) -> str:
    """HTML of a box of text."""
    return f'<div class="tokcom-text" role="status">{content}</div>'


UNKNOWN = 0.5  # confidence in a token that was not scored


def given_text(text: str) -> str:
    """HTML of text that the model did not write."""
    return f'<span class="given">{html.escape(text)}</span>'


def colored(tokens: list[tuple[str, float]], given: str = "") -> str:
    """HTML of a `given` text and of tokens with confidences in [0, 1]."""
    spans = [given_text(given)] if given else []
    for text, score in tokens:
        style = f"background:hsl({120 * score:.0f},70%,80%)"
        spans.append(
            f'<span style="{style}" title="{100 * score:.0f} %">{html.escape(text)}</span>'
        )
    return text_box("".join(spans))


class Writing(threading.Thread):
    """A continuation in the background.

    What it puts into `frames`: for every denoising step a list of tokens and how clean each is; at
    the end `(ids, probabilities, seconds)`, or the exception that ended it.
    """

    def __init__(self, demo: "Demo", prompt: str, length: int, **settings):
        super().__init__(daemon=True)
        self.demo = demo
        self.prompt = prompt
        self.length = length
        self.settings = settings
        self.frames: queue.Queue = queue.Queue()
        self.stop = threading.Event()
        self.done: list[tuple[str, float]] = []  # tokens of finished blocks
        self.current: list[tuple[str, float]] = []  # tokens of the block that is being denoised
        self.skip = 0  # tokens of the prompt in the first block
        if demo.predicts_tokens:
            self.skip = len(demo.prompt_ids(prompt)) % demo.pipe.chunk_size
        self.shown_for = 0.0  # seconds spent on showing, which are not the model's

    def after_step(self, pipe, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        started = time.perf_counter()
        # diffusers' way to end a pipeline between two steps
        pipe._interrupt = self.stop.is_set()
        # steps count on from block to block
        index = step % len(pipe.scheduler.timesteps)
        if index == 0:  # a new block begins
            self.done = self.done + self.current
        # the latents are those after the step, at the time of the next one
        next_time = 1 - float(pipe.scheduler.sigmas[index + 1])
        self.current = self.demo.emerging(tensors["latents"].float(), next_time)
        # whole chunks are denoised, also where a text ends inside one
        self.frames.put((self.done + self.current)[self.skip : self.skip + self.length])
        self.shown_for += time.perf_counter() - started
        return tensors

    def run(self) -> None:
        try:
            with BUSY:
                started = time.perf_counter()
                output = self.demo.pipe(
                    self.prompt,
                    gen_length=self.length,
                    callback_on_step_end=self.after_step,
                    **self.settings,
                )
                seconds = time.perf_counter() - started - self.shown_for
                count = int(output.attention_mask.sum())
                ids = output.sequences[0, :count].tolist()
                self.frames.put((ids, self.demo.probabilities(self.prompt, ids), seconds))
        except Exception as error:  # shown on the page
            # an exception in a thread would be lost; the page raises it
            self.frames.put(error)


class Demo:
    """The page's functions for one pipeline; each raises `gr.Error` with a message for people."""

    def __init__(self, pipe: TokComPipeline):
        self.pipe = pipe
        pipe.set_progress_bar_config(disable=True)

    @property
    def predicts_tokens(self) -> bool:
        """Whether temperature and top-p have a meaning for this model."""
        return self.pipe.model.token_head is not None

    def prompt_ids(self, prompt: str) -> list[int]:
        """The ids of a prompt as the pipeline reads it: its last space is that of the next word."""
        return self.pipe._tokenize([prompt.rstrip(" ")], "prompt")[0]

    def _tokens(self, ids: list[int]) -> list[str]:
        """What each id adds to the text; a character of several tokens belongs to the last."""
        shown = ""
        pieces = []
        for end in range(1, len(ids) + 1):
            # all ids so far: a character of several bytes may be spread over tokens
            text = decode_ids(self.pipe.tokenizer, ids[:end])
            whole = text if end == len(ids) else text.rstrip("\ufffd")
            pieces.append(whole[len(shown) :] if whole.startswith(shown) else "")
            shown = whole if len(whole) >= len(shown) else shown
        return pieces

    @torch.no_grad()
    def emerging(self, latents: torch.Tensor, time: float) -> list[tuple[str, float]]:
        """What the noisy latents `(1, n, C)` of a block at `time` decode to.

        Returns each token with its own t: 0 is noise, 1 is clean.
        """
        model = self.pipe.model
        times = torch.full((1, latents.shape[1]), time)
        if model.token_head is None:
            # without turns all tokens of a chunk are at one time
            t = times.clamp(0, 1)[0].repeat_interleave(self.pipe.chunk_size)
        else:
            t = model.token_head.place_times(times).flatten()  # (tokens of the block,)
        return list(zip(self._tokens(model.to_ids(latents)[0].tolist()), t.tolist()))

    @torch.no_grad()
    def probabilities(self, prompt: str, ids: list[int]) -> list[float]:
        """The model's probability of each of the last tokens of a text, given the text before its
        chunk and, where the model decides one after the other, the tokens before it; of the decoder
        alone for models that regress latents."""
        row = self.prompt_ids(prompt) + ids
        size = self.pipe.chunk_size
        beyond = max(0, len(row) - self.pipe.max_length)
        row = row[-(-beyond // size) * size :]  # what is cut off is whole chunks
        whole, mask = self.pipe._pad([row], "right")
        if self.predicts_tokens:
            # the loss draws noise; the same text always gets the same colours
            torch.manual_seed(0)
            losses = token_losses_at(self.pipe.model, whole, 0.0, mask, begins=beyond == 0)
        else:
            losses = self.pipe.model.codec.loss(
                self.pipe.model.encode(whole, mask).latents, whole, mask
            )
        # nats to probabilities, of the written tokens without prompt and padding
        found = (-losses.flatten()).exp()[max(0, len(row) - len(ids)) : len(row)].tolist()
        # of what was cut off nothing is known
        return [UNKNOWN] * (len(ids) - len(found)) + found

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
        """Frames `(HTML, speed)` of a continuation; with `slowly` every denoising step is shown."""
        settings = {"num_inference_steps": int(steps), "guidance_scale": guidance}
        if self.predicts_tokens:
            settings |= {"temperature": temperature, "top_p": top_p}
        settings["generator"] = numbered_noise(seed)
        try:
            writing = Writing(self, prompt, int(length), **settings)
        except ValueError as error:  # of the prompt
            raise explained(error) from error
        # one visitor's slow motion must not keep the model from others
        until = time.monotonic() + SLOWEST
        writing.start()
        try:
            while isinstance(frame := writing.frames.get(), list):
                if slowly and time.monotonic() < until:
                    time.sleep(slowly)
                elif not writing.frames.empty():
                    continue  # the page is slower than the model: show the newest
                yield colored(frame, prompt), "denoising"
            if isinstance(frame, Exception):
                raise explained(frame) from frame
        finally:  # also when the visitor leaves
            writing.stop.set()
            # the thread holds the lock of the page until it has seen `stop`
            writing.join()
        ids, probabilities, seconds = frame
        count = len(ids)
        speed = f"{1000 * seconds / count:.1f} ms per token, {count / seconds:.0f} tokens/s"
        text = colored(list(zip(self._tokens(ids), probabilities)), prompt)
        yield text, f"{count} tokens in {seconds:.2f} s: {speed}"

    def fill(self, text: str, gap_length: int, temperature: float, seed: int) -> str:
        """HTML of a text whose gaps, of three or more underscores, are filled."""
        # people do not count underscores
        text = re.sub("_{3,}", GAP, text)
        settings = {"temperature": temperature} if self.predicts_tokens else {}
        settings |= {"num_candidates": num_fillings(self.pipe), "generator": numbered_noise(seed)}
        try:
            with BUSY:
                output = self.pipe.infill(text, int(gap_length), **settings)
        except ValueError as error:
            raise explained(error) from error
        spans = []
        rest = output.texts[0]
        pieces = text.split(GAP)
        for before, after in zip(pieces, pieces[1:]):
            rest = rest.removeprefix(before)
            # what stands before the text that follows the gap
            end = rest.find(after) if after else len(rest)
            spans.append(given_text(before))
            spans.append(f'<span style="background:#bfe3bf">{html.escape(rest[:end])}</span>')
            # what remains is read from the next gap on
            rest = rest[end:]
        return text_box("".join(spans) + given_text(rest))

    def _check(self, text: str) -> None:
        """Raise `ValueError` for a text that would keep the page from all others."""
        count = len(text_ids(self.pipe.tokenizer, text))
        if count > LONGEST:
            raise ValueError(
                f"the text has {count} tokens, and this page reads at most {LONGEST}; shorten it."
            )

    def renoise(self, text: str, noise_level: float, seed: int) -> tuple[str, str, str]:
        """What noisy latents of a text decode to, before and after denoising, and without noise."""
        try:
            self._check(text)
            with BUSY, torch.no_grad():
                encoded = self.pipe.encode(text)
                generator = numbered_noise(seed)
                again = torch.Generator()  # denoising draws the noise that is shown once more
                again.set_state(generator.get_state())
                seen = self._seen(encoded, noise_level, generator)
                output = self.pipe.denoise_reconstruct(text, noise_level, generator=again)
                clean = self.pipe.reconstruct(text)
                return colored(seen), output.texts[0], clean.texts[0]
        except ValueError as error:
            raise explained(error) from error

    def _seen(
        self, encoded, noise_level: float, generator: torch.Generator
    ) -> list[tuple[str, float]]:
        """What the model sees of a text at a noise level: tokens, and how clean they are."""
        count = int(encoded.attention_mask.sum())
        if self.pipe.model.token_head is None:
            noise = self.pipe.prepare_latents(1, encoded.latents.shape[1], generator)
            noisy = self.pipe._sampler().add_noise(encoded.latents.float(), noise, noise_level)
            return self.emerging(noisy, noise_level)[:count]
        # the draw that the pipeline makes from the same generator
        kept = kept_tokens(count, noise_level, spawn_generators(generator, 1)[0])
        tokens = self._tokens(encoded.sequences[0, :count].tolist())
        return [(token, 1.0) if keep else ("·", 0.0) for token, keep in zip(tokens, kept)]

    def latent_map(self, text: str) -> Figure:
        """The chunk latents of a text in the plane of their two largest principal components."""
        try:
            self._check(text)
            with BUSY:
                encoded = self.pipe.encode(text)
        except ValueError as error:
            raise explained(error) from error
        size = self.pipe.chunk_size
        latents = encoded.latents[0].float().cpu()
        # two points lie on a line, which has no second component
        if len(latents) < 3:
            raise explained(
                ValueError(
                    f"a map needs at least three chunks, {3 * size} tokens; give a longer text."
                )
            )
        centred = latents - latents.mean(0)  # (n, C)
        _, sizes, axes = torch.linalg.svd(centred, full_matrices=False)
        points = centred @ axes[:2].T  # (n, 2)
        # squared singular values are proportional to variances
        shares = sizes.square() / sizes.square().sum()
        pieces = self._tokens(encoded.sequences[0].tolist())
        real = encoded.attention_mask[0].tolist()
        # padding fills the last chunk and has no text
        tokens = [piece if is_text else "" for piece, is_text in zip(pieces, real)]
        figure = Figure(figsize=(8, 6), layout="constrained")
        plot = figure.subplots()
        plot.plot(*points.T, color="0.85", zorder=0)
        plot.scatter(*points.T, c=range(len(points)), cmap="viridis", s=40)
        for i, (x, y) in enumerate(points.tolist()):
            label = "".join(tokens[i * size : (i + 1) * size])
            label = label.replace("\n", "⏎").replace("$", r"\$")  # a dollar would begin a formula
            # words lean towards the middle, or those at the edges would leave the figure
            side = "left" if x < 0 else "right"
            offset = (4 if x < 0 else -4, 4)
            plot.annotate(
                label, (x, y), xytext=offset, textcoords="offset points", fontsize=9, ha=side
            )
        plot.set_xlabel(f"first principal component ({100 * shares[0]:.0f} % of the variance)")
        plot.set_ylabel(f"second ({100 * shares[1]:.0f} %)")
        plot.set_title(
            f"{len(points)} latents of {latents.shape[1]} numbers, read from dark to light"
        )
        return figure


# ---- the page, tab by tab ----


def build_page(demo: Demo, models: Sequence[ShownModel] = ()) -> gr.Blocks:
    """The page of tabs: those of the text model, and one for each of the other `models`."""
    size = sum(parameter.numel() for parameter in demo.pipe.model.parameters()) / 1e6
    note = NOTE.format(size=size, chunk=demo.pipe.chunk_size)
    with gr.Blocks(title="TokCom") as page:
        gr.Markdown(f"# TokCom\n{note}")
        with gr.Tab("Write"):
            _write_tab(demo)
        with gr.Tab("Fill gaps"):
            _fill_tab(demo)
        with gr.Tab("Noise"):
            _noise_tab(demo)
        with gr.Tab("Latent map"):
            _map_tab(demo)
        for shown in models:
            with gr.Tab(shown.title):
                shown.build_tab()
    return page


def _write_tab(demo: Demo) -> None:
    config = demo.pipe.model.config
    tokens = demo.predicts_tokens
    gr.Markdown(COLORS)
    with gr.Row():
        with gr.Column(scale=2):
            prompt = gr.Textbox(
                "Once upon a time", label="Prompt", lines=2, max_length=4000, elem_id="prompt"
            )
            with gr.Row():
                length = gr.Slider(4, LONGEST, 96, step=4, label="Tokens to write")
                steps = gr.Slider(
                    1, 32, config.num_inference_steps, step=1, label="Denoising steps per block"
                )
            with gr.Accordion("Sampling", open=False):
                temperature = _temperature(demo)
                top_p = gr.Slider(0.1, 1, config.sampling_top_p, label="Top-p", interactive=tokens)
                guidance = gr.Slider(
                    1, 4, config.sampling_guidance_scale, label="Guidance (1 is off)"
                )
                seed = gr.Number(0, label="Seed", precision=0)
            slowly = gr.Slider(0, 1, 0.05, step=0.05, label="Slow motion: seconds per step")
            with gr.Row():
                button = gr.Button("Write", variant="primary", elem_id="write")
                stop = gr.Button("Stop")
        with gr.Column(scale=3):
            output = _colored_box("Text", "text")
            speed = gr.Textbox(label="Speed", interactive=False, elem_id="speed")
    inputs = [prompt, length, steps, temperature, top_p, guidance, seed, slowly]
    writing = button.click(demo.write, inputs, [output, speed], show_progress="hidden")
    submitting = prompt.submit(demo.write, inputs, [output, speed], show_progress="hidden")
    # gradio closes the generator, whose `finally` stops the pipeline
    stop.click(None, cancels=[writing, submitting])


def _temperature(demo: Demo) -> gr.Slider:
    own = demo.pipe.model.config.sampling_temperature
    return gr.Slider(0.1, 1.5, own, label="Temperature", interactive=demo.predicts_tokens)


def _colored_box(label: str, elem_id: str | None = None) -> gr.HTML:
    return gr.HTML(colored([]), label=label, show_label=True, container=True, elem_id=elem_id)


def _fill_tab(demo: Demo) -> None:
    gr.Markdown(f"Write {GAP} where something is missing. The filling fits the text on both sides.")
    with gr.Row():
        with gr.Column(scale=2):
            gapped = gr.Textbox(GAPPED, label="Text with gaps", lines=3)
            gap_length = gr.Slider(1, 64, 2, step=1, label="Tokens per gap")
            temperature = _temperature(demo)
            seed = gr.Number(0, label="Seed", precision=0)
            button = gr.Button("Fill", variant="primary", elem_id="fill")
        with gr.Column(scale=3):
            filled = _colored_box("Filled text", "filled")
    button.click(demo.fill, [gapped, gap_length, temperature, seed], filled)


def _noise_tab(demo: Demo) -> None:
    gr.Markdown("Noise takes a part of a text away, and the model makes that part up.")
    with gr.Row():
        with gr.Column(scale=2):
            text = gr.Textbox(STORY, label="Text", lines=3)
            level = gr.Slider(
                0, 1, 0.6, step=0.05, label="Noise level (0 is pure noise, 1 the clean text)"
            )
            seed = gr.Number(0, label="Seed", precision=0)
            button = gr.Button("Mix and denoise", variant="primary")
        with gr.Column(scale=3):
            seen = _colored_box("What the model sees (a dot for each token that is lost)")
            denoised = gr.Textbox(label="After denoising", interactive=False)
            kept = gr.Textbox(label="Encoded and decoded without noise", interactive=False)
    inputs = [text, level, seed]
    outputs = [seen, denoised, kept]
    button.click(demo.renoise, inputs, outputs)
    # when the slider is let go, not at every value on the way
    level.release(demo.renoise, inputs, outputs)


def _map_tab(demo: Demo) -> None:
    gr.Markdown(f"Every {demo.pipe.chunk_size} tokens are one latent vector, here one point.")
    with gr.Row():
        with gr.Column(scale=2):
            mapped = gr.Textbox(LONGER_STORY, label="Text", lines=5)
            button = gr.Button("Draw", variant="primary")
        with gr.Column(scale=3):
            figure = gr.Plot(show_label=False)  # a label would cover the title
    button.click(demo.latent_map, mapped, figure)


def run(args: argparse.Namespace) -> None:
    """Load the text model and serve the page until it is stopped."""
    # all paths first: a typing mistake should not cost the loading of a model
    check_model_path(args.checkpoint)
    models = [ShownModel(path, args.device) for path in args.models]
    pipe = open_pipeline(args.checkpoint, args.device)
    check_modality(pipe, args.checkpoint)
    page = build_page(Demo(pipe), models)
    page.queue(default_concurrency_limit=1).launch(
        server_name=args.host, server_port=args.port, css=CSS, theme=gr.themes.Default(**FONTS)
    )
