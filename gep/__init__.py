"""GEP: generative event pretraining, a two-stage foundation-model codebase for event cameras."""

__version__ = "0.1.0"
