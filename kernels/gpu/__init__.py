"""Triton alone: one file a kernel, with its launcher; what a launch is and which tiles a launch
takes.
"""
