import numpy as np

from deployopt.bench.images import natural_noise


def test_noise_is_seeded_and_smooth():
    noise = natural_noise(3, 64, 48, 3, seed=1)
    assert noise.shape == (3, 64, 48, 3)
    assert noise.dtype == np.uint8
    np.testing.assert_array_equal(noise, natural_noise(3, 64, 48, 3, seed=1))
    assert (noise[0] != noise[1]).any()
    neighbours = np.corrcoef(noise[0, :, :-1, 0].ravel(), noise[0, :, 1:, 0].ravel())[0, 1]
    assert neighbours > 0.5
