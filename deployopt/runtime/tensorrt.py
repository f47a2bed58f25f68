"""Building engines with TensorRT and TensorRT-RTX. They share one API shape, so the vendor module is an argument (`trt`).

Precision is typed in the ONNX (casts, Q/DQ); networks are strongly typed and no builder flag changes it, but for TensorRT 8.x
(`runtime/tensorrt_versions.py`). TF32 is off unless asked for: FP32 means FP32.
"""

import re
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, TypeVar, Union

from deployopt.errors import ArtifactMismatch, BackendUnavailable, BuildFailed
from deployopt.runtime import manifest
from deployopt.runtime import tensorrt_versions as versions
from deployopt.runtime.cuda import Cuda, Gpu, device_index, find_gpu, is_out_of_memory, runtime_version
from deployopt.runtime.files import atomic_write, built_onto
from deployopt.runtime.hashing import sha256_bytes
from deployopt.runtime.preprocessing import Preprocessing
from deployopt.runtime.progress import Progress, SilentProgress
from deployopt.runtime.session import TensorSpec
from deployopt.runtime.tensorrt_api import Vendor
from deployopt.runtime.tensorrt_layers import Execution, Layer, Network, execution, layers_of_inspector, layers_of_log, network_of
from deployopt.runtime.tensorrt_parser import EXPORT_AGAIN, LEAVE_OUT, parse
from deployopt.runtime.tensorrt_timing import TimingCache, path_of
from deployopt.runtime.tensorrt_vendor import clean, load_vendor, make_logger, make_monitor
from deployopt.runtime.tensorrt_versions import is_rtx, product

if TYPE_CHECKING:
    import tensorrt as api

    from deployopt.runtime.tensorrt_api import Logger

T = TypeVar("T")
Shape = Tuple[int, ...]
Ranges = Dict[str, Dict[str, Shape]]  # input → {"min", "opt", "max"}: shape

# https://github.com/NVIDIA/TensorRT/issues/263 and /1913, https://github.com/laugh12321/TensorRT-YOLO/issues/118: from 6, 7 and 10
_NO_PLUGIN = re.compile(r"PluginCreator\w* not found in Plugin Registry|(?:could not|cannot) find plugin:? *(?P<name>[^\s,]*)", re.IGNORECASE)
FREE_MEMORY = "free memory of the GPU: `nvidia-smi` lists what holds it"
_REMEDY_MISS = "build once without error_on_timing_cache_miss, which fills the cache"


class BuildOptions(NamedTuple):
    """How to build.

    Attributes:
        batch_sizes: that the engine must run; see `ranges_of`.
        compute_capabilities: GPU classes to build for, as "8.6" (TensorRT-RTX only); empty builds for the GPU of this machine.
        workspace_mib: scratch memory a layer may use; None leaves the vendor's limit, all of the GPU's memory (TensorRT only).
        optimization_level: 0 builds fastest, 5 searches longest; None leaves the vendor's 3 (TensorRT only).
        tf32: what is FP32 in the graph may be computed in TF32, with 10 bits of mantissa.
        timing_cache: folder in which timings of kernels are kept from build to build; None keeps none (TensorRT only).
        error_on_timing_cache_miss: a build that has to time a kernel fails (with `timing_cache` only).
        tactic_sources: libraries that kernels may come from, by names of `trt.TacticSource`; None leaves the vendor's default (TensorRT only).
    """

    batch_sizes: Tuple[int, ...] = (1,)
    compute_capabilities: Tuple[str, ...] = ()
    workspace_mib: Optional[int] = None
    optimization_level: Optional[int] = None
    tf32: bool = False
    timing_cache: Optional[str] = None
    error_on_timing_cache_miss: bool = False
    tactic_sources: Optional[Tuple[str, ...]] = None

    def to_json(self) -> Dict[str, Any]:
        """Those that are set."""
        chosen = {name: value for name, value in self._asdict().items() if value is not None and value is not False and value != ()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in chosen.items()}

    def recorded(self) -> Dict[str, Any]:
        """As JSON for manifest and report: without this machine's folders, and with TF32 said either way."""
        kept = {"timing_cache": True} if self.timing_cache else {}
        return {**self.to_json(), **kept, "tf32": self.tf32}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "BuildOptions":
        fields: Dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
        return BuildOptions(**fields)


class Build(NamedTuple):
    """A serialised engine and what the build knows of it.

    Attributes:
        execution: what it runs in which precision; None where that cannot be told, and `reason` says why.
        timing_cache: `TimingCache.use`; None without one.
    """

    plan: bytes
    seconds: float
    ranges: Ranges
    inputs: Tuple[TensorSpec, ...]
    outputs: Tuple[TensorSpec, ...]
    execution: Optional[Execution]
    reason: Optional[str]
    timing_cache: Optional[str]


def compute_capabilities(trt: Vendor) -> List[str]:
    """GPU classes this TensorRT-RTX builds for, as "8.6", ascending."""
    numbers = sorted(int(name[2:]) for name in versions.compute_capability(trt) if name.startswith("SM"))
    return [f"{n // 10}.{n % 10}" for n in numbers]


def _started(trt: Vendor, kind: Callable[["Logger"], T], logger: "Logger") -> T:
    """`trt.Builder(logger)` or `trt.Runtime(logger)`. Raises BackendUnavailable where the library cannot start, as with a driver too old for it."""
    try:
        return kind(logger)
    except TypeError as exc:  # pybind11: "factory function returned nullptr"
        texts = dict.fromkeys(text for severity, text in logger.messages if severity in ("WARNING", "ERROR", "INTERNAL_ERROR"))  # it repeats itself
        said = clean(" ".join(texts))
        raise BackendUnavailable(
            f"{product(trt)} cannot start: {said or exc}",
            "update the NVIDIA driver, or install a TensorRT for the CUDA that it serves: see `nvidia-smi`",
        ) from exc


def _specs(tensors: Sequence["api.ITensor"]) -> Tuple[TensorSpec, ...]:
    return tuple(TensorSpec(t.name, _named_axes(t), _dtype(t.dtype)) for t in tensors)


def _named_axes(tensor: "api.ITensor") -> Tuple[Union[int, str], ...]:
    """A dynamic axis by its ONNX name; an output's first dynamic axis, which TensorRT leaves nameless, is "batch"."""
    return tuple(
        size if size >= 0 else tensor.get_dimension_name(axis) or ("batch" if axis == 0 else f"axis{axis}") for axis, size in enumerate(sizes(tensor.shape))
    )


def sizes(dims: "api.Dims") -> Shape:
    """Of each axis, -1 where it is dynamic."""
    return tuple(dims[axis] for axis in range(len(dims)))


def _dtype(dtype: "api.DataType") -> str:
    """NumPy's name of a vendor's DataType."""
    name = str(dtype.name)
    return {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}.get(name, name.lower())


def ranges_of(inputs: Sequence[TensorSpec], batch_sizes: Sequence[int]) -> Ranges:
    """The optimisation profile that spans the batch sizes: from 1 to the largest, tuned for the largest, where tuning pays most.

    Raises:
        BuildFailed: a batch size below 1, an axis other than the first is dynamic, or a static batch excludes a wanted one.
    """
    if not batch_sizes or min(batch_sizes) < 1:
        raise BuildFailed(f"batch sizes {list(batch_sizes)}: each must be 1 or more", "set batch_sizes in the recipe")
    largest, ranges = max(batch_sizes), {}
    for spec in inputs:
        inner = [axis for axis in spec.shape[1:] if not isinstance(axis, int)]
        if inner:
            raise BuildFailed(f"input '{spec.name}' {list(spec.shape)}: only the batch may be dynamic", "export the model with a fixed image size")
        if not spec.shape or isinstance(spec.shape[0], int):
            static = spec.shape[0] if spec.shape else None
            if set(batch_sizes) != {static}:
                raise BuildFailed(f"input '{spec.name}' {list(spec.shape)} is static; batch sizes {sorted(set(batch_sizes))} were asked for", EXPORT_AGAIN)
            continue
        rest = tuple(int(axis) for axis in spec.shape[1:])
        ranges[spec.name] = {"min": (1, *rest), "opt": (largest, *rest), "max": (largest, *rest)}
    return ranges


def build_engine(
    trt: Vendor,
    onnx: bytes,
    options: BuildOptions,
    progress: Optional[Progress] = None,
    description: str = "building",
    precision: str = "fp32",
    gpu: Optional[Gpu] = None,
    nodes: Sequence[Tuple[str, str]] = (),
) -> Build:
    """Build an engine in this process. On a machine without a GPU only TensorRT-RTX can, ahead of time.

    Args:
        precision: as typed in the ONNX; a weakly typed builder must be allowed it.
        gpu: of this machine, which it is built for and which this thread uses; None builds ahead of time.
        nodes: (name, operator) of the graph's nodes, in its order; 8.x needs them to name the one that it refuses.

    Raises:
        BuildFailed: the parser or the builder refused; says the node, what is wrong and what to do.
        KeyboardInterrupt: Ctrl-C; the build stops at its next step.
    """
    progress = progress or SilentProgress()
    logger = make_logger(trt, verbose=is_rtx(trt))
    builder = _started(trt, trt.Builder, logger)
    network, parser = parse(trt, builder, logger, onnx, nodes)
    inputs = _specs([network.get_input(i) for i in range(network.num_inputs)])
    outputs = _specs([network.get_output(i) for i in range(network.num_outputs)])
    ranges = ranges_of(inputs, options.batch_sizes)
    config = _configure(trt, builder, logger, options, precision)
    _add_profile(trt, builder, config, logger, ranges)
    timing = TimingCache(config, logger, path_of(Path(options.timing_cache), trt, gpu)) if options.timing_cache and gpu else None
    start = time.monotonic()
    with ExitStack() as stack:
        bar = stack.enter_context(progress.track(description, 1.0))
        monitor = make_monitor(trt, bar.advance) if versions.has_monitor(trt) else None
        if monitor is not None:
            config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
        if plan is not None:
            bar.advance(1.0 - (monitor.told if monitor is not None else 0.0))  # the builder skips steps it has nothing to do in
    seconds = time.monotonic() - start
    if monitor is not None and monitor.raised is not None:
        raise monitor.raised
    if plan is None:
        said = clean(" ".join(logger.errors()))
        raise BuildFailed(f"{product(trt)} built no engine: {said or 'it gave no reason'}", _remedy(said, options))
    if timing is not None:
        _keep(trt, timing, options, progress)
    data = bytes(memoryview(plan))
    ran, reason = _verify(trt, network_of(trt, network), logger, data, ranges)
    del parser
    return Build(data, seconds, ranges, inputs, outputs, ran, reason, timing.use if timing is not None else None)


def _remedy(said: str, options: BuildOptions) -> str:
    """What to do where the builder built nothing."""
    if is_out_of_memory(said):
        return FREE_MEMORY
    return _REMEDY_MISS if options.error_on_timing_cache_miss and "timing cache" in said.lower() else LEAVE_OUT


def _keep(trt: Vendor, timing: TimingCache, options: BuildOptions, progress: Progress) -> None:
    """Store what was timed, or refuse that anything was, unless the builder itself did that."""
    if options.error_on_timing_cache_miss and not versions.refuses_cache_misses(trt) and timing.missed:
        raise BuildFailed(
            f"kernels were timed that the timing cache lacks ({timing.path.name} was {timing.use}), so other ones may have been chosen than before",
            _REMEDY_MISS,
        )
    try:
        timing.store()
    except OSError as exc:  # the engine is whole; only the next build takes as long
        progress.log(f"the timing cache was not stored: {exc}")


def _configure(trt: Vendor, builder: "api.Builder", logger: "Logger", options: BuildOptions, precision: str) -> "api.IBuilderConfig":
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    (config.set_flag if options.tf32 else config.clear_flag)(trt.BuilderFlag.TF32)
    versions.allow(trt, config, precision)
    if options.error_on_timing_cache_miss:
        versions.refuse_cache_misses(trt, config)
    if options.tactic_sources is not None:
        _set_tactic_sources(trt, config, options.tactic_sources)
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    if options.optimization_level is not None and not versions.set_optimization_level(config, options.optimization_level):
        raise BuildFailed(f"{product(trt)} has no optimisation levels", "remove optimization_level from the options of tensorrt in the recipe's build stage")
    _set_targets(trt, config, logger, options.compute_capabilities)
    return config


def _set_targets(trt: Vendor, config: "api.IBuilderConfig", logger: "Logger", capabilities: Sequence[str]) -> None:
    """The GPU classes to build for ahead of time; none leaves this machine's."""
    if not capabilities:
        return
    known = compute_capabilities(trt)
    unknown = [c for c in capabilities if c not in known]
    if unknown:
        raise BuildFailed(
            f"{product(trt)} does not build for compute capability {', '.join(unknown)} (it builds for {', '.join(known)})",
            "set compute_capabilities of tensorrt_rtx in the recipe's build stage",
        )
    refused = versions.set_compute_capabilities(trt, config, capabilities)
    if refused is not None:
        raise BuildFailed(f"{product(trt)} refused compute capability {refused}: {clean(' '.join(logger.errors()))}")


def _set_tactic_sources(trt: Vendor, config: "api.IBuilderConfig", names: Sequence[str]) -> None:
    known = trt.TacticSource.__members__
    unknown = [name for name in names if name not in known]
    if unknown:
        raise BuildFailed(f"{product(trt)} has no tactic source {', '.join(unknown)} (it has: {', '.join(known)})", "name these only in tactic_sources")
    config.set_tactic_sources(sum(1 << int(known[name]) for name in set(names)))


def _add_profile(trt: Vendor, builder: "api.Builder", config: "api.IBuilderConfig", logger: "Logger", ranges: Ranges) -> None:
    if not ranges:
        return
    profile = builder.create_optimization_profile()
    for name, bounds in ranges.items():
        profile.set_shape(name, *(trt.Dims(list(bounds[bound])) for bound in ("min", "opt", "max")))
    if config.add_optimization_profile(profile) < 0:
        raise BuildFailed(f"the optimisation profile {ranges} was refused: {clean(' '.join(logger.errors()))}", "set batch_sizes in the recipe")


def load_engine(trt: Vendor, plan: bytes, logger: "Logger") -> Tuple["api.ICudaEngine", "api.Runtime"]:
    """Deserialise: (engine, runtime). The runtime and the logger must outlive the engine.

    Raises:
        BackendUnavailable: the vendor's library cannot start here.
        ArtifactMismatch: it refuses these bytes, which their manifest vouched for.
    """
    runtime = _started(trt, trt.Runtime, logger)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise _refused(trt, clean(" ".join(logger.errors())))
    return engine, runtime


def _refused(trt: Vendor, said: str) -> ArtifactMismatch:
    """Why an engine cannot be loaded, and what helps."""
    found = list(_NO_PLUGIN.finditer(said))
    if not found:
        return ArtifactMismatch(f"{product(trt)} cannot load the engine: {said}", f"{manifest.REBUILD}  # on this machine")
    names = ", ".join(f"'{match['name']}'" for match in found if match["name"]) or "that it does not name"
    return ArtifactMismatch(
        f"{product(trt)} cannot load the engine: it wants the plugin {names}, which is not loaded here ({said})",
        "replace the plugin's operator in the model with standard ONNX ones and build again: deployopt loads no plugins",
    )


def new_context(trt: Vendor, engine: "api.ICudaEngine", logger: "Logger") -> "api.IExecutionContext":
    """An execution context. Raises ArtifactMismatch where there is none, as on a GPU whose memory is taken."""
    context = versions.create_context(trt, engine)
    if context is None:
        raise ArtifactMismatch(
            f"no execution context for the engine: {clean(' '.join(logger.errors())) or 'no reason was given'}",
            f"{FREE_MEMORY}; {manifest.REBUILD}",
        )
    return context


def inspect(trt: Vendor, engine: "api.ICudaEngine", context: "api.IExecutionContext") -> List[Layer]:
    """Layers as the engine inspector shows them. The context's input shapes must be set: with the batch left open it shows no types.

    Raises:
        ValueError: what it says is no JSON.
    """
    inspector = engine.create_engine_inspector()
    inspector.execution_context = context
    return layers_of_inspector(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def _verify(trt: Vendor, network: Network, logger: "Logger", plan: bytes, ranges: Ranges) -> Tuple[Optional[Execution], Optional[str]]:
    """What runs in which precision, or why that cannot be told. RTX lists its layers while building; TensorRT shows them in the engine."""
    try:
        if is_rtx(trt):
            return execution(network, layers_of_log(logger.messages)), None
        engine, runtime = load_engine(trt, plan, logger)
        context = new_context(trt, engine, logger)
        for name, bounds in ranges.items():
            context.set_input_shape(name, bounds["opt"])
        layers = inspect(trt, engine, context)
        del context, engine, runtime  # in this order
        return execution(network, layers), None
    except (ValueError, ArtifactMismatch) as exc:
        said = exc.message if isinstance(exc, ArtifactMismatch) else exc
        return None, f"the layers of the engine could not be read: {said}"


def build_file(
    *,
    vendor: str,
    onnx: str,
    engine: str,
    precision: str,
    device: str,
    options: Dict[str, Any],
    preprocessing: Optional[Dict[str, Any]],
    progress: Progress,
    nodes: Sequence[Sequence[str]] = (),
) -> Dict[str, Any]:
    """Build an engine file and its manifest. Arguments and result are JSON values.

    Args:
        vendor: "tensorrt" or "tensorrt_rtx".
        onnx, engine: paths of the source and of the engine, which is compressed if that ends in `manifest.COMPRESSED`.
        precision: as typed in the ONNX; recorded.
        device: "cpu" or "cuda:N": the GPU it is built for, where there is one.
        options: `BuildOptions.to_json`.
        preprocessing: `Preprocessing` as JSON, if known; recorded.
        nodes: [name, operator] of the source's nodes, in its order; 8.x needs them to name the one that it refuses.

    Returns:
        {"inputs", "outputs": [[name, shape, dtype]], "seconds", "options": as recorded, "timing_cache", "execution": {…} | null, "reason"}.

    Raises:
        BuildFailed, BackendUnavailable, KeyboardInterrupt.
    """
    trt = load_vendor(vendor)
    gpu = _gpu(trt, device)
    build_options = BuildOptions.from_json(options)
    if gpu is not None and not build_options.compute_capabilities:
        Cuda(device_index(device))  # the builder builds for the GPU that its thread uses
    source, target = Path(onnx), Path(engine)
    data = source.read_bytes()
    named = [(name, operator) for name, operator in nodes]
    built = build_engine(trt, data, build_options, progress, f"{product(trt)} builds {target.name}", precision, gpu, named)
    described = manifest.Manifest(
        sha256_bytes(built.plan),
        len(built.plan),
        vendor,
        trt.__version__,
        runtime_version(),
        manifest.this_platform(),
        build_options.compute_capabilities or ((gpu.compute_capability,) if gpu else ()),
        gpu,
        precision,
        (built.ranges,),
        built.inputs,
        built.outputs,
        sha256_bytes(data),
        build_options.recorded(),
        Preprocessing.from_json(preprocessing) if preprocessing else None,
    )
    _save(target, built.plan, described)
    return {
        "inputs": built.inputs,
        "outputs": built.outputs,
        "seconds": built.seconds,
        "options": build_options.recorded(),
        "timing_cache": built.timing_cache,
        "execution": built.execution._asdict() if built.execution else None,
        "reason": built.reason,
    }


def _gpu(trt: Vendor, device: str) -> Optional[Gpu]:
    """The GPU built for; None where TensorRT-RTX builds ahead of time, on a machine without one."""
    try:
        return find_gpu(device_index(device))
    except BackendUnavailable:
        if is_rtx(trt):
            return None
        raise


def _save(target: Path, plan: bytes, described: manifest.Manifest) -> None:
    """Write the engine and its manifest, or neither. Raises BuildFailed where the disk is full."""
    stored = manifest.compressed(plan) if target.suffix == manifest.COMPRESSED else plan
    with built_onto(target, len(stored)):
        try:
            atomic_write(target, stored)
            manifest.write(target, described)
        except OSError:
            target.unlink(missing_ok=True)
            raise
