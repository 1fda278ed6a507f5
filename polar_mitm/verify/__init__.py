"""The proof: trajectories hold the ids of their calls, and score again as they were sampled."""

from polar_mitm.verify.context import Difference
from polar_mitm.verify.drift import Drift
from polar_mitm.verify.engine import EngineScorer
from polar_mitm.verify.process import ProcessScorer
from polar_mitm.verify.records import Path, Sampled, sampled, weights_name
from polar_mitm.verify.report import Account, CallDrift, Examination, Outlier, RolloutReport
from polar_mitm.verify.score import Scorer, Unscorable, score

__all__ = [
    "Account",
    "CallDrift",
    "Difference",
    "Drift",
    "EngineScorer",
    "Examination",
    "Outlier",
    "Path",
    "ProcessScorer",
    "RolloutReport",
    "Sampled",
    "Scorer",
    "Unscorable",
    "sampled",
    "score",
    "weights_name",
]
