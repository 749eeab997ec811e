"""The page's functions give what the pipeline gives, and a real browser can use the page."""

import shutil
import socket
import threading
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from helpers import ROOT, seeded, tiny_pipeline
from PIL import Image

from tokcom.cli.app import CSS, FONTS, Demo, Writing, build_page, colored
from tokcom.cli.app_zoo import ShownModel, draw_text
from tokcom.cli.options import shipped_zoo
from tokcom.modeling_tokcom import TokComModel
from tokcom.pipeline_tokcom import TokComPipeline
from tokcom.processing_tokcom import vocabulary_size, write_wav
from tokcom.training.pipelines import build_pipeline
from tokcom.training.presets import preset_config

TURNS = {
    "prediction_type": "tokens",
    "codec_config": {"encoder_type": "token"},
    "transformer_config": {
        "num_hidden_layers": 3,
        "num_context_layers": 2,
        "block_size": 1,
    },
    "token_stagger": 1.0,
}
SETTINGS = dict(steps=4, temperature=1.0, top_p=1.0, guidance=1.0, seed=3)


@pytest.fixture
def demo(build):
    return Demo(build(transformer_config={"block_size": 2}))


def plain(page: str) -> str:
    import html
    import re

    return html.unescape(re.sub(r"<[^>]+>", "", page))


def test_frames_end_with_the_pipelines_text_and_its_speed(demo):
    frames = list(demo.write("Squinty", length=16, **SETTINGS))
    expected = demo.pipe("Squinty", gen_length=16, num_inference_steps=4, generator=seeded(3))
    count = int(expected.attention_mask.sum())
    assert plain(frames[-1][0]) == "Squinty" + "".join(
        demo._tokens(expected.sequences[0, :count].tolist())
    )
    assert f"{count} tokens in" in frames[-1][1] and "ms per token" in frames[-1][1]
    assert len(frames) > 1 and all("hsl(" in page for page, _ in frames)
    slow = list(demo.write("Squinty", length=16, slowly=0.001, **SETTINGS))
    assert (
        len(slow) == 4 * 2 + 1 and slow[-1][0] == frames[-1][0]
    )  # 2 blocks of 2 chunks, 4 steps each


def test_text_cannot_smuggle_markup_into_the_page(demo):
    assert "<script>" not in colored([("<script>", 0.5)], given="<b>")
    page = list(demo.write("<img src=x onerror=alert(1)>", length=4, **SETTINGS))[-1][0]
    assert "<img" not in page


def test_gaps_noise_and_map_show_the_pipelines_results(demo):
    text = "The family of four was ____ and went home."
    filled = demo.pipe.infill(text, 4, generator=seeded(1)).texts[0]
    assert plain(demo.fill(text, 4, 1.0, 1)) == filled
    story = "Mr. Rabbit went home to his wife and said that it was a fine day."
    seen, denoised, kept = demo.renoise(story, 1.0, 0)
    assert denoised == kept == demo.pipe.reconstruct(story).texts[0]
    assert (
        plain(seen)
        == "".join(demo._tokens(demo.pipe.reconstruct(story).sequences[0].tolist()))[
            : len(plain(seen))
        ]
    )
    assert (
        demo.renoise(story, 0.5, 2)[1]
        == demo.pipe.denoise_reconstruct(story, 0.5, generator=seeded(2)).texts[0]
    )
    figure = demo.latent_map(story)
    assert len(figure.axes[0].texts) == demo.pipe.encode(story).latents.shape[1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda demo: list(demo.write("", length=4, **SETTINGS)), "empty"),
        (
            lambda demo: list(demo.write("word " * 900, length=4, **SETTINGS)),
            "more than the model's maximum",
        ),
        (lambda demo: demo.fill("no gap", 4, 1.0, 0), "at least one gap"),
        (lambda demo: demo.renoise("", 0.5, 0), "empty"),
        (lambda demo: demo.latent_map("a"), "at least three chunks"),
        (lambda demo: demo.latent_map("word " * 600), "reads at most 512"),
        (lambda demo: demo.renoise("word " * 600, 0.5, 0), "reads at most 512"),
    ],
)
def test_mistakes_become_messages_and_the_page_goes_on(demo, call, message):
    with pytest.raises(gr.Error, match=message):
        call(demo)
    assert list(demo.write("Squinty", length=4, **SETTINGS))


@pytest.mark.parametrize("prompt, message", [("", "empty"), ("word " * 900, "maximum")])
def test_prompts_that_a_model_with_turns_cannot_read_are_explained_as_well(build, prompt, message):
    demo = Demo(build(**TURNS))
    with pytest.raises(gr.Error, match=message):
        list(demo.write(prompt, length=4, **SETTINGS))


# ---- the other models ----


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def tabs_of(page: gr.Blocks) -> list[str]:
    return [block.label for block in page.blocks.values() if isinstance(block, gr.Tab)]


@pytest.fixture
def models(tmp_path, tokenizer):
    """Tiny random models of every other kind, as they lie in `zoo/`."""
    size = vocabulary_size(tokenizer)
    config = preset_config("pixel-tiny", size, transformer_config={"num_hidden_layers": 1})
    pipes = {"pixels": build_pipeline(TokComModel(config).eval(), tokenizer)}
    for modality, name in (("image", "emoji"), ("video", "clips"), ("several", "digits")):
        pipes[name] = tiny_pipeline(modality, tokenizer)
    for name, pipe in pipes.items():
        pipe.save_pretrained(tmp_path / name)
    return [str(tmp_path / name) for name in pipes]


@pytest.fixture
def client(build, models):
    """A client of a page with all models, and what the page shows."""
    shown = [ShownModel(path, "cpu") for path in models]
    page = build_page(Demo(build()), shown)
    options = dict(server_name="127.0.0.1", server_port=free_port(), quiet=True)
    _, address, _ = page.queue().launch(prevent_thread_lock=True, **options)
    yield Client(address, verbose=False), page, {each.name: each for each in shown}
    page.close()


def test_every_model_has_a_tab_that_loads_its_weights_when_it_is_used(client, tmp_path):
    client, page, shown = client
    titles = ["Pixels", "Emoji", "Clips", "Digits"]
    assert tabs_of(page) == ["Write", "Fill gaps", "Noise", "Latent map", *titles]
    assert not any(each.is_loaded for each in shown.values())
    picture, text = client.predict("Mr. Rabbit went home.", api_name="/pixels_draw")
    assert text.startswith("Mr. Rabbit went home.") and Image.open(picture).width % 8 == 0
    assert [name for name, each in shown.items() if each.is_loaded] == ["pixels"]
    text, picture = client.predict("Mr. Rabbit", 0, api_name="/pixels_write")
    assert Image.open(picture).width % 16 == 0

    drawn = client.predict("a rabbit", 1, 2.0, 0, api_name="/emoji_draw")
    assert [row["caption"] for row in drawn][0] == "6 tokens"
    clip = client.predict("a rabbit", 1, 1.0, 0, api_name="/clips_animate")
    assert Image.open(clip).n_frames == 4 and Image.open(clip).width == 192

    sound = tmp_path / "tone.wav"
    write_wav(np.sin(np.arange(800) / 3), sound, 8000)
    made = client.predict(1, 2.0, 0, handle_file(sound), None, "", api_name="/digits_make")
    given, image, text = made
    assert Path(given).suffix == ".wav" and Image.open(image).size == (192, 192)
    assert isinstance(text, str) and all(each.is_loaded for each in shown.values())


def test_mistakes_with_other_models_become_messages(client):
    client, _, shown = client
    with pytest.raises(AppError, match="no picture"):
        client.predict(None, api_name="/emoji_rebuild")
    with pytest.raises(gr.Error, match="is empty"):
        draw_text(shown["pixels"], "")


def test_a_model_of_texts_has_no_tab_of_its_own(build, tmp_path):
    build().save_pretrained(tmp_path / "words")
    with pytest.raises(ValueError, match="--checkpoint"):
        ShownModel(str(tmp_path / "words"))
    with pytest.raises(FileNotFoundError, match="--models"):
        ShownModel(str(tmp_path / "nothing"))


def test_the_page_shows_what_lies_in_the_zoo_by_default():
    assert [Path(path).name for path in shipped_zoo()] == sorted(
        file.parent.name for file in (ROOT / "zoo").glob("*/model_index.json")
    )


@pytest.fixture
def browser():
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("needs chromium and chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    flags = (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "no-first-run",
        "disable-background-networking",
        "disable-sync",
    )
    for flag in (*flags, "disable-quic", "disable-component-update", "window-size=1200,1000"):
        options.add_argument(f"--{flag}")
    running = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield running
    running.quit()


@pytest.mark.slow
def test_a_browser_writes_text_by_click_and_by_keyboard_on_wide_and_narrow_screens(browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    port = free_port()
    page = build_page(Demo(TokComPipeline.from_pretrained(ROOT)))
    options = dict(server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True)
    page.queue(default_concurrency_limit=1).launch(
        css=CSS, theme=gr.themes.Default(**FONTS), **options
    )
    try:
        wait = WebDriverWait(browser, 60)
        browser.get(f"http://127.0.0.1:{port}/")
        button = wait.until(lambda b: b.find_element(By.CSS_SELECTOR, "button#write"))
        wait.until(lambda b: button.is_displayed())
        button.click()
        words = lambda b: b.find_element(By.CSS_SELECTOR, "#text .tokcom-text").text  # noqa: E731
        speed = lambda b: b.find_element(By.CSS_SELECTOR, "#speed textarea").get_attribute("value")  # noqa: E731
        wait.until(lambda b: len(words(b)) > 40)
        wait.until(lambda b: "ms per token" in speed(b))
        assert words(browser).startswith("Once upon a time") and len(words(browser)) > 150

        first = words(browser)
        prompt = browser.find_element(By.CSS_SELECTOR, "#prompt textarea")
        prompt.send_keys(Keys.CONTROL, "a")
        prompt.send_keys("The king", Keys.TAB)
        for _ in range(12):  # the button can be reached with Tab and pressed with Space
            if browser.switch_to.active_element.get_attribute("id") == "write":
                break
            browser.switch_to.active_element.send_keys(Keys.TAB)
        assert browser.switch_to.active_element.get_attribute("id") == "write"
        browser.switch_to.active_element.send_keys(Keys.SPACE)
        wait.until(
            lambda b: (
                words(b).startswith("The king") and words(b) != first and "ms per token" in speed(b)
            )
        )

        prompt.send_keys(Keys.CONTROL, "a")
        prompt.send_keys(Keys.DELETE)
        button.click()
        wait.until(lambda b: "is empty" in b.find_element(By.TAG_NAME, "body").text)
        browser.set_window_size(420, 900)
        browser.refresh()
        button = wait.until(lambda b: b.find_element(By.CSS_SELECTOR, "button#write"))
        wait.until(lambda b: button.is_displayed())
        width = browser.execute_script(
            "return document.documentElement.scrollWidth - window.innerWidth"
        )
        assert width <= 0, "the page is wider than a narrow screen"
    finally:
        page.close()
        threading.Event().wait(0.1)


@pytest.mark.slow
def test_probabilities_are_those_of_the_model_given_the_text_before(build):
    """Where every token is decided on its own they multiply to a distribution: over the next token
    they sum to 1."""
    pipe = build(**TURNS)
    demo, total = Demo(pipe), 0.0
    for token in range(vocabulary_size(pipe.tokenizer)):
        total += demo.probabilities("Mr. Rabbit went", [token])[0]
    assert abs(total - 1) < 1e-3


def test_the_end_of_a_prompt_is_not_shown_twice_while_text_emerges():
    """A chunk that a prompt leaves unfinished is denoised again with the new tokens."""
    demo = Demo(TokComPipeline.from_pretrained(ROOT))
    prompt = "Once upon a time there was"
    count = len(demo.pipe.tokenizer(prompt)["input_ids"])
    assert count % 4
    emerging = Writing(demo, prompt, 6, num_inference_steps=4, generator=seeded(3))
    emerging.run()
    frames = list(emerging.frames.queue)
    ids = frames[-1][0]
    last = "".join(text for text, _ in frames[-2])
    assert last == "".join(demo._tokens(ids)) and len(frames[-2]) == 6


def test_a_text_as_long_as_the_window_has_a_colour_for_every_token(build):
    demo = Demo(build(**TURNS))
    ids = [5] * (demo.pipe.max_length + 3)
    found = demo.probabilities("Squinty was a", ids)
    assert len(found) == len(ids) and found[0] == 0.5 and found[-1] != 0.5


def test_characters_of_several_tokens_and_the_end_of_a_text_are_shown_whole():
    demo = Demo(TokComPipeline.from_pretrained(ROOT))
    text = "He said \u201chello\u201d \u2014 it\u2019s fine, caf\u00e9."
    ids = demo.pipe.tokenizer(text)["input_ids"]
    tokens = demo._tokens([*ids, demo.pipe.tokenizer.eos_token_id])
    assert "".join(tokens) == text and len(tokens) == len(ids) + 1


def test_a_slow_page_does_not_keep_others_waiting(demo):
    frames = demo.write("Squinty", length=16, slowly=0.2, **SETTINGS)
    next(frames)
    began = threading.Event()
    thread = threading.Thread(target=lambda: (demo.fill("The ____ pig", 4, 1.0, 0), began.set()))
    thread.start()
    assert began.wait(5)
    frames.close()
