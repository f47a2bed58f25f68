"""Outputs of a split, in its order."""

import numpy as np
import torch

from deployopt.data import Dataset
from deployopt.nn import evaluate, models
from deployopt.runtime.preprocessing import to_feed


def test_outputs_are_in_order_and_do_not_depend_on_the_batch_size(colours: Dataset) -> None:
    torch.manual_seed(0)
    net = models.build({"arch": "resnet20", "outputs": 3}, colours.preprocessing).eval()
    whole = evaluate.outputs(net, colours.test)
    assert (whole.shape, whole.dtype) == ((24, 3), np.float32)
    np.testing.assert_allclose(evaluate.outputs(net, colours.test, batch_size=7), whole, atol=1e-5)
    with torch.inference_mode():
        one = net(torch.from_numpy(to_feed(colours.test.images([5]))))
    np.testing.assert_allclose(whole[5], one[0].numpy(), atol=1e-5)


def test_it_says_how_far_it_is(colours: Dataset) -> None:
    net = models.build({"arch": "resnet20", "outputs": 3}, colours.preprocessing).eval()
    done: list[int] = []
    evaluate.outputs(net, colours.test, batch_size=10, on_batch=done.append)
    assert done == [10, 10, 4]
