"""The experiment on cyclic preferences, with answers out of a few candidates: every expectation is exact."""

from .pipeline import CandidateExperiment
from .presets import CANDIDATE_PRESETS, CandidatePreset
from .report import write_report

__all__ = ["CANDIDATE_PRESETS", "CandidateExperiment", "CandidatePreset", "write_report"]
