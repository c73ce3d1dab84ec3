"""Scoring: documents to windows, windows to batches, batches to values of each token, over ranks
and kills.
"""
