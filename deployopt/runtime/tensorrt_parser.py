"""Reading an ONNX with the vendor's parser, whose errors are told in the words of whoever made the graph."""

from typing import TYPE_CHECKING, Sequence, Tuple

from deployopt.errors import BuildFailed
from deployopt.runtime import tensorrt_versions as versions
from deployopt.runtime.tensorrt_api import Vendor
from deployopt.runtime.tensorrt_vendor import clean
from deployopt.runtime.tensorrt_versions import product

if TYPE_CHECKING:
    import tensorrt as api

    from deployopt.runtime.tensorrt_api import Logger

EXPORT_AGAIN = "export the model again: deployopt run RECIPE --fresh --until export"
LEAVE_OUT = "take this backend out of the recipe's build stage, or change the model there"
_EXPLANATIONS = (  # (in the code or description, what is wrong, what to do)
    ("MODEL_DESERIALIZE_FAILED", "the file is not a complete ONNX model", EXPORT_AGAIN),
    (
        "Plugin not found",
        "no such operator, and no plugin of that name",
        "replace the operator in the model with standard ONNX ones, or take this backend out of the build stage",
    ),
    (
        "UNSUPPORTED_NODE",
        "the operator is not supported",
        "replace the operator in the model with supported ones, or take this backend out of the build stage",
    ),
    ("input has type Int32 but must have type", "an INT32 tensor cannot be dequantised here", "leave biases in floating point, without Q/DQ"),
    ("Non-zero zero point", "the zero point is not 0", "quantise symmetrically: INT8 with zero point 0"),
    ("must have same input types", "its inputs differ in type", "cast them to one type; a strongly typed network converts nothing by itself"),
)


def parse(
    trt: Vendor, builder: "api.Builder", logger: "Logger", onnx: bytes, nodes: Sequence[Tuple[str, str]] = ()
) -> Tuple["api.INetworkDefinition", "api.OnnxParser"]:
    """(network, parser); the parser owns the weights, so it must outlive the build.

    Args:
        nodes: (name, operator) of the graph's nodes, in its order; 8.x needs them to name one.

    Raises:
        BuildFailed: every fault that the parser finds, by node.
    """
    network = builder.create_network(versions.network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(onnx):
        raise _refusal(trt, parser, logger, nodes)
    if not network.num_outputs:  # empty bytes parse "successfully"
        raise BuildFailed("the ONNX holds no graph (it has no outputs)", EXPORT_AGAIN)
    return network, parser


def _refusal(trt: Vendor, parser: "api.OnnxParser", logger: "Logger", nodes: Sequence[Tuple[str, str]]) -> BuildFailed:
    """The parser's errors, in the words of whoever made the graph."""
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    if not errors:
        return BuildFailed(f"{product(trt)} cannot read the ONNX: {clean(' '.join(logger.errors()))}", LEAVE_OUT)
    lines, remedies = [], []
    for error in errors:
        name, operator = versions.node_of(error, nodes)
        what, remedy = explain(error.code().name, clean(error.desc()), operator)
        lines.append(f"node '{name}' ({operator}): {what}" if operator else what)
        remedies.append(remedy)
    return BuildFailed(f"{product(trt)} cannot build this ONNX:\n  " + "\n  ".join(lines), remedies[0])


def explain(code: str, description: str, operator: str) -> Tuple[str, str]:
    """(what is wrong, what to do) for an error of the ONNX parser."""
    for sign, what, remedy in _EXPLANATIONS:
        if sign in description or sign == code:
            return (what if operator else f"{what} ({description})", remedy)
    return f"{description} [{code}]", LEAVE_OUT
