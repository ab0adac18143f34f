"""Inference engines: one module for each, all with the interface of :mod:`eps_deploy.engines.base`."""
