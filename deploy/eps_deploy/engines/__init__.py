"""Inference engines, one module each, all with the interface of :mod:`eps_deploy.engines.base`."""
