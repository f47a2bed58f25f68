"""Downloads over a real connection: all of the published bytes, or nothing."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deployopt.data._download import fetch, md5_file
from deployopt.errors import ArtifactCorrupt, DataNotFound
from deployopt.runtime.progress import Bar, SilentProgress


def test_a_file_with_the_published_checksum_is_kept(site, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (site.folder / "data.bin").write_bytes(b"abc" * 1000)
    target = tmp_path / "new" / "folder" / "data.bin"
    fetch(f"{site.url}data.bin", target, hashlib.md5(b"abc" * 1000).hexdigest())
    assert target.read_bytes() == b"abc" * 1000
    assert md5_file(target) == hashlib.md5(b"abc" * 1000).hexdigest()


def test_a_download_tells_how_far_it_is(site, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    seen: list[float] = []

    class Recorder(SilentProgress):
        @contextmanager
        def track(self, description: str, total: float | None) -> Iterator[Bar]:
            assert (description, total) == ("download data.bin", 3_000_000)
            yield self

        def advance(self, steps: float = 1, note: str = "") -> None:
            seen.append(steps)

    (site.folder / "data.bin").write_bytes(b"abc" * 1_000_000)
    fetch(f"{site.url}data.bin", tmp_path / "data.bin", hashlib.md5(b"abc" * 1_000_000).hexdigest(), Recorder())
    assert len(seen) >= 3
    assert sum(seen) == 3_000_000


def test_other_bytes_leave_nothing_behind(site, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (site.folder / "data.bin").write_bytes(b"a proxy's page")
    with pytest.raises(ArtifactCorrupt, match=r"data\.bin: wanted MD5 0{32}, downloaded 14 bytes"):
        fetch(f"{site.url}data.bin", tmp_path / "kept" / "data.bin", "0" * 32)
    assert not (tmp_path / "kept").exists()


def test_a_server_that_refuses_breaks_off_or_is_not_there_is_named(site, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (site.folder / "broken").write_bytes(b"0" * 1000)
    for url in (f"{site.url}absent", f"{site.url}broken", "http://127.0.0.1:9/closed"):
        with pytest.raises(DataNotFound, match=r"(?s)data\.bin could not be downloaded.*data\.folder"):
            fetch(url, tmp_path / "data.bin", "0" * 32)
    assert not (tmp_path / "data.bin").exists()
