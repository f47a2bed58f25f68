import pytest

from deployopt.artifact import Availability
from deployopt.backends import _shared, _tensorrt
from deployopt.errors import BackendUnavailable, ExportFailed


@pytest.mark.parametrize(("remedy", "wanted"), [(None, "no GPU"), ("plug one in", "no GPU: plug one in")])
def test_what_a_vendors_module_lacks_is_said_with_its_remedy(remedy, wanted):
    def absent():
        raise BackendUnavailable("no GPU", remedy)

    probed = _shared.probe(absent, lambda vendor: Availability(True, True, vendor, None, None))
    assert (probed.runs, probed.builds, probed.reason, probed.remedy, probed.explanation) == (False, False, "no GPU", remedy, wanted)


@pytest.mark.parametrize("read", [_shared.load, lambda path: _tensorrt.prepare(path, path.with_name("out.onnx"))])
@pytest.mark.parametrize(("data", "fault"), [(b"\xff\xff", "is not an ONNX model"), (b"", "holds no graph")])
def test_what_is_no_onnx_is_named_with_the_remedy(tmp_path, read, data, fault):
    path = tmp_path / "broken.onnx"
    path.write_bytes(data)
    with pytest.raises(ExportFailed, match=f"broken.onnx {fault}") as caught:
        read(path)
    assert "--until export" in caught.value.remedy
