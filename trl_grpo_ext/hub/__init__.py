"""The Hub: pushing adapters with a model card and the run's config, and loading what describes a run.

Nothing here is needed to train; `GRPOTrainer` takes its pushing from `publishing.py`.
"""

from .push import UploadError, push_adapter, push_command
from .run_config import load_run_config, run_adapter, run_arguments, run_quantization

__all__ = [
    "UploadError",
    "load_run_config",
    "push_adapter",
    "push_command",
    "run_adapter",
    "run_arguments",
    "run_quantization",
]
