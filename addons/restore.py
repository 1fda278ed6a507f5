"""A rollout that goes on after its interceptor has ended: others may continue the calls in the store."""

from __future__ import annotations

import logging
from pathlib import Path

from polar_mitm.errors import StoreError
from polar_mitm.lineage import asked
from polar_mitm_addons.capture import Session

logger = logging.getLogger(__name__)


def restore(session: Session, path: Path, tokenizer: str) -> None:
    """Fill a new session's lineage with the recorded calls. What cannot be read is not continued.

    `tokenizer` is the engine's; ids of another one are nothing to it.
    """
    from polar_mitm.store import open_reader

    try:
        with open_reader(path) as store:
            calls = store.calls(session.rollout_id, wire=True)
    except StoreError as error:
        logger.warning("rollout %s goes on, and its earlier calls do not: %s", session.rollout_id, error)
        return
    session.seq = max((call.seq + 1 for call in calls), default=0)
    session.lineage.restore(asked(calls, session.responses), tokenizer)
