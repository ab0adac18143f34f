"""Adapters of `BlockPruner` to training frameworks; each needs the package of its name."""
