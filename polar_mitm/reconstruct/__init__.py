"""From recorded calls to training trajectories: `build(calls, rollout=...)`, pure and order-free."""

from polar_mitm.reconstruct.build import build
from polar_mitm.reconstruct.records import BuildReport, CallSpan, MaskReason, QuarantineReason, Trajectory

__all__ = ["BuildReport", "CallSpan", "MaskReason", "QuarantineReason", "Trajectory", "build"]
