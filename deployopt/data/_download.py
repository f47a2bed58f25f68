"""Fetch one file of a data set and check it before anyone sees it; the checksums that publishers give."""

from __future__ import annotations

import hashlib
import http.client
import urllib.request
from pathlib import Path

from deployopt.errors import ArtifactCorrupt, DataNotFound
from deployopt.runtime.files import atomic_write
from deployopt.runtime.progress import Progress, SilentProgress

CHUNK_BYTES = 1 << 20


def fetch(url: str, path: Path, md5: str, progress: Progress | None = None) -> None:
    """Download `url` to `path`; nothing is left there unless the bytes have the published MD5.

    Raises:
        DataNotFound: the server cannot be reached, or breaks off.
        ArtifactCorrupt: other bytes than published.
    """
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            data = _read(response, path.name, progress or SilentProgress())
    except (OSError, http.client.HTTPException) as exc:
        raise DataNotFound(f"{path.name} could not be downloaded: {exc}", "check the network, or place the file by hand and set data.folder") from exc
    found = _md5(data)
    if found != md5:
        raise ArtifactCorrupt(f"{path.name}: wanted MD5 {md5}, downloaded {len(data)} bytes with {found}", "try again; a proxy may have answered instead")
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, data)


def _read(response: http.client.HTTPResponse, name: str, progress: Progress) -> bytes:
    """The whole body. Raises http.client.IncompleteRead if it is shorter than announced."""
    announced, parts = response.length, []
    with progress.track(f"download {name}", announced) as bar:
        while part := response.read(CHUNK_BYTES):
            parts.append(part)
            bar.advance(len(part), note=f"{sum(map(len, parts)) / 1e6:.1f} MB")
    data = b"".join(parts)
    if announced is not None and len(data) < announced:
        raise http.client.IncompleteRead(data, announced - len(data))
    return data


def md5_file(path: Path) -> str:
    """MD5 of a file's bytes, comparable with the publishers' checksums."""
    return _md5(path.read_bytes())


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()  # MD5 is what the publishers give
