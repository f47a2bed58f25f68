"""TensorRT 8.x cannot build without a GPU: what is asked of it is told by a module that has its names and builds nothing."""

from types import ModuleType, SimpleNamespace

import pytest

from deployopt.errors import BackendUnavailable, BuildFailed
from deployopt.runtime import tensorrt as rt
from deployopt.runtime import tensorrt_versions as versions


def vendor(version, name="tensorrt"):
    module = ModuleType(name)
    module.__version__ = version
    return module


@pytest.mark.parametrize(
    ("version", "served", "weak"), [("8.4.3.1", False, True), ("8.5.2", True, True), ("8.6.1", True, True), ("10.3.0", True, False), ("11.0", True, False)]
)
def test_versions(version, served, weak):
    assert (versions.is_served(vendor(version)), versions.is_weakly_typed(vendor(version))) == (served, weak)


def test_rtx_counts_its_versions_anew():
    rtx = vendor("1.7.1.116", "tensorrt_rtx")
    assert versions.is_served(rtx)
    assert not versions.is_weakly_typed(rtx)
    assert versions.product(rtx) == "TensorRT-RTX 1.7.1.116"


def test_bf16_came_with_strong_typing(old):
    assert versions.not_offered(old, "bf16") == "TensorRT 8.6.1 has no BF16 (it has: fp32, fp16, int8, int8_fp16)"
    assert versions.not_offered(old, "int8_fp16") is None
    assert versions.not_offered(vendor("10.3.0"), "bf16") is None


@pytest.mark.parametrize(("precision", "flags"), [("fp32", []), ("fp16", ["FP16"]), ("int8", ["INT8"]), ("int8_fp16", ["INT8", "FP16"])])
def test_a_weakly_typed_builder_is_allowed_the_precision_and_keeps_its_own_kernel_libraries(old, precision, flags):
    with pytest.raises(BuildFailed) as caught:
        rt.build_engine(old, b"model", rt.BuildOptions((1,)), precision=precision)
    asked = ", ".join(["EXPLICIT_BATCH", "no TF32", *flags])
    assert caught.value.message == f"TensorRT 8.6.1 built no engine: {asked}"


def test_kernels_come_from_the_libraries_that_are_named(old):
    options = rt.BuildOptions((1,), tactic_sources=("JIT_CONVOLUTIONS", "EDGE_MASK_CONVOLUTIONS"))
    assert rt.BuildOptions.from_json(options.to_json()) == options
    assert options.recorded()["tactic_sources"] == ["JIT_CONVOLUTIONS", "EDGE_MASK_CONVOLUTIONS"]
    with pytest.raises(BuildFailed, match=r"no TF32, tactics EDGE_MASK_CONVOLUTIONS JIT_CONVOLUTIONS\n"):
        rt.build_engine(old, b"model", options)
    with pytest.raises(BuildFailed, match=r"TensorRT 8\.6\.1 has no tactic source CUTLASS \(it has: CUBLAS, CUBLAS_LT, CUDNN"):
        rt.build_engine(old, b"model", rt.BuildOptions((1,), tactic_sources=("CUTLASS",)))


def test_tf32_is_allowed_where_it_was_asked_for(old):
    with pytest.raises(BuildFailed) as caught:
        rt.build_engine(old, b"model", rt.BuildOptions((1,), tf32=True))
    assert caught.value.message == "TensorRT 8.6.1 built no engine: EXPLICIT_BATCH, TF32"


def test_rtx_compiles_kernels_for_a_shape_before_it_runs():
    """Real names and types; the context itself needs a GPU."""
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'deployopt[tensorrt-rtx]'")
    assert versions.specializes_kernels(trt)
    given = []
    engine = SimpleNamespace(create_runtime_config=SimpleNamespace, create_execution_context=lambda *config: given.extend(config) or "context")
    assert versions.create_context(trt, engine) == "context"
    assert given[0].dynamic_shapes_kernel_specialization_strategy is trt.DynamicShapesKernelSpecializationStrategy.EAGER
    assert isinstance(trt.IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy, property)
    assert "-> tensorrt_rtx_bindings.tensorrt_rtx.IRuntimeConfig" in trt.ICudaEngine.create_runtime_config.__doc__
    assert "runtime_config: tensorrt_rtx_bindings.tensorrt_rtx.IRuntimeConfig" in trt.ICudaEngine.create_execution_context.__doc__


def test_tensorrt_has_its_kernels_before_it_runs(old):
    given = []
    assert versions.create_context(old, SimpleNamespace(create_execution_context=lambda *config: given.extend(config) or "context")) == "context"
    assert given == []


def test_a_driver_too_old_for_the_library_is_said(old):
    old.OLD_DRIVER = True
    with pytest.raises(BackendUnavailable, match=r"TensorRT 8\.6\.1 cannot start: CUDA initialization failure with error: 35") as caught:
        rt.build_engine(old, b"model", rt.BuildOptions((1,)))
    assert caught.value.remedy.startswith("update the NVIDIA driver")


def test_a_parser_error_without_a_node_tells_its_description(old):
    with pytest.raises(BuildFailed, match=r"the operator is not supported \(In node 1 \(importNode\)\)"):
        rt.build_engine(old, b"refused", rt.BuildOptions((1,)))


def test_8_x_tells_a_node_by_its_index_and_the_error_by_its_name(old):
    with pytest.raises(BuildFailed, match=r"node 'layer1\.0\.unique' \(Unique\): the operator is not supported"):
        rt.build_engine(old, b"refused", rt.BuildOptions((1,)), nodes=[("conv1", "Conv"), ("layer1.0.unique", "Unique")])


def test_levels_that_8_5_lacks_are_refused(old):
    old.__version__ = "8.5.2"
    with pytest.raises(BuildFailed, match=r"TensorRT 8\.5\.2 has no optimisation levels"):
        rt.build_engine(old, b"model", rt.BuildOptions((1,), optimization_level=5))
    with pytest.raises(BuildFailed, match="built no engine"):  # its own level may be named
        rt.build_engine(old, b"model", rt.BuildOptions((1,), optimization_level=3))
