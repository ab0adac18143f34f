"""Block importance, sweeps and fine-tuning."""
