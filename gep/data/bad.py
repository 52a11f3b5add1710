"""A sample that cannot be read: which one, and why."""

from __future__ import annotations


class BadSample(ValueError):
    """One sample is damaged; the rest of its set may be sound, so that a reader can go on with the next one.

    Args:
        key: of the sample, as in `Listing.keys`.
        reason: the file (and member or row) and what is wrong with it.
    """

    def __init__(self, key: str, reason: str):
        super().__init__(f"sample {key}: {reason}")
        self.key, self.reason = key, reason

    def __reduce__(self) -> tuple[type[BadSample], tuple[str, str]]:
        return type(self), (self.key, self.reason)  # it travels from a data worker to the training process
