"""Evaluation of a causal language model on text: its perplexity, and how far to trust it."""

from ..models.language_model import Head, LanguageModel
from ..text.documents import Document
from ..text.readers import ReadOptions, read_documents
from ..text.tokenizers import Tokenizer
from .comparison import Comparison, compare
from .contexts import evaluate_contexts
from .evaluator import Progress, evaluate
from .many import ManyComparison
from .model_comparison import ModelComparison, compare_models
from .results import DocumentScore, Evaluation, read_result

__all__ = [
    "Comparison",
    "Document",
    "DocumentScore",
    "Evaluation",
    "Head",
    "LanguageModel",
    "ManyComparison",
    "ModelComparison",
    "Progress",
    "ReadOptions",
    "Tokenizer",
    "compare",
    "compare_models",
    "evaluate",
    "evaluate_contexts",
    "read_documents",
    "read_result",
]
