"""Shared foundation of the eps-resnet packages; imports no torch."""
