"""The timing cache of TensorRT's builder, kept from build to build: kernels that were timed once are not timed again, so a rebuild is faster and
chooses the same ones. TensorRT-RTX times nothing while it builds, and has none.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from deployopt.runtime.cuda import Gpu
from deployopt.runtime.files import atomic_write
from deployopt.runtime.tensorrt_api import Vendor
from deployopt.runtime.tensorrt_versions import product

if TYPE_CHECKING:
    import tensorrt as api


def path_of(folder: Path, trt: Vendor, gpu: Gpu) -> Path:
    """Where the cache of this TensorRT version and GPU lies, e.g. "tensorrt-10.13.0-nvidia-h100-80gb-hbm3-9.0.timing"."""
    words = f"{product(trt)} {gpu.name} {gpu.compute_capability}".lower()
    return folder / f"{re.sub(r'[^a-z0-9.]+', '-', words)}.timing"


class TimingCache:
    """The cache in a file, given to one build.

    A file of another version, GPU or driver, and one that cannot be read, is not used: the vendor's library checks its header.

    Args:
        config: the build's `IBuilderConfig`.
        path: of the file; it need not exist.
    """

    def __init__(self, config: "api.IBuilderConfig", path: Path) -> None:
        self.path = path
        self._config = config
        self._cache = config.create_timing_cache(self._stored())
        if not config.set_timing_cache(self._cache, ignore_mismatch=False):
            self._cache = config.create_timing_cache(b"")
            config.set_timing_cache(self._cache, ignore_mismatch=False)
        self._empty, self._before = _size(config.create_timing_cache(b"")), _size(self._cache)

    @property
    def missed(self) -> bool:
        """Whether the build timed kernels that the cache lacked: then it grew. (Flag ERROR_ON_TIMING_CACHE_MISS is not in 8.x.)"""
        return _size(self._cache) > self._before

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
        self._cache.combine(self._config.create_timing_cache(self._stored()), ignore_mismatch=False)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(self.path, bytes(memoryview(self._cache.serialize())))

    def _stored(self) -> bytes:
        return self.path.read_bytes() if self.path.is_file() else b""


def _size(cache: "api.ITimingCache") -> int:
    return len(memoryview(cache.serialize()))
