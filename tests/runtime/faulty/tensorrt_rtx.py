"""A vendor module that only fails: it injects faults that the real one will not show on demand, and never stands for a result.

The environment variable FAULT chooses: "crash", "out_of_memory", "no_memory" (of the GPU), "no_engine", "parser", "raise", "hang".
"""

import os
import signal
import time
from enum import Enum
from types import SimpleNamespace

__version__ = "1.7.1.116"
FAULT = os.environ.get("FAULT", "no_engine")


class ILogger:
    pass


class IProgressMonitor:
    pass


class ComputeCapability(Enum):
    NONE = 0
    SM86 = 86


class NetworkDefinitionCreationFlag:
    STRONGLY_TYPED = 1


class BuilderFlag:
    TF32 = 0


class ProfilingVerbosity:
    DETAILED = 0


class OnnxParser:
    num_errors = 1 if FAULT == "parser" else 0

    def __init__(self, network, logger):
        self.logger = logger

    def parse(self, data):
        return FAULT != "parser"

    def get_error(self, index):
        return SimpleNamespace(
            code=lambda: SimpleNamespace(name="INTERNAL_ERROR"), desc=lambda: "weights vanished", node_name=lambda: "conv7", node_operator=lambda: "Conv"
        )


class Builder:
    def __init__(self, logger):
        self.logger = logger

    def create_network(self, flags):
        return SimpleNamespace(
            num_inputs=0,
            num_outputs=1,
            get_output=lambda i: SimpleNamespace(name="y", shape=(1, 2), dtype=SimpleNamespace(name="FLOAT"), get_dimension_name=lambda axis: None),
        )

    def create_builder_config(self):
        return SimpleNamespace(clear_flag=lambda flag: None, set_compute_capability=lambda capability, index: True)

    def build_serialized_network(self, network, config):
        if FAULT == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if FAULT == "out_of_memory":
            os.kill(os.getpid(), signal.SIGKILL)
        if FAULT == "hang":
            time.sleep(60)
        if FAULT == "raise":
            raise RuntimeError("the vendor's module broke")
        said = "Error Code 2: OutOfMemory (no further information)" if FAULT == "no_memory" else "no kernel image fits"
        self.logger.log(SimpleNamespace(name="ERROR"), said)
