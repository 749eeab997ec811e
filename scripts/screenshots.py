"""Screenshots of the demo page with the shipped models, taken in a headless Chromium.

    python scripts/screenshots.py docs                        # those that the documents show
    python scripts/screenshots.py outputs/screenshots --all   # every tab, wide and narrow

Needs chromium and chromium-driver (Debian's packages) and selenium (`make setup-dev`). The script
opens a tab, presses its first button as a visitor would, and waits until the answer is there.
"""

import argparse
import base64
import io
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import gradio as gr
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tokcom.cli.app import CSS, FONTS, Demo, build_page
from tokcom.cli.app_zoo import ShownModel
from tokcom.cli.options import shipped_zoo
from tokcom.pipeline_tokcom import TokComPipeline

MODEL = Path(__file__).resolve().parents[1]
WIDE = 1280
NARROW = 400  # a telephone, in CSS pixels
PATIENCE = 300  # seconds for one answer, the loading of weights included
MARGIN = 16  # pixels kept below the last widget of a tab
FLAGS = (
    "headless=new",
    "no-sandbox",
    "disable-gpu",
    "no-first-run",
    "hide-scrollbars",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
)
# JavaScript of the tab that is shown: the words of its boxes, and how many pictures it has
PANEL = "const panel = [...document.querySelectorAll('[role=tabpanel]')].find(p => p.offsetParent);"
WORDS = f"""{PANEL} return [...panel.querySelectorAll('.tokcom-text')].map(box => box.innerText)
    .concat([...panel.querySelectorAll('textarea[disabled]')].map(box => box.value))"""
PICTURES = f"""{PANEL} return [...panel.querySelectorAll('img')].filter(
    picture => picture.naturalWidth && picture.offsetParent).length"""
WAITING = (
    f"{PANEL} return panel.innerText.includes('processing') || !!panel.querySelector('.eta-bar')"
)


@dataclass(frozen=True)
class Shot:
    """A picture of a tab after its button was pressed.

    Args:
        name: of the file, without ".png".
        tab: its title.
        width: of the window, in CSS pixels.
        pictures: how many pictures the answer shows.
        words: how many characters stand in the boxes of the answer.
        ends_with: what the last of these boxes ends with.
    """

    name: str
    tab: str
    width: int = WIDE
    pictures: int = 0
    words: int = 0
    ends_with: str = ""

    def is_there(self, browser: webdriver.Chrome) -> bool:
        if browser.execute_script(WAITING):
            return False
        written = "".join(browser.execute_script(WORDS))
        pictures = browser.execute_script(PICTURES)
        enough = pictures >= self.pictures and len(written) >= self.words
        return enough and written.endswith(self.ends_with)


SHOTS = [
    Shot("app_emerging", "Write", words=150),
    Shot("app", "Write", ends_with="tokens/s"),
    Shot("app_fill", "Fill gaps", words=30),
    Shot("app_noise", "Noise", words=60),
    Shot("app_map", "Latent map", pictures=1),
    Shot("app_clips", "Clips", pictures=1),
    Shot("app_digits", "Digits", pictures=1),
    Shot("app_emoji", "Emoji", pictures=7),
    Shot("app_pixels", "Pixels", pictures=1, words=20),
]
DOCUMENTED = ("app", "app_fill", "app_digits", "app_narrow")


def open_browser() -> webdriver.Chrome:
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (binary and driver):
        sys.exit("error: no chromium or chromedriver; run `apt install chromium chromium-driver`.")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in FLAGS:
        options.add_argument(f"--{flag}")
    return webdriver.Chrome(options, webdriver.ChromeService(driver))


def set_width(browser: webdriver.Chrome, width: int) -> None:
    # a window cannot be narrower than 500 pixels; an emulated screen can
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def open_tab(browser: webdriver.Chrome, title: str) -> None:
    """Show a tab; on narrow screens those that do not fit are in a menu."""
    patient = WebDriverWait(browser, PATIENCE)
    patient.until(lambda b: b.find_elements(By.CSS_SELECTOR, "button[role=tab]"))
    for selector in ("button[role=tab]", ".overflow-dropdown button"):
        for tab in browser.find_elements(By.CSS_SELECTOR, selector):
            if tab.is_displayed() and tab.text.strip() == title:
                tab.click()
                return
        for menu in browser.find_elements(By.CSS_SELECTOR, ".overflow-menu > button"):
            if menu.is_displayed():
                menu.click()
    raise ValueError(f"the page has no tab {title!r}.")


def press(browser: webdriver.Chrome) -> None:
    """Press the button that the tab offers first."""
    buttons = browser.find_elements(By.CSS_SELECTOR, "button.primary")
    next(button for button in buttons if button.is_displayed()).click()


def save(browser: webdriver.Chrome, path: Path) -> None:
    """The page down to the end of its tab, in 256 colours."""
    # the speed is that of the machine at that moment, and no measurement
    browser.execute_script("document.querySelector('#speed').parentElement.style.display = 'none'")
    browser.execute_script("document.querySelector('footer').style.visibility = 'hidden'")
    end = browser.execute_script(f"{PANEL} return panel.getBoundingClientRect().bottom + scrollY")
    width = browser.execute_script("return window.innerWidth")
    clip = {"x": 0, "y": 0, "width": width, "height": end + MARGIN, "scale": 1}
    options = {"captureBeyondViewport": True, "clip": clip}
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", options)["data"]
    picture = Image.open(io.BytesIO(base64.b64decode(shot))).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    overflow = browser.execute_script("return document.documentElement.scrollWidth") - width
    note = f", {overflow} pixels wider than the screen" if overflow > 0 else ""
    print(f"{path}: {picture.width} x {picture.height}, {path.stat().st_size} bytes{note}")


def take(browser: webdriver.Chrome, address: str, shots: list[Shot], folder: Path) -> None:
    """Take `shots` of the page at `address`; those of one tab and width are of one answer."""
    before = None
    for shot in shots:
        if (shot.tab, shot.width) != before:
            set_width(browser, shot.width)
            browser.get(address)
            open_tab(browser, shot.tab)
            press(browser)
        before = (shot.tab, shot.width)
        WebDriverWait(browser, PATIENCE, 0.2).until(shot.is_there)
        save(browser, folder / f"{shot.name}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description="Take screenshots of the demo page.")
    parser.add_argument("folder", type=Path, help="where the pictures go")
    parser.add_argument("--all", action="store_true", help="take those of all tabs (default: off)")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    narrow = [replace(shot, name=f"{shot.name}_narrow", width=NARROW) for shot in SHOTS]
    shots = [shot for shot in SHOTS + narrow if args.all or shot.name in DOCUMENTED]

    browser = open_browser()
    models = [ShownModel(path) for path in shipped_zoo()]
    page = build_page(Demo(TokComPipeline.from_pretrained(MODEL)), models)
    options = {"css": CSS, "theme": gr.themes.Default(**FONTS), "quiet": True}
    try:
        _, address, _ = page.queue(default_concurrency_limit=1).launch(
            server_name="127.0.0.1", prevent_thread_lock=True, **options
        )
        take(browser, address, shots, args.folder)
    finally:
        browser.quit()
        page.close()


if __name__ == "__main__":
    main()
