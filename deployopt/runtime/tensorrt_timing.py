"""The timing cache of TensorRT's builder, kept from build to build: kernels that were timed once are not timed again, so a rebuild is faster and
chooses the same ones. TensorRT-RTX times nothing while it builds, and has none.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from deployopt.errors import BuildFailed
from deployopt.runtime.cuda import Gpu
from deployopt.runtime.files import atomic_write, locked
from deployopt.runtime.tensorrt_api import Vendor
from deployopt.runtime.tensorrt_versions import product

if TYPE_CHECKING:
    import tensorrt as api

    from deployopt.runtime.tensorrt_api import Logger


_ENTRIES = re.compile(r"Serialized (\d+) timing cache entries")  # logged when a cache is serialised: seen of 9, 10 and TensorRT-RTX


def path_of(folder: Path, trt: Vendor, gpu: Gpu) -> Path:
    """Where the cache of this TensorRT version and GPU lies, e.g. "tensorrt-10.13.0-nvidia-h100-80gb-hbm3-9.0.timing"."""
    words = f"{product(trt)} {gpu.name} {gpu.compute_capability}".lower()
    return folder / f"{re.sub(r'[^a-z0-9.]+', '-', words)}.timing"


class TimingCache:
    """The cache in a file, given to one build.

    A file of another version, GPU or driver, and one that cannot be read, is not used: the vendor's library checks its header.

    Args:
        config: the build's `IBuilderConfig`.
        logger: of the builder that made `config`.
        path: of the file; it need not exist.

    Raises:
        BuildFailed: the vendor's library makes no cache, not even an empty one.
    """

    def __init__(self, config: "api.IBuilderConfig", logger: "Logger", path: Path) -> None:
        self.path = path
        self._config = config
        self._logger = logger
        cache = self._given(self._stored()) or self._given(b"")
        if cache is None:
            raise BuildFailed("the builder takes no timing cache, not even an empty one", "set timing_cache: false in the options of tensorrt")
        self._cache = cache
        self._empty, self._before = self._size_of(config.create_timing_cache(b"")), self._size_of(cache)

    @property
    def missed(self) -> bool:
        """Whether the build timed kernels that the cache lacked: then it grew."""
        return self._size_of(self._cache) > self._before

    @property
    def use(self) -> str:
        """ "new", "extended", or "reused" if the build timed nothing."""
        if self._before <= self._empty:
            return "new"
        return "extended" if self.missed else "reused"

    def store(self) -> None:
        """Write what was timed, joined with what another build may have stored meanwhile.

        Raises:
            OSError.
        """
        own = _bytes_of(self._cache)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.path):
            joined, others = self._config.create_timing_cache(own), self._config.create_timing_cache(self._stored())
            both = joined is not None and others is not None and joined.combine(others, ignore_mismatch=False)
            atomic_write(self.path, _bytes_of(joined) if both else own)

    def _given(self, stored: bytes) -> "Optional[api.ITimingCache]":
        """The cache of these bytes, given to the build; None if the vendor's library refuses them."""
        cache = self._config.create_timing_cache(stored)  # None for some bytes that are no cache
        return cache if cache is not None and self._config.set_timing_cache(cache, ignore_mismatch=False) else None

    def _size_of(self, cache: "api.ITimingCache") -> int:
        """Timings in a cache, as the library logs them. Its bytes, where it does not: they hold what it compiled, too, and grow with that."""
        before = len(self._logger.messages)
        size_bytes = len(_bytes_of(cache))
        told = [found for _, text in self._logger.messages[before:] for found in _ENTRIES.findall(text)]
        return int(told[-1]) if told else size_bytes

    def _stored(self) -> bytes:
        return self.path.read_bytes() if self.path.is_file() else b""


def _bytes_of(cache: "api.ITimingCache") -> bytes:
    return bytes(memoryview(cache.serialize()))
