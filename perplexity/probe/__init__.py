"""Beyond perplexity: what a model writes, whether others find it good, and whether it knows what it knows."""

from .ask import Answer, Questioner
from .prober import Probe, probe
from .prompts import Prompt, read_prompts
from .scores import Checkpoint, Health, Part, Scorer, health
from .settings import GenerationSettings

__all__ = [
    "Answer",
    "Checkpoint",
    "GenerationSettings",
    "Health",
    "Part",
    "Probe",
    "Prompt",
    "Questioner",
    "Scorer",
    "health",
    "probe",
    "read_prompts",
]
