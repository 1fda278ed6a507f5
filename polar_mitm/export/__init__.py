"""A store's content for other programs: our own Parquet files, and what other trainers read."""

from polar_mitm.export.chat import export_nemo_gym, export_sft_chat
from polar_mitm.export.parquet import CALLS, TRAJECTORIES, export_calls, export_trajectories
from polar_mitm.export.trainers import TRL, VERL, Judged, export_trl, export_verl

__all__ = [
    "CALLS",
    "TRAJECTORIES",
    "TRL",
    "VERL",
    "Judged",
    "export_calls",
    "export_nemo_gym",
    "export_sft_chat",
    "export_trajectories",
    "export_trl",
    "export_verl",
]
