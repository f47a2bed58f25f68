import onnx
import onnxruntime
import pytest
from residual_onnx import CONVOLUTIONS, quantized, residual

from deployopt.graph.canonical import canonicalize
from deployopt.graph.dialects import to_unsigned
from deployopt.graph.editing import PRODUCTS
from deployopt.graph.origins import of_names, of_optimized


def optimized(model, folder):
    """The graph that ONNX Runtime executes, written by itself."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "optimized.onnx"), 3
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "optimized.onnx").graph


def int8():
    model, scales = quantized()
    return to_unsigned(canonicalize(model, scales=scales))


@pytest.mark.parametrize("make", [lambda: canonicalize(residual()), int8], ids=["fp32", "int8"])
def test_every_node_that_computes_belongs_to_one_executed_layer(tmp_path, make):
    model = make()
    origins = of_optimized(model.graph, optimized(model, tmp_path))
    told = [name for nodes in origins for name in nodes]
    assert len(told) == len(set(told))
    computing = {n.name for n in model.graph.node if n.op_type not in ("QuantizeLinear", "DequantizeLinear")}
    assert computing <= set(told) <= {n.name for n in model.graph.node}


@pytest.mark.parametrize("make", [lambda: canonicalize(residual()), int8], ids=["fp32", "int8"])
def test_a_convolution_is_told_with_what_was_fused_into_it(tmp_path, make):
    model = make()
    graph = optimized(model, tmp_path)
    by_node = {name: nodes for nodes in of_optimized(model.graph, graph) for name in nodes}
    relus = {n.name: n for n in model.graph.node if n.op_type == "Relu"}
    convolutions = {n.output[0]: n.name for n in model.graph.node if n.op_type == "Conv"}
    assert len(convolutions) == len(CONVOLUTIONS)
    direct = [(convolutions[relu.input[0]], name) for name, relu in relus.items() if relu.input[0] in convolutions]
    assert direct
    assert all(relu in by_node[convolution] for convolution, relu in direct)
    assert [len(set(nodes) & set(convolutions.values())) for nodes in by_node.values()].count(2) == 0


def test_a_fused_add_goes_to_the_convolution_that_runs_last(tmp_path):
    model = canonicalize(residual())
    graph = optimized(model, tmp_path)
    (add,) = [n for n in model.graph.node if n.op_type == "Add" and "layer2" in n.name]
    position = next(i for i, nodes in enumerate(of_optimized(model.graph, graph)) if add.name in nodes)
    assert graph.node[position].op_type == "Conv"
    assert len(graph.node[position].input) == 4  # input, weight, bias, and the tensor that is added


def test_layout_changes_stand_for_no_node(tmp_path):
    model = canonicalize(residual())
    graph = optimized(model, tmp_path)
    origins = of_optimized(model.graph, graph)
    assert {n.op_type for n, nodes in zip(graph.node, origins, strict=True) if not nodes} <= {"ReorderInput", "ReorderOutput", "Transpose"}


def test_nameless_nodes_are_called_by_their_output(tmp_path):
    model = canonicalize(residual())
    outputs = {n.name: n.output[0] for n in model.graph.node}
    named = of_optimized(model.graph, optimized(model, tmp_path))
    for node in model.graph.node:
        node.name = ""
    assert of_optimized(model.graph, optimized(model, tmp_path)) == [tuple(outputs[name] for name in nodes) for nodes in named]


def test_names_of_nodes_tensors_and_helpers_are_found_and_made_up_ones_left_out():
    graph = canonicalize(residual()).graph
    head = next(n for n in graph.node if n.op_type in PRODUCTS and n.output[0] == "logits")
    first = graph.node[0]
    assert of_names(graph, [[f"{head.name}/WithoutBiases", "Multiply_42"], ["logits", first.name], [], ["nothing/known"]]) == [
        (head.name,),
        (first.name, head.name),
        (),
        (),
    ]


def test_quantisation_is_told_only_where_a_layer_does_nothing_else():
    graph = int8().graph
    quantize = next(n.name for n in graph.node if n.op_type == "QuantizeLinear")
    convolution = next(n.name for n in graph.node if n.op_type == "Conv")
    assert of_names(graph, [[quantize], [quantize, convolution]]) == [(quantize,), (convolution,)]
