"""Words that error messages share."""

from __future__ import annotations

import json
from typing import Any


def found_words(value: Any) -> str:
    """A value in words of YAML."""
    if isinstance(value, (dict, list)):
        kind = "a mapping" if isinstance(value, dict) else "a list"
        return kind if value else f"an empty {kind[2:]}"
    return f"the text '{short(value)}'" if isinstance(value, str) else json.dumps(value)


def short(text: str) -> str:
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 80 else f"{text[:79]}…"
