"""Quantise an ONNX network by NNCF for OpenVINO's CPU plugin; `int8_speed.py` runs this in an environment that has NNCF.

python benchmarks/nncf_quantize.py MODEL.onnx IMAGES.npy OUT.xml     # IMAGES: float32 [n, C, H, W] in 0-1
"""

import json
import sys

import nncf
import numpy as np
import openvino


def main() -> None:
    source, images, target = sys.argv[1:]
    samples = [image[None] for image in np.load(images)]
    quantized = nncf.quantize(openvino.Core().read_model(source), nncf.Dataset(samples), subset_size=len(samples))
    openvino.save_model(quantized, target, compress_to_fp16=False)
    print(json.dumps({"nncf": nncf.__version__, "openvino": openvino.__version__}))


if __name__ == "__main__":
    main()
