"""What a run folder must not hold, since people share it: passwords, tokens and signed queries inside settings."""

import re
from collections.abc import Mapping
from typing import Any

_RULES = (
    (re.compile(r"(\w+://)[^/@\s]+@"), r"\1***@"),
    (re.compile(r"(\w+://[^\s?]*)\?[^\s]+"), r"\1?***"),
    (re.compile(r"((?:-H|--header)[\s=]*(['\"])[\w-]+:)[^'\"]*"), r"\1 ***"),
    (re.compile(r"(\bcurl\b.*?\s(?:-u|--user)[\s=]*)[^\s]+"), r"\1***"),
    (re.compile(r"\bhf_[A-Za-z0-9]{20,}"), "***"),
)


def masked(value: Any) -> Any:
    """A copy of JSON values with secrets replaced by ***: users and queries of addresses, headers, the Hub's tokens."""
    if isinstance(value, Mapping):
        return {name: masked(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [masked(item) for item in value]
    if isinstance(value, str):
        for pattern, replacement in _RULES:
            value = pattern.sub(replacement, value)
    return value
