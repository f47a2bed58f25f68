import pytest

from deployopt.runtime import host, saturation


@pytest.mark.parametrize(
    ("architecture", "isa", "vnni", "saturates"),
    [
        ("x86_64", ["avx2"], False, True),
        ("x86_64", ["avx2", "avx512f"], False, True),
        ("x86_64", ["avx2", "avx_vnni"], True, False),
        ("x86_64", ["avx2", "avx512_vnni"], True, False),
        ("AMD64", [], False, True),  # Windows, where they cannot be read
        ("aarch64", ["neon"], False, False),
        ("arm64", [], False, False),
    ],
)
def test_vnni_is_read_from_the_isa(monkeypatch, architecture, isa, vnni, saturates):
    monkeypatch.setattr(host, "cpu", lambda: {"architecture": architecture, "isa": isa})
    assert (saturation.has_vnni_here(), saturation.saturates_here()) == (vnni, saturates)
