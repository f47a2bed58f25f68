"""What a session does when an engine cannot be captured, shown without a GPU: CUDA calls act on host memory, and the engine, which doubles its input,
refuses where a real one might. It stands for no result; `test_engine_computes_what_onnxruntime_computes` runs real engines.
"""

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest

from deployopt.errors import ArtifactMismatch, BackendUnavailable, UsageError
from deployopt.runtime import cuda, tensorrt_session
from deployopt.runtime.manifest import Manifest
from deployopt.runtime.session import Explained, TensorSpec

LOW, HIGH = (1, 3), (4, 3)
SPECS = (TensorSpec("x", ("batch", 3), "float32"),), (TensorSpec("y", ("batch", 3), "float32"),)


class HostCuda:
    """CUDA calls on host memory, in threads that spin. `refuses`: names of calls that end in an error, as the CUDA runtime's do."""

    waiting_threads = "spin"

    def __init__(self, refuses=()):
        self.refuses, self.calls, self.kept, self.capturing, self.graph = refuses, [], [], False, None
        self.out_of_memory = False

    def call(self, name, *arguments):
        self.calls.append(name)
        if name == "cudaStreamBeginCapture":
            self.capturing = True
        if name == "cudaStreamEndCapture":
            self.capturing = False
        if name in self.refuses:
            raise BackendUnavailable(f"{name}: CUDA error 901 (operation failed due to a previous error during capture)")
        if name == "cudaMemcpyAsync":
            target, source, size, *_ = arguments
            ctypes.memmove(target, source, size)
        if name == "cudaGraphLaunch":
            self.graph()
        if name == "cudaEventElapsedTime":
            arguments[0]._obj.value = 1.5

    def make(self, name, *arguments):
        self.call(name, *arguments)
        size = arguments[0] if name in ("cudaMalloc", "cudaHostAlloc") else 1
        self.kept.append((ctypes.c_char * size)())
        return ctypes.c_void_p(ctypes.addressof(self.kept[-1]))


class Context:
    """An engine's execution context: y = 2 x."""

    def __init__(self, host_cuda, accepts_capture):
        self.interrupted = False
        self.cuda, self.accepts_capture, self.addresses, self.shape, self.runs = host_cuda, accepts_capture, {}, None, 0

    def set_input_shape(self, name, shape):
        self.shape = shape
        return True

    def get_tensor_shape(self, name):
        return self.shape

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def execute_async_v3(self, stream):
        self.runs += 1
        if self.cuda.capturing and self.interrupted:
            raise KeyboardInterrupt
        if not self.cuda.capturing:
            self.double()
        elif self.accepts_capture:
            self.cuda.graph = self.double
        return self.accepts_capture or not self.cuda.capturing

    def double(self):
        arrays = [np.ctypeslib.as_array((ctypes.c_float * int(np.prod(self.shape))).from_address(self.addresses[name])) for name in ("x", "y")]
        arrays[1][:] = 2 * arrays[0]


@pytest.fixture
def opened(monkeypatch):
    """Opens a session; returns it with its CUDA and its context."""

    def opened(cuda_graph=True, accepts_capture=True, refuses=(), rtx=False):
        monkeypatch.setattr(opened, "cuda", HostCuda(refuses), raising=False)
        host_cuda = opened.cuda
        context = Context(host_cuda, accepts_capture)
        engine = SimpleNamespace(
            create_execution_context=lambda config=None: None if host_cuda.out_of_memory else context,
            create_runtime_config=SimpleNamespace,
            get_tensor_profile_shape=lambda name, profile: (LOW, HIGH, HIGH),
        )
        runtime = SimpleNamespace(deserialize_cuda_engine=lambda plan: engine)
        vendor = SimpleNamespace(
            __name__="tensorrt_rtx" if rtx else "tensorrt",
            __version__="1.7.1" if rtx else "10.13.0",
            ILogger=type("ILogger", (), {}),
            IProfiler=type("IProfiler", (), {}),
            Runtime=lambda logger: runtime,
        )
        if rtx:
            vendor.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")
        monkeypatch.setattr(tensorrt_session, "Cuda", lambda device: host_cuda)
        unused = (None,) * (len(Manifest._fields) - 2)
        manifest = Manifest(*unused, *SPECS)._replace(inputs=SPECS[0], outputs=SPECS[1])
        return tensorrt_session.TensorRTSession(vendor, b"plan", manifest, "a GPU", cuda_graph=cuda_graph), host_cuda, context

    return opened


def feed(batch, value=1.0):
    return {"x": np.full((batch, 3), value, np.float32)}


def outputs_of(session, loaded, index, batch):
    loaded.run(index)
    return session._host["y"].view((batch, 3), np.float32).copy()


def test_every_cuda_function_exists_in_the_runtime_that_is_installed():
    names = [name for name in cuda.runtime_libraries() if _loads(name)]
    if not names:
        pytest.skip("no CUDA runtime library is installed")
    library = ctypes.CDLL(names[0])
    assert [name for name in cuda.FUNCTIONS if not hasattr(library, name)] == []


def _loads(name):
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def test_a_loaded_batch_is_captured_once_and_launched_as_one(opened):
    session, host_cuda, context = opened()
    loaded = session.load([feed(2, 1.0), feed(2, 5.0)])
    found = [outputs_of(session, loaded, index, 2)[0, 0] for index in range(3)]
    assert found == [2.0, 10.0, 2.0]
    assert (host_cuda.calls.count("cudaGraphLaunch"), host_cuda.calls.count("cudaStreamBeginCapture"), context.runs) == (3, 1, 2)
    assert isinstance(loaded, Explained)
    assert loaded.execution() == {"cuda_graph": "on", "waiting_threads": "spin"}
    launched = host_cuda.calls.index("cudaGraphLaunch")
    assert host_cuda.calls[launched - 1 : launched + 2] == ["cudaEventRecord", "cudaGraphLaunch", "cudaEventRecord"]  # copies stay outside
    assert loaded.device_ms() == 1.5
    session.close()
    assert "cudaGraphExecDestroy" in host_cuda.calls


def test_another_batch_size_gets_a_graph_of_its_own(opened):
    session, host_cuda, _ = opened()
    small, large = session.load([feed(1)]), session.load([feed(4)])
    for loaded, batch in ((small, 1), (large, 4), (small, 1)):
        assert (outputs_of(session, loaded, 0, batch) == 2).all()
    assert (session.infer(feed(3, 2.0))["y"] == 4).all()
    assert host_cuda.calls.count("cudaGraphInstantiateWithFlags") == host_cuda.calls.count("cudaGraphExecDestroy") == 3


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"accepts_capture": False}, "refused: the engine does not run while it is captured"),
        ({"refuses": ("cudaStreamEndCapture",)}, "refused: cudaStreamEndCapture: CUDA error 901"),
        ({"refuses": ("cudaGraphInstantiateWithFlags",)}, "refused: cudaGraphInstantiateWithFlags: CUDA error 901"),
    ],
)
def test_without_a_graph_kernels_are_launched_one_by_one_and_it_is_said(opened, settings, reason):
    session, host_cuda, _ = opened(**settings)
    loaded = session.load([feed(2)])
    assert (outputs_of(session, loaded, 0, 2) == 2).all()
    assert (outputs_of(session, loaded, 0, 2) == 2).all()
    assert loaded.execution()["cuda_graph"].startswith(reason)
    assert host_cuda.calls.count("cudaStreamBeginCapture") == 1  # it is not tried again and again
    assert "cudaGraphLaunch" not in host_cuda.calls


def test_what_is_let_go_of_gives_its_pinned_memory_back(opened):
    session, host_cuda, _ = opened()
    loaded, kept = session.load([feed(2), feed(2)]), session.load([feed(1)])
    del loaded
    assert host_cuda.calls.count("cudaFreeHost") == 2
    session.close()
    assert len(kept) == 0
    assert host_cuda.calls.count("cudaFreeHost") == host_cuda.calls.count("cudaHostAlloc") == 5


def test_nothing_is_captured_unless_it_was_asked_for(opened):
    session, host_cuda, _ = opened(cuda_graph=False)
    loaded = session.load([feed(2)])
    assert (outputs_of(session, loaded, 0, 2) == 2).all()
    assert loaded.execution() == {"cuda_graph": "off", "waiting_threads": "spin"}
    assert "cudaStreamBeginCapture" not in host_cuda.calls


def test_rtx_is_not_captured_and_says_so_where_it_was_asked_to(opened):
    session, host_cuda, _ = opened(rtx=True)
    loaded = session.load([feed(2)])
    assert (outputs_of(session, loaded, 0, 2) == 2).all()
    assert loaded.execution() == {
        "cuda_graph": "refused: TensorRT-RTX's engines are not captured",
        "waiting_threads": "spin",
        "shape_specialization": "eager",
    }
    assert "cudaStreamBeginCapture" not in host_cuda.calls
    assert opened(rtx=True, cuda_graph=False)[0].execution()["cuda_graph"] == "off"


def test_ctrl_c_ends_the_capture_and_the_stream_runs_on(opened):
    session, host_cuda, context = opened()
    loaded, context.interrupted = session.load([feed(2)]), True
    with pytest.raises(KeyboardInterrupt):
        loaded.run(0)
    assert not host_cuda.capturing
    assert "cudaGraphDestroy" in host_cuda.calls
    context.interrupted = False
    assert (outputs_of(session, loaded, 0, 2) == 2).all()
    assert loaded.execution()["cuda_graph"] == "on"


def test_a_profile_that_gets_no_context_leaves_the_session_as_it_was(opened):
    session, host_cuda, _ = opened()
    host_cuda.out_of_memory = True
    with pytest.raises(ArtifactMismatch, match="no execution context"):
        session.profile([feed(2)], 1)
    host_cuda.out_of_memory = False
    loaded = session.load([feed(2)])
    assert (outputs_of(session, loaded, 0, 2) == 2).all()
    assert loaded.execution()["cuda_graph"] == "on"


FREED = {"cudaMalloc": "cudaFree", "cudaHostAlloc": "cudaFreeHost", "cudaEventCreate": "cudaEventDestroy", "cudaStreamCreateWithFlags": "cudaStreamDestroy"}


@pytest.mark.parametrize("lacking", FREED)
def test_a_session_that_cannot_be_opened_frees_what_it_had(opened, lacking):
    with pytest.raises(BackendUnavailable, match=lacking):
        opened(refuses=(lacking,))
    calls = opened.cuda.calls
    assert {made: calls.count(made) - (made == lacking) for made in FREED} == {made: calls.count(freed) for made, freed in FREED.items()}


def test_a_session_can_be_closed_twice_and_is_then_empty(opened):
    session, host_cuda, _ = opened()
    session.infer(feed(2))
    session.close()
    session.close()
    assert {made: host_cuda.calls.count(made) for made in FREED} == {made: host_cuda.calls.count(freed) for made, freed in FREED.items()}
    with pytest.raises(KeyError):  # and does not write where its buffers were
        session.infer(feed(2))


def test_a_batch_outside_the_profile_is_refused_with_the_range(opened):
    session, _, _ = opened()
    with pytest.raises(UsageError, match=r"shape \(5, 3\) is outside the engine's \(1, 3\) to \(4, 3\)") as caught:
        session.load([feed(5)])
    assert caught.value.remedy == "build it with this batch size in batch_sizes"
    with pytest.raises(UsageError, match=r"inputs \['z'\] were given; the engine takes \['x'\]"):
        session.infer({"z": feed(1)["x"]})
    with pytest.raises(UsageError, match="must be of one shape"):
        session.load([feed(1), feed(2)])
