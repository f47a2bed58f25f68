"""Words that error messages share."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from typing import Any


def did_you_mean(word: str, options: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(options), n=1)
    return f"; did you mean '{near[0]}'?" if near else ""


def found_words(value: Any) -> str:
    """A value in words of YAML."""
    if isinstance(value, (dict, list)):
        kind = "a mapping" if isinstance(value, dict) else "a list"
        return kind if value else f"an empty {kind[2:]}"
    return f"the text '{short(value)}'" if isinstance(value, str) else json.dumps(value)


def short(text: str) -> str:
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 80 else f"{text[:79]}…"
