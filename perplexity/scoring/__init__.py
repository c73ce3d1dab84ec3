"""Scoring of documents: windows, batches, values of each token, over ranks and resumed runs."""
