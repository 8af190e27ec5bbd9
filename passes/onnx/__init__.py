"""In: a model. Out: an ONNX file with memory operators, the native library, and sessions that run both."""
