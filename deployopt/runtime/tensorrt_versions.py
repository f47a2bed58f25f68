"""What differs between TensorRT 8.5, 8.6, 10, 11 and TensorRT-RTX; the vendor module is an argument (`trt`). Everything else is common to them.

8.x is weakly typed: builder flags allow the precisions that the graph marks. Later ones compute in the types of the graph.
"""

from typing import TYPE_CHECKING, Any, Dict, Optional, Sequence, Tuple

from deployopt.runtime.tensorrt_api import Vendor

if TYPE_CHECKING:
    import tensorrt as api

OLDEST = (8, 5)  # has named tensors and `execute_async_v3`
_WEAK_UNTIL = (10, 0)
_FLAGS: Dict[str, Tuple[str, ...]] = {"fp32": (), "fp16": ("FP16",), "int8": ("INT8",), "int8_fp16": ("INT8", "FP16")}
_LEVEL = 3  # the builder's own optimisation level


def is_rtx(trt: Vendor) -> bool:
    return bool(trt.__name__ == "tensorrt_rtx")


def product(trt: Vendor) -> str:
    """Name and version for messages."""
    return f"{'TensorRT-RTX' if is_rtx(trt) else 'TensorRT'} {trt.__version__}"


def release(trt: Vendor) -> Tuple[int, int]:
    """Major and minor version."""
    major, minor = trt.__version__.split(".")[:2]
    return int(major), int(minor)


def is_served(trt: Vendor) -> bool:
    return is_rtx(trt) or release(trt) >= OLDEST


def is_weakly_typed(trt: Vendor) -> bool:
    """Whether precision needs builder flags, and an ONNX dialect of its own (`graph/tensorrt.py: to_tensorrt8`)."""
    return not is_rtx(trt) and release(trt) < _WEAK_UNTIL


def not_offered(trt: Vendor, precision: str) -> Optional[str]:
    """Why this version does not compute in a precision, None if it does."""
    if not is_weakly_typed(trt) or precision in _FLAGS:
        return None
    return f"{product(trt)} has no {precision.upper()} (it has: {', '.join(_FLAGS)})"


def network_flags(trt: Vendor) -> int:
    """For `create_network`. 11 knows nothing but strong typing, 8.x must be told that the batch is an axis."""
    modes = trt.NetworkDefinitionCreationFlag
    if is_weakly_typed(trt):
        return 1 << int(modes.EXPLICIT_BATCH)
    return 1 << int(modes.STRONGLY_TYPED) if hasattr(modes, "STRONGLY_TYPED") else 0


def allow(trt: Vendor, config: "api.IBuilderConfig", precision: str) -> None:
    """Let a weakly typed builder use a precision."""
    if is_weakly_typed(trt):
        for flag in _FLAGS[precision]:
            config.set_flag(getattr(trt.BuilderFlag, flag))


def set_optimization_level(config: "api.IBuilderConfig", level: int) -> bool:
    """Whether this version has the level; 8.5 has its own only."""
    if hasattr(config, "builder_optimization_level"):
        config.builder_optimization_level = level
    return level == _LEVEL or hasattr(config, "builder_optimization_level")


def refuses_cache_misses(trt: Vendor) -> bool:
    """Whether a build can be ended where it would have to time a kernel; before 10 only the cache tells it afterwards."""
    return hasattr(trt.BuilderFlag, "ERROR_ON_TIMING_CACHE_MISS")


def refuse_cache_misses(trt: Vendor, config: "api.IBuilderConfig") -> None:
    """Have a build end where it would have to time a kernel, if this version can."""
    if refuses_cache_misses(trt):
        config.set_flag(trt.BuilderFlag.ERROR_ON_TIMING_CACHE_MISS)


def has_monitor(trt: Vendor) -> bool:
    """Whether a build can tell its progress (from 10 on)."""
    return hasattr(trt, "IProgressMonitor")


def specializes_kernels(trt: Vendor) -> bool:
    """Whether kernels for the shapes that come are compiled when an engine runs; only TensorRT-RTX does it."""
    return hasattr(trt, "DynamicShapesKernelSpecializationStrategy")


def create_context(trt: Vendor, engine: "api.ICudaEngine") -> "Optional[api.IExecutionContext]":
    """An execution context, None where the library makes none.

    TensorRT-RTX has kernels for a shape compiled before it runs. It would else run slower ones until a compilation beside is done (LAZY, NVIDIA's reference
    of DynamicShapesKernelSpecializationStrategy), and nobody knew which of them was timed.
    """
    if not specializes_kernels(trt):
        return engine.create_execution_context()
    rtx: Any = trt
    config: Any = engine.create_runtime_config()
    config.dynamic_shapes_kernel_specialization_strategy = rtx.DynamicShapesKernelSpecializationStrategy.EAGER
    return engine.create_execution_context(config)


def node_of(error: "api.ParserError", nodes: Sequence[Tuple[str, str]]) -> Tuple[str, str]:
    """(name, operator) of the node that a parser error is about; both are empty for one that is about none.

    Args:
        nodes: those of the graph, in its order: 8.x tells an index alone, -1 for none.
    """
    if hasattr(error, "node_name"):
        return error.node_name(), error.node_operator()
    index = error.node()
    return nodes[index] if 0 <= index < len(nodes) else ("", "")


def compute_capability(trt: Vendor) -> Dict[str, Any]:
    """GPU classes by name, as "SM86"; only TensorRT-RTX has them."""
    members: Dict[str, Any] = trt.ComputeCapability.__members__  # type: ignore[attr-defined]
    return members


def set_compute_capabilities(trt: Vendor, config: "api.IBuilderConfig", capabilities: Sequence[str]) -> Optional[str]:
    """Have TensorRT-RTX build for these GPU classes ("8.6"); the one that it refuses, if it does."""
    rtx: Any = config
    rtx.num_compute_capabilities = len(capabilities)
    members = compute_capability(trt)
    return next((c for i, c in enumerate(capabilities) if not rtx.set_compute_capability(members[f"SM{c.replace('.', '')}"], i)), None)
