"""What a dense model keeps of the data it was trained on, so that others are cut and seen alike."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from downstream.dense.model import DenseModel
from gep.data.config import DataConfig
from gep.data.listing import Listing
from gep.data.options import ListingOptions
from gep.events.prepare import INPUT_KEYS

OPTIONS = ("depth", "rectify", "rows", "subsampling", "sample_us", "sample_stride_us", "clip")
"""Further fields of the data config that decide which samples there are, their view or their windows."""


@dataclass(frozen=True, kw_only=True)
class PredictOptions(ListingOptions):
    """What `gep predict --data` lets a user choose about the data set; a model brings its own values along."""

    clip: bool = False
    """video sets: the windows are those of consecutive images"""


def input_settings(data: DataConfig, listing: Listing | None = None) -> dict[str, Any]:
    """`DenseModel.input_settings` of a training.

    Args:
        data: its data config.
        listing: its samples. Shards say in their notes what was chosen when they were written.
    Returns:
        The values of INPUT_KEYS and OPTIONS, and with a listing what a plain recording needs to be seen alike:
        "rectified" (whether events were moved to rectified pixels), "top_rows" (events of so many rows alone, 0 = all)
        and "sensor" (height and width, None where it differs).
    """
    settings = {key: getattr(data, key) for key in (*INPUT_KEYS, *OPTIONS)}
    if listing is None:
        return settings
    cut = re.fullmatch(r"of the top (\d+) rows", listing.notes.get("events", ""))
    # DDD17's table leaves every pixel where it is.
    moved = "rectified" in listing.notes or (listing.rectify is not None and data.rectify)
    settings |= {
        "rectified": moved and listing.name != "ddd17",
        "top_rows": int(cut[1]) if cut else 0,
        "sensor": None if listing.sensor is None else list(listing.sensor),
        "rows": "labelled" if cut else data.rows,
    }
    # Of other sets this option says nothing.
    del settings["depth"]
    return settings | ({"depth": listing.notes["depth"]} if "depth" in listing.notes else {})


def data_of(model: DenseModel, options: Mapping[str, Any] | None = None) -> DataConfig:
    """The data config that cuts samples as the model's training did, with further options of the data set.

    Raises:
        ValueError: options by which events would be seen in another view than the model was trained on.
    """
    settings, options = model.input_settings, dict(options or {})
    rectified = settings.get("rectified", False)
    known: dict[str, Any] = {"rectify": True} if rectified else {}
    known |= {"depth": settings["depth"]} if "depth" in settings else {"depth": "rect"} if rectified else {}
    for name, trained in known.items():
        if options.get(name, trained) != trained:
            raise ValueError(
                f"{name}={options[name]}: the model was trained with {name}={trained}, and its events would be in "
                "another view; leave it out, or train a model for that view"
            )
    kept = {key: settings[key] for key in (*INPUT_KEYS, *OPTIONS) if key in settings}
    return DataConfig(**(kept | options))
