"""A rollout that goes on after its interceptor has ended: others may continue the calls in the store."""

from __future__ import annotations

import logging
from pathlib import Path

from polar_mitm.config import Settings
from polar_mitm.dialects.registry import DIALECTS
from polar_mitm.errors import PolarError, StoreError
from polar_mitm_addons.capture import Session

logger = logging.getLogger(__name__)


def restore(session: Session, path: Path, settings: Settings) -> None:
    """Fill a new session's lineage with the recorded calls. What cannot be read is not continued."""
    from polar_mitm.store import open_reader

    try:
        with open_reader(path) as store:
            calls = store.calls(session.rollout_id, wire=True)
    except StoreError as error:
        logger.warning("rollout %s goes on, and its earlier calls do not: %s", session.rollout_id, error)
        return
    for call in calls:
        session.seq = max(session.seq, call.seq + 1)
        dialect = DIALECTS.get(call.dialect)
        if call.status != "ok" or dialect is None:
            continue
        headers = {name.lower(): value for name, value in call.wire.request_headers}
        try:
            request = dialect.decode(call.wire.request_body, headers, call.wire.path)
        except PolarError as error:
            logger.warning("call %s cannot be continued: %s", call.call_id, error.message)
            continue
        # The rendering is not in the store; it is the prompt of a call that continued none.
        plain = call.continuation == "none" and not (
            settings.keep_reasoning == "always" and any(m.reasoning for m in request.messages)
        )
        session.lineage.add(call, request, None if plain else b"")
