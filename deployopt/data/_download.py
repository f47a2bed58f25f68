"""Fetch one file of a data set and check it before anyone sees it."""

from __future__ import annotations

import hashlib
import urllib.error
import urllib.request
from pathlib import Path

from deployopt.errors import ArtifactCorrupt, DataNotFound
from deployopt.runtime.files import atomic_write


def fetch(url: str, path: Path, md5: str) -> None:
    """Download `url` to `path`; nothing is left there unless the bytes have the published MD5.

    Raises:
        DataNotFound: the server cannot be reached.
        ArtifactCorrupt: other bytes than published.
    """
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            data: bytes = response.read()
    except (urllib.error.URLError, OSError) as exc:
        raise DataNotFound(f"{path.name} could not be downloaded: {exc}", "check the network, or place the file by hand and set data.folder") from exc
    found = hashlib.md5(data, usedforsecurity=False).hexdigest()  # MD5 is what the publishers give
    if found != md5:
        raise ArtifactCorrupt(f"{path.name}: wanted MD5 {md5}, downloaded {len(data)} bytes with {found}", "try again; a proxy may have answered instead")
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, data)
