"""The monitor: reads the loss curves of a training run and says what they mean."""

from .findings import Finding
from .health import Diagnosis, diagnose
from .history import History
from .monitor import Monitor
from .readers import read_history
from .settings import Settings

__all__ = ["Diagnosis", "Finding", "History", "Monitor", "Settings", "diagnose", "read_history"]
