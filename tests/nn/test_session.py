"""A torch model behind the session interface."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from deployopt.errors import ArtifactError, BackendUnavailable, DeviceUnavailable, UsageError
from deployopt.nn import checkpoint, models, session
from deployopt.nn.prepared import Prepared, Scheme
from deployopt.nn.quantizer import fake_quantized
from deployopt.runtime.preprocessing import Preprocessing
from deployopt.runtime.session import SessionOptions

CPU = SessionOptions(device="cpu", threads=1)
FEED = np.random.default_rng(0).random((3, 3, 8, 8), np.float32)


def network() -> models.Network:
    torch.manual_seed(0)
    net = models.build({"arch": "resnet20", "outputs": 5}, Preprocessing(8)).train()
    net(torch.rand(16, 3, 8, 8))
    return net.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    checkpoint.save(path, network())
    return path


@pytest.mark.parametrize("name", ["", checkpoint.WEIGHTS])
def test_outputs_are_the_networks(folder: Path, name: str) -> None:
    with session.open(folder / name, CPU) as opened, torch.inference_mode():
        found = opened.infer({"input": FEED})
        assert set(found) == {"output"}
        np.testing.assert_array_equal(found["output"], network()(torch.from_numpy(FEED)).numpy())
        assert opened.inputs[0].shape == ("batch", 3, 8, 8)
        assert opened.provider == "CPU"
        assert not torch.backends.cuda.matmul.allow_tf32
        assert not torch.backends.cudnn.allow_tf32
    assert torch.get_num_threads() == 1


def test_outputs_belong_to_the_caller(folder: Path) -> None:
    with session.open(folder, CPU) as opened:
        first = opened.infer({"input": FEED})["output"]
        kept = first.copy()
        opened.infer({"input": FEED * 0})
        np.testing.assert_array_equal(first, kept)


def test_loaded_feeds_run_in_rotation(folder: Path) -> None:
    with session.open(folder, CPU) as opened:
        loaded = opened.load([{"input": FEED}, {"input": FEED[:1]}])
        assert len(loaded) == 2
        for index in range(3):
            loaded.run(index)
        assert loaded.device_ms() is None


@pytest.mark.parametrize(
    ("feed", "message"),
    [
        ({"image": FEED}, r"wanted the input 'input', found \['image'\]"),
        ({"input": FEED.astype(np.float64)}, "found float64"),
        ({"input": FEED[0]}, r"found float32 \[3, 8, 8\]"),
        ({"input": FEED[..., :4]}, r"found float32 \[3, 3, 8, 4\]"),
    ],
)
def test_a_feed_that_does_not_fit_is_refused(folder: Path, feed: dict[str, np.ndarray], message: str) -> None:
    with session.open(folder, CPU) as opened, pytest.raises(UsageError, match=message):
        opened.infer(feed)


def test_what_cannot_be_opened_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match="wanted fp16"):
        session.open(folder, SessionOptions(device="cpu", threads=1, precision="fp16"))
    with pytest.raises(ArtifactError, match=r"model\.json cannot be read"):
        session.open(tmp_path, CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(DeviceUnavailable, match="wanted cuda:0, torch sees no CUDA device"):
        session.open(folder, SessionOptions(device="cuda:0", threads=1))


@pytest.mark.gpu
@pytest.mark.parametrize("open_", [session.open, session.open_compiled])
def test_on_a_gpu_the_outputs_are_the_cpus(folder: Path, open_: Callable[[Path, SessionOptions], session.TorchSession]) -> None:
    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} sees no GPU")
    with session.open(folder, CPU) as reference, open_(folder, SessionOptions(device="cuda", threads=1)) as opened:
        assert opened.provider == torch.cuda.get_device_name(0)
        assert not torch.backends.cuda.matmul.allow_tf32
        np.testing.assert_allclose(opened.infer({"input": FEED})["output"], reference.infer({"input": FEED})["output"], atol=1e-4)
        loaded = opened.load([{"input": FEED}, {"input": FEED * 0}])
        loaded.run(1)
        assert loaded.device_ms() is None


def test_a_quantised_network_runs_fake_quantised(tmp_path: Path) -> None:
    net = network()
    prepared = Prepared(net, Scheme())
    prepared.calibrate([torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))])
    prepared.write_back(net)
    checkpoint.save(tmp_path, net)
    with session.open(tmp_path, CPU) as opened, torch.inference_mode():
        found = opened.infer({"input": FEED})["output"]
        np.testing.assert_allclose(found, fake_quantized(net)(torch.from_numpy(FEED)).numpy(), atol=1e-5)
        assert abs(found - net(torch.from_numpy(FEED)).numpy()).max() > 1e-4


@pytest.mark.slow  # Inductor and g++ work for half a minute and more
def test_a_compiled_network_computes_what_the_eager_one_does(folder: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++: the next test is of that")
    with session.open(folder, CPU) as eager, session.open_compiled(folder, CPU) as compiled:
        np.testing.assert_allclose(compiled.infer({"input": FEED})["output"], eager.infer({"input": FEED})["output"], rtol=1e-4, atol=1e-5)
        assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]


def test_without_a_compiler_nothing_is_compiled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BackendUnavailable, match=r"torch\.compile needs a compiler, and 'no-such-compiler' is not found") as caught:
        session.open_compiled(folder, CPU)
    assert caught.value.remedy == "apt-get install g++, or name another in CXX"
