"""ONNX in, ONNX out: the canonical form, typed casts, Q/DQ dialects, checks and MACs. onnx + NumPy only, no torch, no vendor's runtime.

Every function leaves its argument as it was and returns a new model.
"""

OPSET = 21  # of ONNX files, unless the recipe says another (`export.opset`); here, so that checking a recipe loads no onnx
