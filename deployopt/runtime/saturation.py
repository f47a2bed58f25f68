"""Sums of INT8 products on x86 CPUs: without VNNI they are kept in 16 bits, pair by pair, and saturate. What ONNX files say of it, and this CPU.

Source: Intel SDM, vpmaddubsw (two u8 · s8 products added in int16) and vpdpbusd (VNNI: four, in int32).
"""

from typing import Sequence

from deployopt.runtime import host

# Of an ONNX file's metadata, written by graph/dialects.py:
SATURATION_KEY = "deployopt.int16_saturation"  # layers of which pairs of products can exceed int16
VNNI_KEY = "deployopt.vnni"  # there if the file is for CPUs with VNNI: activations are not clipped that int16 would need clipped

_X86 = frozenset({"x86_64", "amd64", "i386", "i586", "i686"})


def has_vnni(isa: Sequence[str]) -> bool:
    """Whether a CPU sums u8 · s8 products in 32 bits."""
    return bool({"avx_vnni", "avx512_vnni"} & set(isa))


def saturates_here() -> bool:
    """Whether this machine's CPU sums products in 16 bits, as far as is known: an x86 CPU whose instructions cannot be read (not on Linux) counts as one."""
    cpu = host.cpu()
    return cpu["architecture"].lower() in _X86 and not has_vnni(cpu["isa"])


def has_vnni_here() -> bool:
    """Whether this machine's CPU has VNNI."""
    return has_vnni(host.cpu()["isa"])
