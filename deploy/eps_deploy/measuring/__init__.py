"""What is measured of an engine: parity, accuracy, latency, and what else the machine did."""
