"""Grids of experiments: cells of options, each pretrained, embedded and probed, and their table."""
