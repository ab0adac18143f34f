"""Shared foundation of the eps-resnet packages. Only `checksummed` imports torch."""
