"""TensorRT as an engine: building plans and running them, on TensorRT 10 and 11 alike."""
