"""A process that is killed at any moment has stored every call whose future said so."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from polar_mitm.store import Recorder, open_reader
from tests.store.calls import call, python

WRITER = """
import sys, threading
from pathlib import Path
from polar_mitm.store import Recorder, writer
from tests.store.calls import call
writer._MAX_WAL_BYTES = int(sys.argv[3])  # small: checkpoints all the time
lock = threading.Lock()
def done(name):
    def tell(future):
        with lock:
            print(name, future.result(), flush=True)
    return tell
recorder = Recorder(Path(sys.argv[1]))
recorder.open()
prompt, waiting = list(range(100)), []
for i in range(int(sys.argv[2]), 10**9):
    future = recorder.call(call(f"c{i:08}", prompt + [i], [1, 2, i], seq=i))
    future.add_done_callback(done(f"c{i:08}"))
    waiting.append(future)
    if len(waiting) > 30:
        waiting.pop(0).result()
"""


@pytest.mark.parametrize("wal_bytes", [30_000, 64 << 20])
def test_kill_9(tmp_path: Path, wal_bytes: int) -> None:
    path = tmp_path / "s.duckdb"
    chance = random.Random(wal_bytes)
    promised: list[str] = []
    for attempt in range(3):
        process = python(WRITER, path, attempt * 1_000_000, wal_bytes)
        assert process.stdout
        try:
            promised.append(process.stdout.readline().split()[0])
            time.sleep(chance.uniform(0, 0.7))
        finally:  # it writes for ever
            process.kill()
        rest = process.stdout.read()
        process.wait()
        lines = [line.split() for line in rest.splitlines() if line.endswith("True")]
        assert "False" not in rest
        promised += [name for name, _ in lines]
        with open_reader(path) as reader:  # reads the log of the dead process
            found = {c.call_id: c for c in reader.calls()}
        assert set(promised) <= set(found)
        for name, c in found.items():
            number = int(name[1:])
            assert c.prompt_token_ids == [*range(100), number] and c.completion_token_ids == [1, 2, number]
    assert len(promised) > 3
    with Recorder(path, share=False) as recorder:
        assert recorder.call(call("last", [*range(100), 1], [9])).result()
    with open_reader(path) as reader:
        assert {c.call_id for c in reader.calls()} == {*found, "last"}
