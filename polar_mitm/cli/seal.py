"""`polar-mitm seal`: from here on, a rollout's record cannot change unnoticed."""

from __future__ import annotations

from typing import Annotated

import typer

from polar_mitm.cli.output import JsonFlag, plural, print_json, say, tell
from polar_mitm.cli.reading import StoreOption, chosen, reading

EXAMPLES = (
    "$ polar-mitm seal 7Q2ZK8 -s runs.duckdb\n\n"
    "$ polar-mitm verify runs.duckdb --rollout 7Q2ZK8 --seal  # names the first record that was changed"
)


def seal(
    rollout: Annotated[str, typer.Argument(metavar="ROLLOUT", help="A rollout's id, or the end of one.")],
    store: StoreOption,
    json: JsonFlag = False,
) -> None:
    """Seal a rollout: chain a digest over all its records.

    Over the rollout itself, its calls in order with wire, tokens and logprobs,
    its rewards, and what it was refused. Nothing is added to a sealed rollout
    any more. Whoever can write the file could seal it anew: keep the printed
    digest elsewhere to notice that, too. Not while a capture runs.
    """
    from polar_mitm.store.seal import seal_rollout

    with reading(store) as reader:
        (found,) = chosen(reader, rollout)
    made = seal_rollout(store, found.rollout_id)
    if json:
        print_json(made)
        return
    tell(made.digest)
    say(f"rollout {made.rollout_id} is sealed, {plural(made.num_records, 'record')}: keep the digest")
