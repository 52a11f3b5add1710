"""The page itself, its server and its command, without a browser."""

from __future__ import annotations

import socket
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from gep import cli
from gep.app import views
from gep.app.recording import Recording, Shown
from gep.app.sample import small_scene
from gep.events.io import write_events

MS = 1000


@pytest.fixture(scope="module")
def scene() -> Recording:
    return Recording("Small scene", small_scene())


@pytest.fixture
def page_module(scene, monkeypatch):
    """gep.app.page, whose small scene is not simulated again."""
    module = pytest.importorskip("gep.app.page", reason="gradio is not installed")
    monkeypatch.setattr(module, "small_scene", lambda: scene.events)
    return module


def test_the_page_plays_resizes_and_takes_files_in(tmp_path, scene, page_module):
    page = page_module.Page()
    name, (title, *_) = "Small scene", list(page.views)
    assert title == "Time surface" and page.next(name, 30, 40, title, "")[0] == 1
    assert page.next(name, 3, 40, title, "")[1:] == page.draw(name, 4, 40, title)
    slider, was = page.resized(name, 11, 40, 100)  # 0.4 s
    assert (slider.value, slider.maximum, was) == (5, 12, 100)
    assert all("no longer kept" in text for text in page.draw("gone", 1, 40, title))
    write_events(tmp_path / "a.arrow", scene.events)
    key, message = page.dropped(str(tmp_path / "a.arrow"), "")
    assert key and not message and not (tmp_path / "a.arrow").exists()
    assert page.opened(key, title, "")[:4] == (key, views.statistics(scene), 50, 50)
    (tmp_path / "b.raw").write_bytes(b"junk <script>" * 9)
    key, message = page.dropped(str(tmp_path / "b.raw"), "48 x 48")
    assert not key and "b.raw" in message and "press Open" not in message and "<script>" not in message
    (tmp_path / "c.raw").write_bytes(b"% evt 3.0\n% end\n" + bytes(64))
    assert "; type the sensor&#x27;s size above and press Open." in page.dropped(str(tmp_path / "c.raw"), "")[1]
    assert "640 × 480" in page.dropped(str(tmp_path / "c.raw"), "large")[1]
    broken = views.View("Broken", lambda shown: (_ for _ in ()).throw(ValueError("no <weights>")))
    assert "no &lt;weights&gt;" in page_module.drawn(broken, Shown(scene, *scene.bounds(0, 50 * MS)))


def test_the_server_gives_no_files_away(tmp_path, page_module):
    blocks = page_module.build(rows=48)
    address = page_module.serve(blocks, port=0)
    try:
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(address) as answer:
            assert b"data:image/png;base64," in answer.read()
        (tmp_path / "secret.txt").write_text("secret")
        for place in (tmp_path / "secret.txt", Path(__file__), Path(page_module.__file__), Path("/etc/passwd")):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(f"{address}gradio_api/file={place}")
            assert refused.value.code in (403, 404)
    finally:
        blocks.close()


def test_a_port_in_use_is_named(page_module, capsys, monkeypatch):
    for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "")
    small = page_module.build(rows=48)
    monkeypatch.setattr(page_module, "build", lambda: small)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit) as stopped:
        port = taken.getsockname()[1]
        cli.main(["app", "--port", str(port)])
    assert stopped.value.code == 2 and f"--port {port}: choose another port" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, what",
    [(["--images", "a"], "needs an encoder"), (["--teacher", "timm:a"], "without --images"), (["--max-mb", "0"], "1")],
)
def test_the_command_refuses_what_has_no_effect(words, what, capsys, monkeypatch):
    pytest.importorskip("gradio", reason="gradio is not installed")
    for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["app", *words])
    assert stopped.value.code == 2 and what in capsys.readouterr().err
