"""From a trained network to an ONNX file in the precision that it will run in."""
