"""Preference models, reward models and judges: the probability that one response is preferred to another.

transformers is imported when a model is made or loaded, not with this package: a judge that is a function needs none.
"""

from .judges import (
    AverageJudge,
    CheckedJudge,
    Judge,
    JudgeError,
    PreferenceModelJudge,
    RewardJudge,
    check_antisymmetry,
    checked,
)
from .measures import Bin, Evaluation, evaluate, reliability
from .models import ComparisonModel, PairwisePreferenceModel, RewardModel
from .storage import load_preference_model, save_preference_model
from .template import InputFormat
from .training import PreferenceTraining, TrainingReport, train_preference_model

__all__ = [
    "AverageJudge",
    "Bin",
    "CheckedJudge",
    "ComparisonModel",
    "Evaluation",
    "InputFormat",
    "Judge",
    "JudgeError",
    "PairwisePreferenceModel",
    "PreferenceModelJudge",
    "PreferenceTraining",
    "RewardJudge",
    "RewardModel",
    "TrainingReport",
    "check_antisymmetry",
    "checked",
    "evaluate",
    "load_preference_model",
    "reliability",
    "save_preference_model",
    "train_preference_model",
]
