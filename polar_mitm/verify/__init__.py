"""The proof: trajectories hold the ids of their calls, and score again as they were sampled."""

from polar_mitm.verify.context import Difference
from polar_mitm.verify.drift import Drift
from polar_mitm.verify.engine import EngineScorer
from polar_mitm.verify.records import Sampled, sampled, weights_name
from polar_mitm.verify.report import CallDrift, Outlier, RolloutReport, examine
from polar_mitm.verify.score import Scorer, Unscorable, score

__all__ = [
    "CallDrift",
    "Difference",
    "Drift",
    "EngineScorer",
    "Outlier",
    "RolloutReport",
    "Sampled",
    "Scorer",
    "Unscorable",
    "examine",
    "sampled",
    "score",
    "weights_name",
]
