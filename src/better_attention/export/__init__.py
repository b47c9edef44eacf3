"""Models on their way to other runtimes: ONNX with a check of parity, int8 with a check of agreement."""
