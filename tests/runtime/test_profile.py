from deployopt.runtime.profile import typical
from deployopt.runtime.session import LayerTime


def layer(name, time_us):
    return LayerTime(name, "Conv", (name,), "int8", time_us)


def test_each_layer_gets_its_median_in_the_order_of_execution():
    runs = [[layer("b", 3.0), layer("a", 1.0)], [layer("b", 100.0), layer("a", 2.0)], [layer("b", 5.0), layer("a", 9.0)]]
    assert typical(runs) == [layer("b", 5.0), layer("a", 2.0)]


def test_a_layer_that_runs_twice_in_an_inference_counts_with_the_sum():
    (found,) = typical([[layer("body", 2.0), layer("body", 3.0)], [layer("body", 4.0), layer("body", 5.0)]])
    assert (found.time_us, found.calls) == (7.0, 2)


def test_nothing_that_ran_is_an_empty_profile():
    assert typical([]) == []
