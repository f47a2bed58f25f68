from deployopt.runtime.session import LayerTime
from deployopt.runtime.tensorrt_layers import Layer, Tensor
from deployopt.runtime.tensorrt_session import layer_time

INT8 = Tensor("t", ("1", "4"), "int8")


def test_a_reported_time_gets_the_facts_that_the_inspector_shows():
    layer = Layer("conv1 + relu1", "CaskConvolution", (INT8,), (INT8,), ("conv1", "relu1"))
    assert layer_time(layer, layer.name, 0.25) == LayerTime("conv1 + relu1", "CaskConvolution", ("conv1", "relu1"), "int8", 250.0)


def test_a_layer_that_the_inspector_does_not_show_keeps_its_name_alone():
    assert layer_time(None, "Reformatting CopyNode", 0.5) == LayerTime("Reformatting CopyNode", "?", (), "?", 500.0)
    assert layer_time(Layer("shape", "Shape", (), (), ()), "shape", 0.5).precision == "?"
