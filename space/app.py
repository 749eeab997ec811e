"""A page for one TokCom text model, loaded as remote code: the package tokcom is not needed.

`TOKCOM_MODEL` names a model of the Hub or a directory, `TOKCOM_REVISION` pins it. Without them the
page takes the model in the folder above, which is how it runs in a checkout.
"""

import os
import queue
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import torch
from diffusers import DiffusionPipeline

CHECKOUT = Path(__file__).resolve().parents[1]
LONGEST = 256  # tokens
NOTHING = [("", None)]


def load_pipeline():
    """The pipeline that the environment names; ends the process with a remedy if there is none."""
    model = os.environ.get("TOKCOM_MODEL", str(CHECKOUT))
    if model == str(CHECKOUT) and not (CHECKOUT / "model_index.json").is_file():
        sys.exit("error: set the variable TOKCOM_MODEL to the id of a TokCom text model.")
    revision = os.environ.get("TOKCOM_REVISION")
    pipe = DiffusionPipeline.from_pretrained(model, revision=revision, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


pipe = load_pipeline()
busy = threading.Lock()  # one text at a time: a Space is small


class Frames:
    """A streamer that hands on every state of a text: what is finished, and the draft behind it."""

    def __init__(self):
        self.states: queue.Queue = queue.Queue()
        self.ids: list[int] = []

    def _text(self, ids: list[int]) -> str:
        return pipe.tokenizer.decode(ids, skip_special_tokens=True)

    def put(self, ids: torch.Tensor) -> None:
        self.ids += ids.flatten().tolist()
        self.states.put([(self._text(self.ids), None)])

    def put_draft(self, ids: torch.Tensor) -> None:
        done = self._text(self.ids)
        whole = self._text(self.ids + ids.flatten().tolist())
        self.states.put([(done, None), (whole[len(done) :], "draft")])

    def end(self) -> None:
        self.states.put(None)


def seeded(seed: float | None) -> torch.Generator:
    """Numbered random numbers; without a seed those of the system."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
        return generator
    # torch takes no seed of more than 64 bits, and a visitor may type anything
    return generator.manual_seed(int(seed) % 2**63)


def write(prompt: str, length: int, temperature: float, seed: float) -> Iterator[list]:
    """A continuation, and every denoising step on the way to it."""
    frames = Frames()
    problems: list[Exception] = []

    def work() -> None:
        try:
            with busy:
                pipe(
                    prompt,
                    gen_length=int(length),
                    temperature=temperature,
                    generator=seeded(seed),
                    streamer=frames,
                    # a page should not refuse a long text; its beginning is left out
                    truncation="left",
                )
        except Exception as error:  # shown on the page
            problems.append(error)
            frames.end()

    # the pipeline returns at the end; this function yields while it works
    threading.Thread(target=work, daemon=True).start()
    # None is put by `end`, after the last token or a failure
    while (state := frames.states.get()) is not None:
        yield state
    if problems:
        raise gr.Error(str(problems[0]), print_exception=False)


def fill(text: str, seed: float) -> str:
    """The text with every ____ filled; several lengths are tried and the likeliest text is kept."""
    try:
        with busy:
            return pipe.infill(text, gap_length=None, generator=seeded(seed)).texts[0]
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from error


def judge(text: str) -> tuple[str, list]:
    """How likely a text is, and each of its tokens."""
    try:
        with busy:
            (score,) = pipe.score(text)
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from error
    # as `score` reads it: without BOS, and what spells a special token is text
    options = {"add_special_tokens": False, "split_special_tokens": True}
    ids = pipe.tokenizer(text, **options)["input_ids"]
    tokens = [pipe.tokenizer.decode([i]) for i in ids]
    shown = [(token, round(-nats, 2)) for token, nats in zip(tokens, score.token_nats)]
    summary = (
        f"{score.nats_per_token:.3f} nats per token, {score.nats_per_character:.3f} per character"
    )
    return summary, shown


with gr.Blocks(title="TokCom") as page:
    gr.Markdown("# TokCom\nA language model that writes four tokens at a time, from noise.")
    with gr.Tab("Write"):
        prompt = gr.Textbox("Once upon a time", label="Prompt")
        with gr.Row():
            length = gr.Slider(4, LONGEST, 96, step=4, label="Tokens")
            temperature = gr.Slider(0.1, 1.5, 0.8, label="Temperature")
            seed = gr.Number(0, precision=0, label="Seed")
        written = gr.HighlightedText(NOTHING, label="Text", color_map={"draft": "orange"})
        button = gr.Button("Write", variant="primary")
        button.click(write, [prompt, length, temperature, seed], written, api_name="write")
    with gr.Tab("Fill gaps"):
        gap = gr.Textbox(
            "Lily was sad because she lost her ____. Her mom helped her.", label="Text"
        )
        gap_seed = gr.Number(0, precision=0, label="Seed")
        filled = gr.Textbox(label="Filled")
        gr.Button("Fill", variant="primary").click(fill, [gap, gap_seed], filled, api_name="fill")
    with gr.Tab("Score"):
        judged = gr.Textbox("Once upon a time there was a little rabbit.", label="Text")
        summary = gr.Textbox(label="Likelihood")
        tokens = gr.HighlightedText(NOTHING, label="Log-probability of each token")
        score = gr.Button("Score", variant="primary")
        score.click(judge, [judged], [summary, tokens], api_name="score")

if __name__ == "__main__":
    page.queue().launch()
