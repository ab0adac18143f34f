"""ONNX files in the precision that they will run in."""
