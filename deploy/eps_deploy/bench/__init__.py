"""`eps-bench`: honest latency of any model files, side by side."""
