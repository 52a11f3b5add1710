"""The demo's report.html: one file that holds its pictures, plus the same pictures as PNGs beside it."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from gep.demo import figures
from gep.demo.figures import PIXELS, SCRATCH, STAGE1, STAGE2
from gep.demo.figures_dense import depth_grid, segmentation_grid

_ROWS = (
    ("counted pixels", ("pixels",), PIXELS),
    ("trained from scratch", ("scratch",), SCRATCH),
    ("stage 1, last window", ("stage1", "last"), STAGE1),
    ("stage 1, all windows", ("stage1", "all"), STAGE1),
    ("stage 2, last window", ("stage2", "last"), STAGE2),
    ("stage 2, all windows", ("stage2", "all"), STAGE2),
)


_NAMES = {
    "histogram": "head on\nhistograms",
    "scratch": "from\nscratch",
    "stage1": "stage 1,\nlast window",
    "stage2": "stage 2,\nlast window",
}


def write(
    folder: Path,
    results: Mapping[str, Any],
    pictures: Mapping[str, Any],
    scenes: Mapping[str, Any],
    gallery: bytes,
    *,
    teacher_accuracy: float,
) -> Path:
    """Writes report.html and pictures/*.png into the demo's folder.

    Args:
        folder: the demo's, with each stage's metrics.jsonl.
        results: what results.json holds.
        pictures: arrays of `evaluation.Found`.
        scenes: arrays of `scenes.Found`.
        gallery: PNG of `evrep.Found`.
        teacher_accuracy: of the stand-in on unseen digits, percent.
    Returns:
        The report's path.
    """
    drawn = draw(folder, results, pictures) | draw_scenes(scenes) | {"llm_evrep": gallery}
    (folder / "pictures").mkdir(exist_ok=True)
    for name, data in drawn.items():
        (folder / "pictures" / f"{name}.png").write_bytes(data)
    page = _page(results, drawn, teacher_accuracy, pictures["window_ms"])
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def draw(folder: Path, results: Mapping[str, Any], pictures: Mapping[str, Any]) -> dict[str, bytes]:
    """All pictures of the report: name -> PNG."""
    drawn: dict[str, bytes] = {}
    recognition = results["recognition"]
    tables = {name: _find(recognition, path) for name, path, _ in _ROWS}
    drawn["shots"] = figures.shots_figure(tables, {name: colour for name, _, colour in _ROWS})
    early = {name: values for name, values in recognition["early"].items() if None not in values}
    if early:
        names = {"stage1": "stage 1, mean of windows so far", "stage2": "stage 2, newest window"}
        drawn["early"] = figures.curves(
            {names[stage]: (range(1, len(values) + 1), values) for stage, values in early.items()},
            x_label=f"windows seen ({pictures['window_ms']:g} ms each)",
            y_label="5-shot accuracy, %",
            colours={names["stage1"]: STAGE1, names["stage2"]: STAGE2},
            markers=True,
        )
    for stage, keys in (
        ("teacher", ("loss",)),
        ("stage1", ("loss", "regression", "contrastive")),
        ("stage2", ("loss", "next", "image")),
    ):
        lines = _read_metrics(folder / stage / "metrics.jsonl")
        series = {key: _series(lines, key) for key in keys}
        drawn[f"loss_{stage}"] = figures.curves(
            {key: pair for key, pair in series.items() if pair[0]}, x_label="step", y_label=f"{stage}: loss"
        )
    drawn["tokens"] = _token_picture(pictures)
    if "retrieved" in pictures:
        drawn["retrieval"] = figures.retrieval_grid(
            pictures["events_all"], pictures["retrieved"], pictures["retrieved_right"], pictures["labels"]
        )
    return drawn


def draw_scenes(scenes: Mapping[str, Any]) -> dict[str, bytes]:
    """Masks and depth of a few scenes, by every method: name -> PNG."""
    rows = [f"scene {number + 1}" for number in range(len(scenes["true_mask"]))]
    masks, depths = ({_NAMES[name]: maps for name, maps in scenes[task].items()} for task in ("segmentation", "depth"))
    seen, truth = scenes["events"], scenes["true_depth"]
    near, far = float(np.nanmin(truth)), float(np.nanmax(truth))
    return {
        "segmentation": segmentation_grid(
            seen, scenes["true_mask"], masks, scenes["classes"], rows, images=scenes["image"]
        ),
        "depth": depth_grid(seen, truth, depths, rows, near_m=near, far_m=far, images=scenes["image"]),
    }


def _token_picture(pictures: Mapping[str, Any]) -> bytes:
    rows, cols = pictures["grid"]
    tokens = pictures["tokens"]
    basis = "teacher" if "teacher" in tokens else "stage 1,\nmean"
    coloured = figures.principal_colours(tokens, basis)
    columns: list[tuple[str, np.ndarray]] = []
    if "image" in pictures:
        columns.append(("image", pictures["image"]))
    columns.append(("events,\nwindow 1", pictures["events"]))
    columns.append(("events,\nall windows", pictures["events_all"]))
    columns += [(name, value.reshape(len(value), rows, cols, 3)) for name, value in coloured.items()]
    return figures.token_grid(columns, pictures["labels"])


def _page(results: Mapping[str, Any], drawn: Mapping[str, bytes], teacher_accuracy: float, window_ms: float) -> str:
    recognition, stage1, stage2 = results["recognition"], results["stage1"], results["stage2"]
    shots = list(recognition["pixels"])
    rows = [[name, *(_accuracy(_find(recognition, path).get(k)) for k in shots)] for name, path, _ in _ROWS]
    zero = recognition["zero_shot"]
    picture = {name: _image(name, data) for name, data in drawn.items()}
    source = f"{recognition['num_test']} {recognition['source']}"
    parts = [
        "<h1>GEP: from images to an event model</h1>",
        f'<p class="note">Everything on this page was made by <code>gep demo</code> without a download. The image '
        f"model is a <b>stand-in</b>: a small ViT trained here on MNIST digits for a minute "
        f"({teacher_accuracy:.1f}% on unseen digits). With a network, name a real one: "
        f"<code>teacher.name=timm:vit_small_patch14_reg4_dinov2.lvd142m</code>. Training saw simulated events only; "
        f"every number below is on {html.escape(source)} (list <code>{recognition['list']}</code>) whose digits were "
        "never trained on.</p>",
        "<h2>What the tokens say</h2>",
        "<p>Colours are the first three principal components of the image model's tokens, shared by all columns. "
        f"Stage 1 learned to say the same from one window of events ({window_ms:g} ms); stage 2 predicts the image's "
        "tokens from all the windows so far.</p>",
        f'<div class="wide">{picture["tokens"]}</div>',
        "<h2>Recognition</h2>",
        "<p>A linear classifier on frozen features, learned from k labelled recordings a class: accuracy in %, mean ± "
        "standard deviation over draws.</p>",
        _table(["labelled recordings a class", *shots], rows),
        f"<p>Zero-shot, by the image model's own classes and no labelled recording: stage 1 "
        f"<b>{zero['stage1']:.1f}%</b>, stage 2 <b>{zero['stage2']:.1f}%</b>.</p>",
        f'<div class="row">{picture["shots"]}{picture.get("early", "")}</div>',
    ]
    if "retrieval" in picture:
        parts += [
            "<h2>Images found from events alone</h2>",
            "<p>The image tokens that stage 2 predicts after the last window, against those of all the images; "
            "a green frame is the image that the recording shows.</p>",
            picture["retrieval"],
        ]
    parts += _scene_parts(results, picture) + _evrep_parts(results, picture)
    parts += [
        "<h2>Both stages</h2>",
        f"<p>Stage 1 on held-out simulated pairs: event → image R@1 {stage1['r1']:.1f}%, R@5 {stage1['r5']:.1f}%, "
        f"token cosine to the image model {stage1['token_cosine']:.3f}.</p>",
        _table(
            ["stage 2, squared error of the next token", "model", "copy the previous frame", "mean token"],
            [["", *(f"{stage2[name]:.3f}" for name in ("loss", "copy_previous", "mean_token"))]],
        ),
        f'<div class="row">{picture["loss_teacher"]}{picture["loss_stage1"]}{picture["loss_stage2"]}</div>',
        "<h2>Time</h2>",
        _table(["step", "seconds"], [[name, f"{value:.1f}"] for name, value in results["seconds"].items()]),
    ]
    style = resources.files("gep.demo").joinpath("report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><title>GEP demo</title><style>{style}</style></head><body>'
        + "\n".join(parts)
        + "</body></html>\n"
    )


def _scene_parts(results: Mapping[str, Any], picture: Mapping[str, str]) -> list[str]:
    scenes = results["scenes"]
    masks, depths = results["segmentation"], results["depth"]
    rows = [
        [
            _NAMES[method].replace("\n", " "),
            *(_accuracy(masks[method][name]) for name in ("miou", "acc")),
            *(_accuracy(depths[method][name], digits) for name, digits in (("abs_rel", 3), ("rmse", 2), ("delta1", 3))),
        ]
        for method in masks
    ]
    head = ["", "mIoU, %", "pixel accuracy, %", "AbsRel (≤ 30 m)", "RMSE, m (≤ 30 m)", "δ < 1.25 (≤ 30 m)"]
    return [
        "<h2>Masks and depth of scenes</h2>",
        f"<p>Textured cards before a background and a camera in motion, simulated: masks and metric depth are exact. A "
        f"second stand-in learned from labelled <em>pictures</em> of other scenes; both stages saw events and pictures "
        f"without labels. Then a linear map on frozen features learns from {scenes['labelled']} labelled scenes and is "
        f"tested on {scenes['test']} with other digits and photographs, mean ± standard deviation over "
        f"{scenes['seeds']} draws of the labelled scenes. Stage 1 reads the last window ({scenes['window_ms']:g} ms), "
        "stage 2 has seen the windows before it; the histogram's head gets all windows, and the network from scratch "
        "is stage 1's encoder with random weights.</p>",
        _table(head, rows),
        f'<div class="wide">{picture["segmentation"]}</div>',
        f'<div class="wide">{picture["depth"]}</div>',
    ]


def _evrep_parts(results: Mapping[str, Any], picture: Mapping[str, str]) -> list[str]:
    trained, second = results["llm_evrep_details"].values()

    def cells(row: Mapping[str, Any]) -> list[str]:
        if len(row["each"]) == 1:
            return [f"{row['accuracy'][0]:.1f}", "–" if row["sobel_error"] is None else f"{row['sobel_error'][0]:.3f}"]
        return [_accuracy(row["accuracy"]), _accuracy(row["sobel_error"], 3)]

    rows = [[source, *cells(row)[:1], *cells(second[source])] for source, row in trained.items()]
    head = ["source of the image", "reader it was trained with, %", "another reader, %", "error of the edges"]
    seeds = max(len(row["each"]) for row in trained.values())
    return [
        "<h2>Images that a frozen model can read</h2>",
        "<p>LLM-EvRep turns events into an image for a frozen reader. The reader here is the stand-in image model, "
        "which names the digit; the second reader, trained from other weights, took no part. Generators learned from "
        "simulated recordings and their pictures without a label: to have the picture's edges, which say nothing of an "
        "image's level and sign, or to be read as the picture is, too. Accuracy in %, "
        + (f"mean ± standard deviation over {seeds} generators" if seeds > 1 else "of one generator each")
        + ".</p>",
        _table(head, rows),
        f'<div class="wide">{picture["llm_evrep"]}</div>',
    ]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


def _image(name: str, data: bytes) -> str:
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def _accuracy(pair: Sequence[float] | None, digits: int = 1) -> str:
    return "–" if pair is None else f"{pair[0]:.{digits}f} ± {pair[1]:.{digits}f}"


def _find(table: Mapping[str, Any], path: Sequence[str]) -> Mapping[str, Any]:
    for name in path:
        table = table[name]
    return table


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _series(lines: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    pairs = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]
