"""Forensic replay: a fresh run of a harness against the recorded answers, and where it differs. Pure."""

from polar_mitm.replay.compare import Divergence
from polar_mitm.replay.pacing import plan
from polar_mitm.replay.rules import RULES, Rule
from polar_mitm.replay.session import Replay, ReplayReport, Step

__all__ = ["RULES", "Divergence", "Replay", "ReplayReport", "Rule", "Step", "plan"]
