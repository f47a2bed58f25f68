"""The part of NVIDIA's Python API that is called here, in its own types.

TensorRT 8.5 to 11 and TensorRT-RTX share this part; what only some of them have is told apart in `runtime/tensorrt_versions.py`. At run time the vendor
module is an argument (`trt`), and nothing is imported here. tests/runtime/test_tensorrt_types.py runs mypy over every call with the stubs of TensorRT
10.13; elsewhere these names are `Any`, since the stubs are no valid Python as they are published.
"""

from typing import TYPE_CHECKING, List, Optional, Protocol, Tuple, Type

if TYPE_CHECKING:
    import tensorrt as api


class Vendor(Protocol):
    """`tensorrt` or `tensorrt_rtx`."""

    __name__: str
    __version__: str

    @property
    def Builder(self) -> "Type[api.Builder]": ...  # noqa: N802 — these are classes
    @property
    def BuilderFlag(self) -> "Type[api.BuilderFlag]": ...  # noqa: N802
    @property
    def Dims(self) -> "Type[api.Dims]": ...  # noqa: N802
    @property
    def ElementWiseOperation(self) -> "Type[api.ElementWiseOperation]": ...  # noqa: N802
    @property
    def IElementWiseLayer(self) -> "Type[api.IElementWiseLayer]": ...  # noqa: N802
    @property
    def ILogger(self) -> "Type[api.ILogger]": ...  # noqa: N802
    @property
    def IProfiler(self) -> "Type[api.IProfiler]": ...  # noqa: N802
    @property
    def IProgressMonitor(self) -> "Type[api.IProgressMonitor]": ...  # noqa: N802
    @property
    def LayerInformationFormat(self) -> "Type[api.LayerInformationFormat]": ...  # noqa: N802
    @property
    def LayerType(self) -> "Type[api.LayerType]": ...  # noqa: N802
    @property
    def MemoryPoolType(self) -> "Type[api.MemoryPoolType]": ...  # noqa: N802
    @property
    def NetworkDefinitionCreationFlag(self) -> "Type[api.NetworkDefinitionCreationFlag]": ...  # noqa: N802
    @property
    def OnnxParser(self) -> "Type[api.OnnxParser]": ...  # noqa: N802
    @property
    def ProfilingVerbosity(self) -> "Type[api.ProfilingVerbosity]": ...  # noqa: N802
    @property
    def Runtime(self) -> "Type[api.Runtime]": ...  # noqa: N802
    @property
    def TacticSource(self) -> "Type[api.TacticSource]": ...  # noqa: N802


if TYPE_CHECKING:
    # What `runtime/tensorrt_vendor.py` makes of classes that exist at run time only.

    class Logger(api.ILogger):  # type: ignore[misc]
        messages: List[Tuple[str, str]]

        def errors(self) -> List[str]: ...

    class Profiler(api.IProfiler):  # type: ignore[misc]
        def take(self) -> List[Tuple[str, float]]: ...

    class Monitor(api.IProgressMonitor):  # type: ignore[misc]
        raised: Optional[BaseException]
        told: float
