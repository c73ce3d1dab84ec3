"""The monitor: reads the loss curves of a training run and says what they mean."""

from .health import Diagnosis, diagnose
from .history import History, read_history
from .monitor import Monitor
from .settings import Settings
from .signals import Finding

__all__ = ["Diagnosis", "Finding", "History", "Monitor", "Settings", "diagnose", "read_history"]
