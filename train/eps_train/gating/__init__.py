"""Gates: inserting, judging and removing residual blocks."""
