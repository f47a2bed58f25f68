"""Does the TensorRT that is installed here have every name that `deployopt.runtime` calls? It needs no GPU, and the standard library and NumPy alone.

    python3.10 benchmarks/tensorrt_names.py                  # with tensorrt==8.6.0, which is for CPython 3.10
    python benchmarks/tensorrt_names.py tensorrt_rtx

Exit code 1 if one is missing; they are printed. What a name does is not tried: only types (tests/runtime/test_tensorrt_types.py) and a GPU tell more.
"""

import sys

from deployopt.runtime.tensorrt_api import Vendor
from deployopt.runtime.tensorrt_vendor import load_vendor
from deployopt.runtime.tensorrt_versions import is_rtx, is_weakly_typed, product, release

Names = dict[str, tuple[str, ...]]  # members by class
COMMON: Names = {
    "Builder": ("build_serialized_network", "create_builder_config", "create_network", "create_optimization_profile"),
    "BuilderFlag": ("TF32",),
    "DataType": ("FLOAT", "HALF", "INT8"),
    "Dims": (),
    "ElementWiseOperation": ("SUM",),
    "EngineInspector": ("execution_context", "get_engine_information"),
    "IBuilderConfig": (
        "add_optimization_profile",
        "clear_flag",
        "create_timing_cache",
        "profiling_verbosity",
        "set_flag",
        "set_memory_pool_limit",
        "set_tactic_sources",
        "set_timing_cache",
    ),
    "ICudaEngine": ("create_engine_inspector", "create_execution_context", "get_tensor_profile_shape"),
    "IElementWiseLayer": ("op",),
    "IExecutionContext": ("execute_async_v3", "get_tensor_shape", "profiler", "set_input_shape", "set_tensor_address"),
    "ILayer": ("name", "type"),
    "ILogger": ("ERROR", "INTERNAL_ERROR", "VERBOSE", "WARNING", "log"),
    "INetworkDefinition": ("get_input", "get_layer", "get_output", "num_inputs", "num_layers", "num_outputs"),
    "IOptimizationProfile": ("set_shape",),
    "IProfiler": ("report_layer_time",),
    "ITensor": ("dtype", "get_dimension_name", "name", "shape"),
    "ITimingCache": ("combine", "serialize"),
    "LayerInformationFormat": ("JSON",),
    "LayerType": ("CONVOLUTION", "DECONVOLUTION", "ELEMENTWISE", "MATRIX_MULTIPLY"),
    "MemoryPoolType": ("WORKSPACE",),
    "NetworkDefinitionCreationFlag": (),
    "OnnxParser": ("get_error", "num_errors", "parse"),
    "ParserError": ("code", "desc"),
    "ProfilingVerbosity": ("DETAILED",),
    "Runtime": ("deserialize_cuda_engine",),
    "TacticSource": ("__members__",),
}
FROM_8_6: Names = {"IBuilderConfig": ("builder_optimization_level",), "ILayer": ("metadata",)}
WEAKLY_TYPED: Names = {
    "BuilderFlag": ("FP16", "INT8"),
    "LayerType": ("FULLY_CONNECTED",),
    "NetworkDefinitionCreationFlag": ("EXPLICIT_BATCH",),
    "ParserError": ("node",),
}
STRONGLY_TYPED: Names = {
    "BuilderFlag": ("ERROR_ON_TIMING_CACHE_MISS",),
    "DataType": ("BF16",),
    "IBuilderConfig": ("progress_monitor",),
    "IProgressMonitor": ("phase_finish", "phase_start", "step_complete"),
    "ParserError": ("node_name", "node_operator"),
}
ONLY_10: Names = {"NetworkDefinitionCreationFlag": ("STRONGLY_TYPED",)}  # 11 knows nothing else
RTX: Names = {
    "ComputeCapability": ("__members__",),
    "DynamicShapesKernelSpecializationStrategy": ("EAGER",),
    "IBuilderConfig": ("num_compute_capabilities", "set_compute_capability"),
    "ICudaEngine": ("create_runtime_config",),
    "IRuntimeConfig": ("dynamic_shapes_kernel_specialization_strategy",),
}


def wanted(trt: Vendor) -> list[str]:
    """What is called of this version, as "Builder.create_network"; of a class alone its name."""
    tables = [COMMON]
    if is_rtx(trt):
        tables += [FROM_8_6, STRONGLY_TYPED, ONLY_10, RTX]
    else:
        tables += [FROM_8_6] * (release(trt) >= (8, 6)) + [WEAKLY_TYPED if is_weakly_typed(trt) else STRONGLY_TYPED] + [ONLY_10] * (release(trt)[0] == 10)
    return [name for table in tables for kind, members in table.items() for name in (kind, *(f"{kind}.{member}" for member in members))]


def lacking(trt: Vendor) -> list[str]:
    """Those that the module lacks."""
    missing = []
    for name in wanted(trt):
        kind, _, member = name.partition(".")
        found = getattr(trt, kind, None)
        if found is None or (member and not hasattr(found, member)):
            missing.append(name)
    return missing


def main(arguments: list[str]) -> int:
    trt = load_vendor(arguments[0] if arguments else "tensorrt")
    missing = lacking(trt)
    print(f"{product(trt)}, Python {sys.version.split()[0]}: {len(set(wanted(trt)))} names are called, {len(missing)} of them missing {' '.join(missing)}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
