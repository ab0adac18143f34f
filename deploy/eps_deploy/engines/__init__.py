"""Inference engines: ONNX Runtime and TensorRT, with one interface (`engines.base`)."""
