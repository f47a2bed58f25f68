"""Without a GPU no kernel is timed: what the vendor's library makes of a file is tried on TensorRT-RTX, what a build adds on a module that only fails."""

import time
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from types import SimpleNamespace

import pytest

from deployopt.errors import BuildFailed
from deployopt.runtime import tensorrt as rt
from deployopt.runtime import tensorrt_timing
from deployopt.runtime.cuda import Gpu
from deployopt.runtime.files import atomic_write
from deployopt.runtime.progress import SilentProgress
from deployopt.runtime.tensorrt_timing import TimingCache, path_of
from deployopt.runtime.tensorrt_vendor import make_logger

HOPPER = Gpu("NVIDIA H100 80GB HBM3", "9.0", "13.0")


@pytest.fixture
def old(old):
    old.PLAN = b"no engine"
    return old


def options(folder, **changes):
    return rt.BuildOptions((1,), timing_cache=str(folder), **changes)


def used(old, path, *kernels):
    """The cache in a file, after a build that needed these kernels."""
    logger = make_logger(old)
    timing = TimingCache(old.Builder(logger).create_builder_config(), logger, path)
    timing._config.cache.kernels.update(kernels)
    return timing


def test_a_file_for_each_version_and_gpu(old, tmp_path):
    assert path_of(tmp_path, old, HOPPER) == tmp_path / "tensorrt-8.6.1-nvidia-h100-80gb-hbm3-9.0.timing"


def test_timings_are_kept_and_what_was_added_is_told(old, tmp_path):
    path = tmp_path / "folder" / "a.timing"
    first = used(old, path, 1, 2)
    first.store()
    assert (first.use, first.missed) == ("new", True)
    second = used(old, path, 1)
    assert (second.use, second.missed) == ("reused", False)
    third = used(old, path, 3)
    third.store()
    assert (third.use, third.missed) == ("extended", True)
    assert path.read_bytes() == b"8.6.1\x01\x02\x03"


def test_builds_at_once_lose_nothing(old, tmp_path, monkeypatch):
    def slow(path, data):
        time.sleep(0.02)  # what others have stored has been read, what they store now would be lost
        atomic_write(path, data)

    monkeypatch.setattr(tensorrt_timing, "atomic_write", slow)
    path = tmp_path / "a.timing"
    with ThreadPoolExecutor(8) as pool:
        stored = [pool.submit(used(old, path, kernel).store) for kernel in range(1, 9)]
    assert [each.result() for each in stored] == [None] * 8
    assert path.read_bytes() == b"8.6.1" + bytes(range(1, 9))


def test_a_file_of_another_gpu_is_not_used_and_replaced(old, tmp_path):
    path = tmp_path / "a.timing"
    path.write_bytes(b"10.13\x07")
    timing = used(old, path, 1)
    timing.store()
    assert timing.use == "new"
    assert path.read_bytes() == b"8.6.1\x01"


def test_a_file_of_which_no_cache_can_be_made_is_not_used_and_replaced(old, tmp_path):
    path = tmp_path / "a.timing"
    path.write_bytes(b"junk")
    timing = used(old, path, 1)
    timing.store()
    assert timing.use == "new"
    assert path.read_bytes() == b"8.6.1\x01"


def test_what_another_build_timed_meanwhile_is_stored_and_not_taken_for_this_ones(old, tmp_path):
    path = tmp_path / "a.timing"
    used(old, path, 1).store()
    mine, others = used(old, path, 1), used(old, path, 2)
    others.store()
    mine.store()
    assert (mine.use, mine.missed) == ("reused", False)
    assert path.read_bytes() == b"8.6.1\x01\x02"


def test_a_builder_that_takes_no_cache_says_which_option_to_change(old, tmp_path):
    config = old.Builder(None).create_builder_config()
    config.create_timing_cache = lambda stored: None
    with pytest.raises(BuildFailed, match="takes no timing cache") as caught:
        TimingCache(config, make_logger(old), tmp_path / "a.timing")
    assert caught.value.remedy.startswith("set timing_cache: false")


def test_a_build_that_times_a_kernel_can_be_refused(old, tmp_path):
    wanted = options(tmp_path, error_on_timing_cache_miss=True)
    with pytest.raises(BuildFailed, match=r"the timing cache lacks \(tensorrt-8\.6\.1-.*\.timing was new\)") as caught:
        rt.build_engine(old, b"model", wanted, gpu=HOPPER)
    assert "without error_on_timing_cache_miss" in caught.value.remedy
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def ten(old, monkeypatch):
    """The same with the flag that came with 10."""
    flags = IntEnum("BuilderFlag", {**{flag.name: flag.value for flag in old.BuilderFlag}, "ERROR_ON_TIMING_CACHE_MISS": 16})
    monkeypatch.setattr(old, "BuilderFlag", flags)
    return old


def test_from_ten_on_the_builder_itself_ends_at_a_miss(ten, old, tmp_path, monkeypatch):
    monkeypatch.setattr(old, "PLAN", None)
    with pytest.raises(BuildFailed, match="no TF32, ERROR_ON_TIMING_CACHE_MISS"):
        rt.build_engine(old, b"model", options(tmp_path, error_on_timing_cache_miss=True), gpu=HOPPER)
    with pytest.raises(BuildFailed, match=r"no TF32\n"):
        rt.build_engine(old, b"model", options(tmp_path), gpu=HOPPER)


def test_a_builder_that_ends_at_a_miss_is_believed_where_it_ends_at_none(ten, tmp_path):
    """The cache may grow by what was compiled."""
    progress = SilentProgress()
    timing = used(ten, tmp_path / "a.timing", 1)
    rt._keep(ten, timing, options(tmp_path, error_on_timing_cache_miss=True), progress)
    assert timing.path.exists()


def test_timings_are_counted_as_the_library_logs_them_and_not_what_it_compiled(old, tmp_path, monkeypatch):
    path = tmp_path / "a.timing"
    used(old, path, 1).store()

    def serialize(cache):
        logger.log(SimpleNamespace(name="INFO"), f"Serialized {3 * len(cache.kernels)} bytes of compilation cache.")
        logger.log(SimpleNamespace(name="INFO"), f"Serialized {len(cache.kernels)} timing cache entries")
        compiled.append(b"more")
        return cache.header + bytes(sorted(cache.kernels)) + b"".join(compiled)

    compiled, logger = [], make_logger(old)
    monkeypatch.setattr(old.TimingCache, "serialize", serialize)
    timing = TimingCache(old.Builder(logger).create_builder_config(), logger, path)
    assert (timing.use, timing.missed) == ("reused", False)
    timing._config.cache.kernels.add(2)
    assert (timing.use, timing.missed) == ("extended", True)


@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops in TensorRT-RTX:DeprecationWarning")
@pytest.mark.parametrize("found", [None, b"junk", bytes(200)], ids=["missing", "junk", "zeros"])
def test_the_vendors_library_makes_a_new_cache_of_what_is_none_and_says_how_many_timings_it_holds(tmp_path, found):
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'deployopt[tensorrt-rtx]'")
    path = tmp_path / "folder" / "a.timing"
    if found is not None:
        path.parent.mkdir()
        path.write_bytes(found)
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    timing = TimingCache(builder.create_builder_config(), logger, path)
    assert (timing.use, timing.missed) == ("new", False)
    assert timing._before == timing._empty == 0  # as it logs; in bytes it is not empty
    timing.store()
    stored = path.read_bytes()
    assert len(stored) > 100
    assert stored != found
    timing.store()  # joined with itself
    assert path.read_bytes() == stored


def test_a_cache_that_cannot_be_stored_is_logged_and_the_build_goes_on(old, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    progress, logged = SilentProgress(), []
    progress.log = logged.append
    timing = used(old, tmp_path / "file" / "a.timing", 1)
    rt._keep(old, timing, options(tmp_path), progress)
    assert logged[0].startswith("the timing cache was not stored: ")


def test_options_are_recorded_without_this_machines_folders(tmp_path):
    given = options(tmp_path, optimization_level=0)
    assert rt.BuildOptions.from_json(given.to_json()) == given
    assert given.recorded() == {"batch_sizes": [1], "optimization_level": 0, "timing_cache": True, "tf32": False}
