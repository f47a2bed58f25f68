"""ONNX in, ONNX out: the canonical form, typed casts, Q/DQ dialects, checks and MACs. onnx + NumPy only, no torch, no runtime.

Every function leaves its argument as it was and returns a new model.
"""
