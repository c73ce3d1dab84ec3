"""Triton code: one file per kernel, with its launcher, and the choice of tiles."""
