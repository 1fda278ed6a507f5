"""The store: every intercepted call as a row of a DuckDB file, durable before its answer is let go.

One process writes (`Recorder`), any process reads (`open_reader`), also at the same time.
"""

from polar_mitm.store.reader import StoreReader, open_reader
from polar_mitm.store.recorder import Recorder

__all__ = ["Recorder", "StoreReader", "open_reader"]
