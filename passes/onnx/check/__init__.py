"""In: an ONNX file and its model. Out: how far the file's outputs are from PyTorch's, by each route."""
