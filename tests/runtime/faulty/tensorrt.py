"""A TensorRT 8.6 that builds nothing: it lacks what 8.6 lacks, and its refusal tells what was asked of it. It never stands for a result.

It times a kernel in each build, if the cache lacks it, and with PLAN set gets so far as to return bytes, which are no engine: REFUSED has what is said when
they are loaded, and where they are, there is no memory for an execution context.
"""

from enum import IntEnum
from types import SimpleNamespace

__version__ = "8.6.1"
PLAN, OLD_DRIVER, REFUSED = None, False, ()


class ILogger:
    pass


class NetworkDefinitionCreationFlag(IntEnum):
    EXPLICIT_BATCH = 0


class BuilderFlag(IntEnum):
    FP16 = 0
    INT8 = 1
    TF32 = 6


class TacticSource(IntEnum):
    CUBLAS = 0
    CUBLAS_LT = 1
    CUDNN = 2
    EDGE_MASK_CONVOLUTIONS = 3
    JIT_CONVOLUTIONS = 4


class ProfilingVerbosity(IntEnum):
    DETAILED = 2


class LayerType(IntEnum):
    CONVOLUTION = 0


class OnnxParser:
    num_errors = 1

    def __init__(self, network, logger):
        pass

    def parse(self, data):
        return data != b"refused"

    def get_error(self, index):  # without node_name and node_operator, which came later
        return SimpleNamespace(code=lambda: SimpleNamespace(name="UNSUPPORTED_NODE"), desc=lambda: "In node 1 (importNode)", node=lambda: 1)


class TimingCache:
    """A header and one byte a kernel."""

    header = b"8.6.1"

    def __init__(self, stored):
        self.kernels = set(stored[len(self.header) :])
        self.fits = not stored or stored.startswith(self.header)

    def serialize(self):
        return self.header + bytes(sorted(self.kernels))

    def combine(self, other, ignore_mismatch):
        if other.fits:
            self.kernels |= other.kernels
        return other.fits


class _Config:
    cache = None

    def create_timing_cache(self, stored):
        return None if stored == b"junk" else TimingCache(stored)

    def set_timing_cache(self, cache, ignore_mismatch):
        if cache.fits:
            self.cache = cache
        return cache.fits

    def __init__(self, has_levels):
        self.asked = []
        if has_levels:
            self.builder_optimization_level = 3

    def set_flag(self, flag):
        self.asked.append(flag.name)

    def clear_flag(self, flag):
        self.asked.append(f"no {flag.name}")

    def set_tactic_sources(self, mask):
        self.asked.append("tactics " + " ".join(source.name for source in TacticSource if mask >> source & 1))


class Builder:
    def __init__(self, logger):
        if OLD_DRIVER:  # as 8.6.0 with CUDA error 35
            logger.log(SimpleNamespace(name="WARNING"), "CUDA initialization failure with error: 35. Please check your CUDA installation")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self.logger = logger
        self.asked = []

    def create_network(self, flags):
        self.asked = [flag.name for flag in NetworkDefinitionCreationFlag if flags >> flag & 1]
        return SimpleNamespace(
            num_inputs=0,
            num_layers=0,
            num_outputs=1,
            get_output=lambda i: SimpleNamespace(name="y", shape=(1, 2), dtype=SimpleNamespace(name="FLOAT"), get_dimension_name=lambda axis: None),
        )

    def create_builder_config(self):
        return _Config(has_levels=not __version__.startswith("8.5"))

    def build_serialized_network(self, network, config):
        assert not hasattr(config, "progress_monitor")
        if config.cache is not None:
            config.cache.kernels.add(42)
        if PLAN is None:
            self.logger.log(SimpleNamespace(name="ERROR"), ", ".join((*self.asked, *config.asked)))
        return PLAN


class Runtime:
    def __init__(self, logger):
        self.logger = logger

    def deserialize_cuda_engine(self, plan):
        for text in REFUSED:
            self.logger.log(SimpleNamespace(name="ERROR"), text)
        return None if REFUSED else SimpleNamespace(create_execution_context=self.out_of_memory)

    def out_of_memory(self):
        self.logger.log(SimpleNamespace(name="ERROR"), "Requested amount of GPU memory (1024 bytes) could not be allocated.")
