"""An explanation as one file: JSON, or the page with the JSON within."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from fairseq.explorer.config import MOST_EXPORTED
from fairseq.explorer.explanation import Explanation

LARGEST_EXPORT = 256 << 20
"""Bytes of candidates that an export may hold."""
_PLACE = '<script type="application/json" id="explanation">null</script>'


def export(explanation: Explanation, rows: slice) -> str:
    """Some tokens of an explanation as JSON, with the details of each.

    Raises: ValueError for more than a browser opens, or tokens that are not scored yet.
    """
    return json.dumps(content_of(explanation, rows), allow_nan=False)


def content_of(explanation: Explanation, rows: slice) -> dict[str, Any]:
    """The same as plain types."""
    count, k = rows.stop - rows.start, explanation.table.k
    if count > MOST_EXPORTED:
        raise ValueError(f"{count} tokens are more than the {MOST_EXPORTED} that one export holds; choose a part")
    size = count * k * 11  # eight bytes in base64
    if size > LARGEST_EXPORT:
        raise ValueError(
            f"{count} tokens with {k} candidates each would take {size >> 20} MB, a browser takes "
            f"{LARGEST_EXPORT >> 20} MB; export at most {LARGEST_EXPORT // (k * 11)} tokens at a time"
        )
    missing = int(np.isnan(explanation.table.columns["lm"][rows]).sum())
    if missing:
        raise ValueError(f"{missing} of these {count} tokens are not scored yet; export them in a moment")
    part = {
        "num_tokens": count,
        "num_ready": count,
        "first": rows.start,
        "reads": False,
        "longest": 0,
        "working": False,
    }
    return {
        "about": explanation.about() | part,
        "tokens": explanation.tokens(rows),
        "candidates": explanation.candidates(rows),
        "details": [explanation.details(at) for at in range(rows.start, rows.stop)],
    }


@cache
def read_page() -> str:
    """The page, as it lies beside this module."""
    return (files("fairseq.explorer") / "page.html").read_text(encoding="utf-8")


@cache
def security_policy() -> str:
    """Content-Security-Policy of the page: its own script and style by their digests, and nothing else."""
    digests = {}
    for tag in ("script", "style"):
        found = re.search(rf"<{tag}>(.*?)</{tag}>", read_page(), re.DOTALL)
        assert found is not None, f"the page lacks its {tag}"
        digests[tag] = base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digests['script']}'; style-src 'sha256-{digests['style']}'; "
        "img-src data:"
    )


def as_html(page: str, content: str) -> str:
    """The page with an export within, as a file that needs nothing else."""
    assert page.count(_PLACE) == 1, "the page has no place for the data"
    policy = f'<meta http-equiv="Content-Security-Policy" content="{security_policy()}">'
    page = page.replace("<head>", f"<head>\n{policy}", 1)
    # No "<" in the data: what a text holds ends no script and opens no comment.
    data = content.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return page.replace(_PLACE, _PLACE.replace("null", data, 1), 1)
