"""The report of LLM-EvRep's evaluation: what is in the page and in the picture."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from downstream.llm_evrep import gallery

GREEN, RED = (26, 127, 55), (207, 34, 46)
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Tags, texts and attributes, with the nesting checked."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.addresses: list[str | None] = []
        self.cells: list[list[str]] = []
        self.said: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag == "img":
            self.images.append(found)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        if tag == "div" and found.get("class") == "said":
            self.said.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if "td" in self.open or "th" in self.open:
            self.cells[-1][-1] += data
        if "figure" in self.open and "figcaption" not in self.open and self.said:
            self.said[-1] += data


def make_rows(readers: tuple[str, ...] = ("a:1",)) -> list[dict]:
    rng = np.random.default_rng(0)
    texts = {"tencode": "It is a 3.", "rgb": "Seven"}
    rows = []
    for number, truth in enumerate(("7", "3")):
        images = {
            "tencode": torch.from_numpy(rng.integers(0, 256, (3, 10, 20), dtype=np.uint8)),
            "rgb": torch.from_numpy(rng.random((3, 10, 20), dtype=np.float32)),
        }
        answers = {reader: dict(texts) for reader in readers}
        rows.append({"key": f"k{number}", "truth": truth, "images": images, "answers": answers})
    return rows


def make_table(readers: tuple[str, ...] = ("a:1",)) -> dict:
    row = {"accuracy": 61.25, "low": 55.0, "high": 66.66, "refused": 3, "jaccard": None, "sobel_error": 0.01234}
    better = {**row, "accuracy": 90.0, "num": 80, "gain": 28.75, "gain_low": 20.0, "gain_high": 33.0, "jaccard": 0.5}
    return {reader: {"tencode": {**row, "num": 80}, "rgb": better} for reader in readers}


def page_of(folder: Path, rows: list[dict], table: dict | str, **options: object) -> tuple[Page, str]:
    path = gallery.write(folder, rows, table, **options)
    assert path == folder / "report.html" and (folder / "gallery.png").is_file()
    text = path.read_text(encoding="utf-8")
    return Page(text), text


def test_the_page_holds_its_pictures_exactly(tmp_path: Path) -> None:
    rows = make_rows()
    page, text = page_of(tmp_path / "new" / "folder", rows, make_table())
    assert len(page.images) == 4
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not re.search(r"https?://|url\(|<script|<link", text)
    expected = [image for row in rows for image in row["images"].values()]
    for found, image in zip(page.images, expected):
        data = base64.b64decode(found["src"].split(",")[1])
        got = np.asarray(Image.open(io.BytesIO(data))).transpose(2, 0, 1)
        own = image.numpy() if image.dtype == torch.uint8 else np.round(255 * image.numpy()).astype(np.uint8)
        np.testing.assert_array_equal(got, own)
        assert found["alt"] in ("tencode", "rgb") and found["class"] == "small"
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text


def test_the_table_has_intervals(tmp_path: Path) -> None:
    page, text = page_of(tmp_path, make_rows(), make_table())
    head, tencode, rgb = page.cells
    assert head[:4] == ["source", "accuracy, %", "interval", "gain, points"]
    assert tencode == ["tencode", "61.2", "[55.0, 66.7]", "", "3", "–", "0.0123", "80"]
    assert rgb == ["rgb", "90.0", "[55.0, 66.7]", "+28.8 [20.0, 33.0]", "3", "0.500", "0.0123", "80"]
    assert "var(--bar) 90.0%" in text
    plain = {"a:1": {"rgb": {"accuracy": 50.0}}}  # what was not measured is left out
    assert page_of(tmp_path, [], plain)[0].cells[1] == ["rgb", "50.0", "", "–", "–", "–", "–"]


def test_right_and_wrong_are_marked(tmp_path: Path) -> None:
    page, _ = page_of(tmp_path, make_rows(), make_table())
    assert page.said == ["✗ It is a 3.", "✓ Seven", "✓ It is a 3.", "✗ Seven"]
    rows = make_rows()
    rows[0]["right"] = {"a:1": {"tencode": True, "rgb": False}}  # what the caller knows rules
    assert page_of(tmp_path, rows, make_table())[0].said[:2] == ["✓ It is a 3.", "✗ Seven"]


def test_answers_are_judged_among_all_classes(tmp_path: Path) -> None:
    row = make_rows()[0] | {"truth": "sea_horse", "answers": {"a:1": {"tencode": "A cat or a sea horse"}}}
    assert page_of(tmp_path, [row], {})[0].said == ["✓ A cat or a sea horse"]
    assert page_of(tmp_path, [row], {}, classes=["cat", "sea_horse"])[0].said == ["✗ A cat or a sea horse"]


def test_what_people_and_models_wrote_is_text(tmp_path: Path) -> None:
    rows = make_rows(("<i>r</i>",))[:1]
    rows[0] |= {"key": "<key>", "truth": "a & b", "answers": {"<i>r</i>": {"tencode": "<script>x</script>", "rgb": ""}}}
    rows[0]["images"] = {"tencode": rows[0]["images"]["tencode"], '"><b>': rows[0]["images"]["rgb"]}
    page, text = page_of(tmp_path, rows, make_table(("<i>r</i>",)))
    assert page.said == ["✗ <script>x</script>"] and "<script>" not in text and "&lt;key&gt;" in text
    assert page.images[1]["alt"] == '"><b>'
    rows[0]["answers"]["<i>r</i>"]["tencode"] = " \n "
    assert page_of(tmp_path, rows, "a < b")[0].said == ["✗ (nothing)"]
    assert "<pre>a &lt; b</pre>" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_long_answers_fold_and_lose_nothing(tmp_path: Path) -> None:
    rows = make_rows()[:1]
    long = " ".join(f"word{number}" for number in range(100)) + " 7"
    rows[0]["answers"]["a:1"] = {"tencode": long, "rgb": "x" * 500}
    page, text = page_of(tmp_path, rows, make_table())
    assert text.count("<details>") == 2
    assert page.said[0].replace(" more", "") == f"✓ {long}"
    assert page.said[1].replace(" more", "") == f"✗ {'x' * 500}"


def test_several_readers_are_told_apart(tmp_path: Path) -> None:
    readers = ("a:1", "b:2")
    page, text = page_of(tmp_path, make_rows(readers), make_table(readers))
    assert page.said[:3] == ["A ✗ It is a 3.", "B ✗ It is a 3.", "A ✓ Seven"]
    assert text.count("Read by") == 2 and "<br>B: b:2" in text


def test_the_same_results_give_the_same_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        gallery.write(tmp_path / name, make_rows(), make_table())
    for name in ("report.html", "gallery.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def find(page: np.ndarray, image: np.ndarray) -> tuple[int, int]:
    """Row and column at which an image stands on a page."""
    height, width = image.shape[:2]
    corner = np.argwhere((page == image[0, 0]).all(-1))
    found = [(r, c) for r, c in corner if np.array_equal(page[r : r + height, c : c + width], image)]
    assert len(found) == 1
    return int(found[0][0]), int(found[0][1])


def test_the_picture_has_every_image_with_its_mark_below() -> None:
    rows = [row | {"right": {"a:1": {"tencode": n == 0, "rgb": n == 1}}} for n, row in enumerate(make_rows())]
    page = np.asarray(gallery.draw(rows, make_table(), side=145))
    places = {}
    for number, row in enumerate(rows):
        for source, image in row["images"].items():
            pixels = image.numpy() if image.dtype == torch.uint8 else np.round(255 * image.numpy()).astype(np.uint8)
            magnified = pixels.transpose(1, 2, 0).repeat(7, 0).repeat(7, 1)  # 20 pixels into 145
            top, left = find(page, magnified)
            places[number, source] = (top, left)
            below = page[top + 70 : top + 90, left : left + 140].reshape(-1, 3)
            right = (source == "tencode") == (number == 0)
            counts = {colour: int((below == colour).all(-1).sum()) for colour in (GREEN, RED)}
            assert counts[GREEN if right else RED] > 10 and counts[RED if right else GREEN] == 0
    assert places[0, "tencode"][0] == places[0, "rgb"][0] < places[1, "rgb"][0]
    assert places[0, "tencode"][1] == places[1, "tencode"][1] < places[0, "rgb"][1]


@pytest.mark.parametrize("size", [(4, 300), (300, 4), (480, 640), (1, 1)])
def test_images_of_any_size_are_drawn(tmp_path: Path, size: tuple[int, int]) -> None:
    rows = make_rows()
    rows[0]["images"] = {"tencode": torch.rand(3, *size), "rgb": torch.rand(3, 36, 36)}
    page, _ = page_of(tmp_path, rows, make_table())
    assert len(page.images) == 4
    assert Image.open(tmp_path / "gallery.png").width < 400


def test_a_report_without_samples_is_a_table(tmp_path: Path) -> None:
    page, text = page_of(tmp_path, [], make_table())
    assert len(page.cells) == 3 and not page.images and "Images and answers" not in text
    page_of(tmp_path, [], "")
