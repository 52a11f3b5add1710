"""Networks: the event encoder, the frozen image model it is aligned to, and the backbone over its tokens."""

from gep.models.backbone import EVENT, IMAGE, Backbone, BackboneOutput, KVCache
from gep.models.encoder import EventEncoder, InitReport
from gep.models.presets import BACKBONES, PRESETS, Preset, backbone_preset, preset
from gep.models.teacher import FrozenVFM, ImageModel

__all__ = [
    "BACKBONES",
    "EVENT",
    "IMAGE",
    "PRESETS",
    "Backbone",
    "BackboneOutput",
    "EventEncoder",
    "FrozenVFM",
    "ImageModel",
    "InitReport",
    "KVCache",
    "Preset",
    "backbone_preset",
    "preset",
]
