"""Serves many adapters over one base: a pool of stacked factors, and a plugin for vLLM."""
