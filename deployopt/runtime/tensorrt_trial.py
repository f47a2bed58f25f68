"""A trial of the vendor's library on this machine: the smallest engine is built and run. Nothing less tells whether driver, GPU, library and CUDA runtime
go together: TensorRT names a GPU that it does not serve only when it builds.
"""

import tempfile
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

import numpy as np

from deployopt.errors import BuildFailed, DeployoptError
from deployopt.runtime.cuda import is_out_of_memory
from deployopt.runtime.process import error_to_json
from deployopt.runtime.progress import Progress
from deployopt.runtime.session import SessionOptions
from deployopt.runtime.tensorrt import FREE_MEMORY, BuildOptions, build_file
from deployopt.runtime.tensorrt_session import open_session

RELU = (  # as ONNX, opset 13: y [1, 2] = Relu(x [1, 2]) in FP32; all versions read it, and the package onnx is not needed
    b'\x08\x07:D\n\x12\n\x01x\x12\x01y\x1a\x04relu"\x04Relu\x12\x04reluZ\x13\n\x01x\x12\x0e\n\x0c\x08\x01\x12\x08\n\x02\x08\x01\n\x02\x08\x02'
    b"b\x13\n\x01y\x12\x0e\n\x0c\x08\x01\x12\x08\n\x02\x08\x01\n\x02\x08\x02B\x04\n\x00\x10\r"
)


def try_out(*, vendor: str, device: str, compute_capabilities: Sequence[str], progress: Progress) -> Optional[Dict[str, Any]]:
    """Build an engine for a GPU of this machine and run it there. Native code may crash: call it in a child process.

    Args:
        vendor: "tensorrt" or "tensorrt_rtx".
        device: "cuda:N".
        compute_capabilities: as `BuildOptions` has them.

    Returns:
        None if it runs; otherwise why it is built and does not run, as `process.error_to_json` has it.

    Raises:
        BackendUnavailable: the library is lacking or cannot start, as with a driver too old for it.
        BuildFailed: it starts and builds nothing, as for a GPU that it does not serve, or whose memory is taken.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, engine = Path(folder) / "relu.onnx", Path(folder) / "relu.engine"
        source.write_bytes(RELU)
        try:
            build_file(
                vendor=vendor,
                onnx=str(source),
                engine=str(engine),
                precision="fp32",
                device=device,
                options=BuildOptions(compute_capabilities=tuple(compute_capabilities)).to_json(),
                preprocessing=None,
                progress=progress,
            )
        except BuildFailed as exc:
            remedy = FREE_MEMORY if is_out_of_memory(exc.message) else f"install a version of {vendor} that serves this GPU, by the support matrix of NVIDIA"
            raise BuildFailed(f"no engine can be built for this GPU: {exc.message}", remedy) from exc
        try:
            with open_session(vendor, engine, SessionOptions(device=device)) as session:
                session.infer({"x": np.array([[-1, 2]], np.float32)})
        except DeployoptError as exc:
            return error_to_json(exc)
    return None
