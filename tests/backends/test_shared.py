import pytest

from deployopt.backends import _shared, _tensorrt
from deployopt.errors import DeployoptError, ExportFailed


@pytest.mark.parametrize(("remedy", "wanted"), [(None, "no GPU"), ("plug one in", "no GPU: plug one in")])
def test_a_reason_is_one_line_with_its_remedy(remedy, wanted):
    assert _shared.sentence(DeployoptError("no GPU", remedy)) == wanted


@pytest.mark.parametrize("read", [_shared.load, lambda path: _tensorrt.prepare(path, path.with_name("out.onnx"))])
@pytest.mark.parametrize(("data", "fault"), [(b"\xff\xff", "is not an ONNX model"), (b"", "holds no graph")])
def test_what_is_no_onnx_is_named_with_the_remedy(tmp_path, read, data, fault):
    path = tmp_path / "broken.onnx"
    path.write_bytes(data)
    with pytest.raises(ExportFailed, match=f"broken.onnx {fault}") as caught:
        read(path)
    assert "--until export" in caught.value.remedy
