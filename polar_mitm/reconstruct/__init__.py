"""From recorded calls to training trajectories: `build(calls, rollout=...)`, pure and order-free."""

from polar_mitm.reconstruct.build import build
from polar_mitm.reconstruct.recorded import columns_of
from polar_mitm.reconstruct.records import (
    Builder,
    BuildReport,
    CallSpan,
    MaskReason,
    QuarantineReason,
    Trajectory,
)

__all__ = [
    "BuildReport",
    "Builder",
    "CallSpan",
    "MaskReason",
    "QuarantineReason",
    "Trajectory",
    "build",
    "columns_of",
]
