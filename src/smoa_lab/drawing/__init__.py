"""Plots, HTML pages, and tables in Markdown."""
