"""From an adapter to a model of its own: merging, and the check that the merged model says what the adapter said."""

from .merge import MergeCheckError, MergeReport, merge_adapter

__all__ = ["MergeCheckError", "MergeReport", "merge_adapter"]
