"""The page: a recording and its time on one side, what is made of the window on the other; one column on a phone."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component

from gep.app import html
from gep.app.recording import WINDOWS_MS, Library, Recording, Shown, read_recording, sensor_size
from gep.app.sample import large_scene, small_scene
from gep.app.views import EVENT_VIEWS, View, player, statistics
from gep.events.types import Events

SCENES = ("Scene", "Small scene")
"""The built-in recordings, of 192 by 144 and of 48 by 48 pixels."""
OWN = "Your own"
"""The choice that brings up the place to drop a file."""
_LARGE = 144  # rows of the larger scene
_TICK_S = 0.12  # between two windows of playing
_FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"]
_MONO = ["ui-monospace", "SFMono-Regular", "Consolas", "monospace"]
_HEAD = "<header><h1>gep</h1><p>What an event camera saw, and what a model makes of it.</p></header>"
_PLAY, _PAUSE = "▶ Play", "❚❚ Pause"
_GONE = html.notice("This recording is no longer kept", "Choose another, or drop it again.", error=True)
_WAITING = "Any format that gep reads: .raw, .dat, .aedat4, .hdf5, .npz, .csv, .bin and more."


class Page:
    """What happens on the page: plain functions from what is chosen to HTML.

    Args:
        views: of models, which come first; those of events alone follow.
        window_us: length of a window to begin with; 0 = by the recording.
    """

    def __init__(self, views: Sequence[View] = (), window_us: int = 0):
        self.views = {view.title: view for view in (*views, *EVENT_VIEWS)}
        makers = zip(SCENES, (large_scene, small_scene))
        self.library = Library({name: partial(_made, name, make) for name, make in makers})
        self._window_ms = round(window_us / 1000)

    def lengths(self) -> list[tuple[str, int]]:
        """Lengths of a window to choose from, as (text, ms)."""
        return [(f"{length} ms", length) for length in sorted({*WINDOWS_MS, self._window_ms} - {0})]

    def draw(self, key: str, number: float, length_ms: int, title: str, words: str = "") -> tuple[str, str]:
        """The player and the view of one window.

        Args:
            key: of the recording.
            number: of the window, from 1.
            length_ms: of a window.
            title: of the view.
            words: that were typed.
        """
        try:
            recording = self.library.get(key)
        except KeyError:
            return _GONE, _GONE
        shown = _shown(recording, int(number), length_ms, words)
        return player(shown), drawn(self.views[title], shown)

    def next(self, key: str, number: float, length_ms: int, title: str, words: str) -> tuple[Any, str, str]:
        """`draw` of the window after this one, the first after the last."""
        try:
            count = self.library.get(key).count(1000 * length_ms)
        except KeyError:
            return gr.skip(), _GONE, _GONE
        number = int(number) % count + 1
        return number, *self.draw(key, number, length_ms, title, words)

    def resized(self, key: str, number: float, was_ms: int, length_ms: int) -> tuple[Any, int]:
        """The slider for windows of another length, at the time where it was; and that length."""
        try:
            recording = self.library.get(key)
        except KeyError:
            return gr.skip(), length_ms
        place = (int(number) - 1) * was_ms // length_ms
        return _slider(recording, length_ms, place + 1), length_ms

    def opened(self, key: str, title: str, words: str) -> tuple[Any, ...]:
        """Everything for a recording that was just chosen: key, facts, length (twice), slider, player, view."""
        recording = self.library.get(key)
        length = self._window_ms or recording.window_ms()
        number = _third(recording, length)
        pictures = self.draw(key, number, length, title, words)
        return key, statistics(recording), length, length, _slider(recording, length, number), *pictures

    def dropped(self, path: str | None, size: str) -> tuple[str, str]:
        """Takes in a file, which is gone from the disk afterwards.

        Args:
            path: where it is now; None = there is none yet.
            size: of the sensor, as `sensor_size` reads it.
        Returns:
            Its key, or "" with a message.
        """
        if path is None:
            return "", html.notice("Drop a recording above", _WAITING)
        file = Path(path)
        try:
            height, width = sensor_size(size)
            key = self.library.add(read_recording(file, height=height, width=width))
        except ValueError as error:
            # Readers speak to programs: here one field stands for both.
            text = re.sub("(give|pass) height and width", "type the sensor's size above and press Open", str(error))
            text = text.removeprefix(f"{file.name}: ")
            return "", html.notice(f"{file.name} could not be opened", f"{text}.", error=True)
        file.unlink(missing_ok=True)
        return key, ""


def _made(name: str, make: Callable[[], Events]) -> Recording:
    return Recording(name, make())


def drawn(view: View, shown: Shown) -> str:
    """A view of a window, or a card that says why there is none."""
    try:
        return view.draw(shown)
    except (ValueError, OSError, RuntimeError) as error:
        return html.notice(f"{view.title} could not be computed", str(error), error=True)


def _shown(recording: Recording, number: int, length_ms: int, words: str) -> Shown:
    index = min(max(number, 1), recording.count(1000 * length_ms)) - 1
    return Shown(recording, *recording.bounds(index, 1000 * length_ms), words)


def _third(recording: Recording, length_ms: int) -> int:
    """Where to begin: at its very start a recording often shows little, and models have no past to read."""
    return 1 + recording.count(1000 * length_ms) // 3


def _slider(recording: Recording, length_ms: int, number: int) -> Any:
    count = recording.count(1000 * length_ms)
    return gr.Slider(
        1,
        count,
        min(number, count),
        step=1,
        label=f"Window, of {count:,}",
        interactive=count > 1,
        min_width=150,
        elem_id="window",
        buttons=[],
    )


def build(views: Sequence[View] = (), window_us: int = 0, rows: int = _LARGE) -> gr.Blocks:
    """The page.

    Args:
        views: of models; those of events alone follow by themselves.
        window_us: length of a window to begin with; 0 = by the recording.
        rows: of the models' input [px], by which the recording to begin with is chosen.
    """
    page = Page(views, window_us)
    titles, first = list(page.views), SCENES[0] if rows > _LARGE // 2 else SCENES[1]
    key, facts, length_ms, _, _, seen, made = page.opened(first, titles[0], "")
    # Dropped files that nothing became of are deleted after half an hour.
    with gr.Blocks(title="gep", analytics_enabled=False, delete_cache=(600, 1800)) as blocks:
        state, was = gr.State(key, delete_callback=page.library.drop), gr.State(length_ms)
        playing = gr.State(False)
        gr.HTML(_HEAD)
        with gr.Row(elem_id="source"):
            choice = gr.Radio([*page.library.names, OWN], value=first, label="Recording", elem_classes="pills")
        with gr.Column(visible=False, elem_id="own") as own:
            file = gr.File(show_label=False, height=120)
            with gr.Row(elem_id="sensor"):
                size = gr.Textbox(label="Sensor size, if the file has none", placeholder="640 × 480", min_width=150)
                again = gr.Button("Open", min_width=90, scale=0, elem_id="open")
            message = gr.HTML(html.notice("Drop a recording above", _WAITING), elem_id="message")
        facts_of = gr.HTML(facts, elem_id="facts")
        with gr.Row(elem_id="sides"):
            with gr.Column(min_width=320):
                seen_of = gr.HTML(seen, elem_id="player")
                with gr.Row(elem_id="controls"):
                    play = gr.Button(_PLAY, variant="primary", min_width=104, scale=0, elem_id="play")
                    number = _slider(page.library.get(first), length_ms, _third(page.library.get(first), length_ms))
                    length = gr.Dropdown(
                        page.lengths(), value=length_ms, label="Length", min_width=96, scale=0, elem_id="length"
                    )
            with gr.Column(min_width=320):
                title = gr.Radio(titles, value=titles[0], label="View", elem_classes="pills", elem_id="views")
                words = gr.Textbox("", visible=False, max_lines=2, submit_btn=True, elem_id="words")
                made_of = gr.HTML(made, elem_id="view")
        clock = gr.Timer(_TICK_S, active=False)

        chosen = [state, number, length, title, words]
        pictures = [seen_of, made_of]
        all_of = [state, facts_of, length, was, number, *pictures]
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        loud: dict[str, Any] = {"api_visibility": "private", "show_progress": "full", "show_progress_on": [made_of]}

        number.input(page.draw, chosen, pictures, trigger_mode="always_last", **quiet)
        clock.tick(page.next, chosen, [number, *pictures], **quiet)
        title.change(lambda name: _asked(page.views[name]), title, words, **quiet)
        title.input(page.draw, chosen, pictures, trigger_mode="always_last", **loud)
        words.submit(page.draw, chosen, pictures, **loud)
        length.input(page.resized, [state, number, was, length], [number, was], **quiet).then(
            page.draw, chosen, pictures, **loud
        )
        play.click(_toggled, playing, [playing, play, clock], **quiet)

        def choose(name: str, title: str, words: str) -> tuple[Any, ...]:
            skipped = (gr.skip(),) * len(all_of)
            return gr.Column(visible=name == OWN), *(skipped if name == OWN else page.opened(name, title, words))

        choice.input(choose, [choice, title, words], [own, *all_of], **loud)

        def take_in(path: str | None, size: str, title: str, words: str) -> Any:
            key, text = page.dropped(path, size)
            kept = page.opened(key, title, words) if key else (gr.skip(),) * len(all_of)
            done = html.notice("Opened", "Drop another recording to replace it.") if key else text
            return None if key else gr.skip(), done, *kept

        given: list[Component] = [file, size, title, words]
        opening: dict[str, Any] = {"api_visibility": "private", "show_progress": "full", "show_progress_on": [message]}
        gr.on([file.upload, size.submit, again.click], take_in, given, [file, message, *all_of], **opening)
    return blocks


def _asked(view: View) -> Any:
    return gr.Textbox(visible=bool(view.asks), label=view.asks or None)


def _toggled(playing: bool) -> tuple[bool, Any, Any]:
    return not playing, gr.Button(_PLAY if playing else _PAUSE), gr.Timer(_TICK_S, active=not playing)


def serve(blocks: gr.Blocks, *, host: str = "127.0.0.1", port: int = 7860, max_mb: int = 500) -> str:
    """Serves the page in threads of its own, to this machine alone by default; nothing is sent anywhere else.

    Args:
        blocks: of `build`.
        host, port: where to listen; port 0 = any that is free.
        max_mb: largest file that may be dropped [MB].
    Returns:
        The page's address.
    """
    _, address, _ = blocks.queue(default_concurrency_limit=2).launch(
        server_name=host,
        server_port=port or None,
        share=False,
        prevent_thread_lock=True,
        quiet=True,
        max_file_size=f"{max_mb}mb",
        footer_links=[],
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        run_history=False,
        theme=gr.themes.Base(primary_hue="blue", neutral_hue="slate", font=_FONT, font_mono=_MONO).set(
            body_text_color_subdued="*neutral_500"  # 4.7 : 1 on white
        ),
        css_paths=Path(__file__).parent / "style.css",
    )
    return str(address)
