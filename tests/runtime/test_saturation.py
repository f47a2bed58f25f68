import pytest

from deployopt.runtime import host, saturation


@pytest.mark.parametrize(
    ("isa", "vnni", "saturates"),
    [
        (["avx2"], False, True),
        (["avx2", "avx512f"], False, True),
        (["avx2", "avx_vnni"], True, False),
        (["avx2", "avx512_vnni"], True, False),
        (["neon"], False, False),
    ],
)
def test_vnni_is_read_from_the_isa(monkeypatch, isa, vnni, saturates):
    monkeypatch.setattr(host, "cpu", lambda: {"isa": isa})
    assert (saturation.has_vnni_here(), saturation.saturates_here()) == (vnni, saturates)
