"""Evaluation of a causal language model on text: the perplexity number, and what it stands on."""

from .documents import Document, read_documents
from .results import DocumentScore, Evaluation
from .scoring import evaluate

__all__ = ["Document", "DocumentScore", "Evaluation", "evaluate", "read_documents"]
