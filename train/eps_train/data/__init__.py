"""Data sets, images and batches."""
