"""The experiment on tastes that run in circles, with answers out of a few candidates: every number exact."""

from .pipeline import CandidateExperiment
from .presets import CANDIDATE_PRESETS, CandidatePreset
from .report import write_report

__all__ = ["CANDIDATE_PRESETS", "CandidateExperiment", "CandidatePreset", "write_report"]
