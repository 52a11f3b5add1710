"""The page in headless Chromium, as wide as a desk's screen and as a phone; screenshots in .out/screenshots."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from gep.app import models
from gep.app.encoder_views import EncoderViews
from gep.events.io import write_events
from tests import hub_models
from tests.clip_models import aligned, tiny_clip
from tests.layouts import random_events

pytestmark = pytest.mark.browser
SIZES = {"desk": (1280, 900), "phone": (390, 844)}
SCREENSHOTS = Path(os.environ.get("GEP_SCREENSHOTS", Path(__file__).resolve().parent.parent / ".out" / "screenshots"))
ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
OPENED = "#player img"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    found = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    if not found:
        pytest.skip("no Chromium on the PATH: apt-get install chromium")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found[0], args=list(ARGUMENTS))
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    page = pytest.importorskip("gep.app.page", reason='gradio is not installed: pip install "gep[app]"')
    folder = tmp_path_factory.mktemp("models")
    exports = [str(hub_models.MODELS[name]().save_pretrained(folder / name)) for name in ("gep", "dense", "evrep")]
    loaded = models.load(exports)
    file, _ = tiny_clip(folder)
    named = aligned(file, folder / "named", windows=1)
    named.word_vectors(["a cat"], file=file)  # the tower is kept: nothing is downloaded
    words = [view for view in EncoderViews(named).views() if view.asks]
    blocks = page.build([*loaded.views, *words], loaded.window_us, loaded.rows)
    yield page.serve(blocks, port=0)
    blocks.close()


@pytest.fixture(scope="module")
def plain_address() -> Iterator[str]:
    page = pytest.importorskip("gep.app.page", reason='gradio is not installed: pip install "gep[app]"')
    blocks = page.build()
    yield page.serve(blocks, port=0)
    blocks.close()


class Visit:
    """A page that notes what it asks for and what goes wrong."""

    def __init__(self, browser: Any, address: str, size: str, scheme: str = "light"):
        width, height = SIZES[size]
        self.size, self.scheme = size, scheme
        self.context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.asked, self.wrong = list[str](), list[str]()
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("console", lambda message: self.wrong.append(message.text) if message.type == "error" else None)
        measure = self.context.new_cdp_session(self.page)
        measure.send("Performance.enable", {"timeDomain": "threadTicks"})
        begin, own = time.perf_counter(), time.process_time()
        self.page.goto(address, wait_until="commit")
        self.page.wait_for_selector(OPENED)
        self.seconds = time.perf_counter() - begin
        measured = {each["name"]: each["value"] for each in measure.send("Performance.getMetrics")["metrics"]}
        self.cpu_seconds = time.process_time() - own + measured["ProcessTime"]  # of the server and of the page
        self.page.wait_for_selector("#views label")

    def picture(self, place: str = OPENED) -> str:
        return str(self.page.locator(place).first.get_attribute("src"))

    def changed(self, before: str, place: str = OPENED) -> None:
        """Waits until a picture is another."""
        script = "([place, before]) => (document.querySelector(place) || {src: before}).src !== before"
        self.page.wait_for_function(script, arg=[place, before])

    def view(self, title: str) -> None:
        """Chooses a view and waits for it."""
        before = self.page.locator("#view").inner_html()
        chosen = self.page.locator("#views label", has_text=title).first
        chosen.click()
        script = "before => { const now = document.querySelector('#view').innerHTML; return now !== before }"
        self.page.wait_for_function(script, arg=before)
        box = chosen.bounding_box()
        assert -1 <= box["x"] and box["x"] + box["width"] <= SIZES[self.size][0] + 1, f"{title} is out of sight: {box}"

    def screenshot(self, name: str) -> None:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.page.wait_for_timeout(300)  # Gradio's own fading
        self.page.screenshot(path=SCREENSHOTS / f"{self.size}_{self.scheme}_{name}.png", full_page=True)

    def close(self) -> None:
        """Checks what holds for every visit."""
        wide = self.page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        self.context.close()
        assert wide[0] <= wide[1], f"the page scrolls sideways: {wide}"
        hosts = {urlsplit(url).hostname for url in self.asked if url.startswith(("http", "ws"))}
        assert hosts == {"127.0.0.1"}, f"asked for outside this machine: {hosts}"
        assert not self.wrong


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_built_in_recording_is_there_at_once(browser, plain_address, size, scheme, capsys):
    visit = Visit(browser, plain_address, size, scheme)
    with capsys.disabled():
        load = os.getloadavg()[0]
        seconds = f"{visit.seconds:.2f} s, {visit.cpu_seconds:.2f} s of it computing"
        print(f"\n{size}, {scheme}: first picture after {seconds}, at a load of {load:.1f}")
    assert visit.cpu_seconds < 3  # the time that others on the machine do not lengthen
    left, right = (visit.page.locator(place).bounding_box() for place in ("#player", "#view"))
    assert (abs(left["x"] - right["x"]) < 2) == (size == "phone")  # one column
    assert left["width"] > (340 if size == "phone" else 450)
    assert (left["y"] < right["y"] - 300) == (size == "phone")
    visit.screenshot("plain")
    visit.close()


@pytest.mark.parametrize("size", SIZES)
def test_it_plays_and_scrubs(browser, plain_address, size):
    visit = Visit(browser, plain_address, size)
    before, number = visit.picture(), visit.page.locator("#window input[type=range]")
    visit.page.locator("#play").click()
    visit.changed(before)
    visit.changed(visit.picture())
    visit.page.get_by_text("Pause").click()
    visit.page.get_by_text("Play").wait_for()
    visit.page.wait_for_timeout(1000)
    before = visit.picture()
    visit.page.wait_for_timeout(1000)
    assert visit.picture() == before  # it stands still
    shown = int(number.input_value())
    number.focus()
    visit.page.keyboard.press("ArrowRight" if shown < 24 else "ArrowLeft")
    visit.changed(before)
    assert abs(int(number.input_value()) - shown) == 1
    visit.close()


@pytest.mark.parametrize("size", SIZES)
def test_every_view_is_drawn(browser, address, size):
    visit = Visit(browser, address, size, "dark" if size == "phone" else "light")
    titles = visit.page.locator("#views label").all_inner_texts()
    assert titles[:6] == ["Tokens", "Input", "Similar windows", "Segmentation", "LLM-EvRep", "Words"]
    visit.screenshot("Tokens")
    for title in titles[1:]:
        visit.view(title)
        if title == "Words":
            visit.page.locator("#words textarea").fill("a cat, a photo of a dog, a paper plane")
            visit.page.locator("#words textarea").press("Enter")
            visit.page.wait_for_selector("#view .gep-bar")
        visit.page.wait_for_selector("#view figure")
        visit.screenshot(title.replace(" ", "_"))
    visit.close()


@pytest.mark.parametrize("size", SIZES)
def test_recordings_are_dropped_and_bad_ones_refused(browser, plain_address, size, tmp_path):
    visit = Visit(browser, plain_address, size)
    visit.page.locator("#source label", has_text="Your own").click()
    drop = visit.page.locator("#own input[type=file]")
    drop.wait_for(state="attached")
    (tmp_path / "notes.raw").write_bytes(b"nothing of events " * 20)
    before = visit.picture()
    drop.set_input_files(tmp_path / "notes.raw")
    message = visit.page.locator("#message .gep-error")
    message.wait_for()
    assert "notes.raw could not be opened" in message.inner_text() and "/" not in message.inner_text().split("known")[0]
    assert "press Open" not in message.inner_text()
    visit.screenshot("bad_file")
    clear = visit.page.locator("#own button[aria-label='Clear'], #own button[aria-label='Remove this file']").first
    clear.click()
    write_events(tmp_path / "good.arrow", random_events(3, 20_000, 500_000, 120, 160))
    drop.set_input_files(tmp_path / "good.arrow")
    visit.changed(before)
    visit.page.get_by_text("160 × 120 px").wait_for()
    assert "20,000" in visit.page.locator("#facts").inner_text()
    visit.screenshot("own_recording")
    write_events(tmp_path / "sizeless.raw", random_events(4, 10_000, 500_000, 100, 140))
    data = (tmp_path / "sizeless.raw").read_bytes()
    (tmp_path / "sizeless.raw").write_bytes(b"% evt 3.0\n" + data[data.index(b"% end\n") :])
    drop.set_input_files(tmp_path / "sizeless.raw")
    visit.page.get_by_text("type the sensor's size above and press Open").wait_for()
    visit.page.locator("#sensor input, #sensor textarea").fill("140 x 100")
    visit.page.locator("#open").click()
    visit.page.get_by_text("140 × 100 px").wait_for()
    visit.close()
