"""Openers that tests name to a worker's child: small real sessions, and faults injected around them."""

import os
import signal
import sys
import time

import numpy as np

from deployopt.errors import ArtifactMismatch, MissingDependency
from deployopt.runtime.session import TensorSpec


class _Loaded:
    def __init__(self, session, feeds):
        self._session, self._feeds = session, feeds

    def __len__(self):
        return len(self._feeds)

    def run(self, index):
        self._session.execute(self._feeds[index % len(self._feeds)])

    def device_ms(self):
        return None


class _Session:
    streams = 1

    def load(self, feeds):
        return _Loaded(self, feeds)

    def infer(self, feed):
        return dict(zip([s.name for s in self.outputs], self.execute(feed), strict=True))

    def close(self):
        pass


class OnnxRuntimeSession(_Session):
    provider = "CPUExecutionProvider"

    def __init__(self, path, options):
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = options.threads
        self._session = onnxruntime.InferenceSession(str(path), settings, providers=[self.provider])
        self.inputs = [TensorSpec(a.name, tuple(a.shape), "float32") for a in self._session.get_inputs()]
        self.outputs = [TensorSpec(a.name, tuple(a.shape), "float32") for a in self._session.get_outputs()]
        self._slowdown = options.extra.get("slowdown", 0.0)

    def execute(self, feed):
        start = time.perf_counter()
        outputs = self._session.run(None, feed)
        if self._slowdown:
            until = start + (time.perf_counter() - start) * (1 + self._slowdown)
            while time.perf_counter() < until:
                pass
        return outputs


class WrongAloneSession(OnnxRuntimeSession):
    """Right in batches, as an engine whose kernel for a single image is wrong."""

    def execute(self, feed):
        outputs = super().execute(feed)
        return outputs if len(next(iter(feed.values()))) > 1 else [-output for output in outputs]


class SlowFirstSession(OnnxRuntimeSession):
    """Its first inference takes 50 ms more; `load` infers too, as some sessions do to learn the shapes of outputs."""

    def __init__(self, path, options):
        super().__init__(path, options)
        self._waits = 0.05

    def execute(self, feed):
        time.sleep(self._waits)
        self._waits = 0.0
        return super().execute(feed)

    def load(self, feeds):
        self.execute(feeds[0])
        return super().load(feeds)


class OpenVinoSession(_Session):
    provider = "CPU"

    def __init__(self, path, options):
        import openvino

        hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": options.threads, "NUM_STREAMS": 1}
        self._request = openvino.Core().compile_model(str(path), "CPU", hints).create_infer_request()
        compiled = self._request.get_compiled_model()
        self.inputs, self.outputs = ([self._spec(port) for port in ports] for ports in (compiled.inputs, compiled.outputs))

    @staticmethod
    def _spec(port):
        shape = tuple("batch" if dim.is_dynamic else dim.get_length() for dim in port.partial_shape)
        return TensorSpec(port.any_name, shape, "float32")

    def execute(self, feed):
        return list(self._request.infer(feed, share_inputs=True, share_outputs=False).values())


class CrashingSession(OnnxRuntimeSession):
    """Dies in the run whose number is `extra["crash_at"]`."""

    def __init__(self, path, options):
        super().__init__(path, options)
        self._left = options.extra["crash_at"]

    def execute(self, feed):
        self._left -= 1
        if self._left < 0:
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().execute(feed)


class CrashingProfile(OnnxRuntimeSession):
    def profile(self, feeds, runs):
        os.kill(os.getpid(), signal.SIGSEGV)


class _Capturing(_Loaded):
    def execution(self):
        return {"cuda_graph": "on" if self._session.asked else "off"}


class GraphSession(OnnxRuntimeSession):
    """Says of its execution what was asked of it."""

    def __init__(self, path, options):
        super().__init__(path, options)
        self.asked = options.extra.get("cuda_graph")

    def load(self, feeds):
        return _Capturing(self, feeds)


class StutteringSession(OnnxRuntimeSession):
    """Every eighth run takes 3 ms more."""

    runs = 0

    def execute(self, feed):
        self.runs += 1
        if self.runs % 8 == 0:
            time.sleep(0.003)
        return super().execute(feed)


class NanSession(OnnxRuntimeSession):
    def execute(self, feed):
        return [output * np.nan for output in super().execute(feed)]


def segfault(path, options):
    print("loading the plug-in", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)


def killed(path, options):
    os.kill(os.getpid(), signal.SIGKILL)


def hang(path, options):
    time.sleep(3600)


def mismatch(path, options):
    raise ArtifactMismatch("made for another device", "deployopt run RECIPE --fresh")


def missing(path, options):
    raise MissingDependency("nosuch", "runtimes", "to open it")


def foreign(path, options):
    raise ValueError("a runtime's own error")


def noisy(path, options):
    print("library banner on stdout", flush=True)
    os.write(1, b"and from native code\n")
    return OnnxRuntimeSession(path, options)


def with_arguments(path, options):
    """What the child was given, as a session's provider."""
    session = OnnxRuntimeSession(path, options)
    session.provider = repr((path.name, options.threads, options.device, options.precision, dict(options.extra)))
    return session


class SlowOpening(OnnxRuntimeSession):
    """Writes when its opening began and ended, by the machine's clock."""

    def __init__(self, path, options):
        began = time.monotonic()
        super().__init__(path, options)
        time.sleep(0.3)
        (path.parent / f"{options.extra['name']}.opened").write_text(f"{began} {time.monotonic()}")
