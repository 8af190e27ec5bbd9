"""onnx.check."""
