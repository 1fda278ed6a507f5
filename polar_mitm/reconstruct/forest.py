"""Which call continues which: the ids decide.

The parent of a call is the call whose cumulative ids (prompt + completion) are the longest proper prefix of
its prompt. Recorded lineage only chooses between calls whose cumulative ids are equal, and is evidence that
the thread of a delivered answer went on where the ids did not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from polar_mitm.columns import NO_BASE, RolloutColumns
from polar_mitm.reconstruct.tokens import Tokens
from polar_mitm.reconstruct.trie import ROOT, Trie

NO_PARENT = -1
_ROOT_ROLES = ("auxiliary", "compaction")
_GUESSED = "ambiguous"  # the fallback with which lineage names one of several calls


@dataclass(slots=True)
class Forest:
    """`rows` are the admitted calls by start, then by id. By row of the columns: the row of its `parent` or
    NO_PARENT, and whether it is an `orphan`; what these say of other rows means nothing. `leaves` are the
    rows that no call continues, live ones before orphans.
    """

    rows: list[int]
    parent: list[int]
    orphan: list[bool]
    leaves: list[int]


def grow(columns: RolloutColumns, tokens: Tokens, admitted: Sequence[int]) -> Forest:
    """The forest of the `admitted` rows. Auxiliary calls and compactions stay alone."""
    rows = sorted(admitted, key=lambda row: (columns.started_at[row], columns.call_ids[row]))
    trie, prompts, ends = _plant(tokens)
    parent = _link(columns, rows, trie, prompts, ends)
    extended = {parent[row] for row in rows}
    orphan = _mark_orphans(columns, rows, prompts, extended)
    leaves = [row for row in rows if row not in extended]
    leaves.sort(key=orphan.__getitem__)
    return Forest(rows, parent, orphan, leaves)


def _plant(tokens: Tokens) -> tuple[Trie, list[int], list[int]]:
    """The trie of all whole calls, and by row the nodes where their prompts and their completions end."""
    trie = Trie()
    prompts = [ROOT] * len(tokens.base)
    ends = [ROOT] * len(tokens.base)
    suffix, suffix_at = tokens.suffix, tokens.suffix_at
    completion, completion_at = tokens.completion, tokens.completion_at
    for row in tokens.order:
        base = tokens.base[row]
        node = ROOT if base == NO_BASE else trie.above(ends[base], tokens.shared[row])
        node = prompts[row] = trie.insert(node, suffix, suffix_at[row], suffix_at[row + 1])
        ends[row] = trie.insert(node, completion, completion_at[row], completion_at[row + 1])
    return trie, prompts, ends


def _link(
    columns: RolloutColumns, rows: Sequence[int], trie: Trie, prompts: Sequence[int], ends: Sequence[int]
) -> list[int]:
    tree = [row for row in rows if columns.role[row] not in _ROOT_ROLES]
    ending: dict[int, list[int]] = {}
    for row in tree:
        ending.setdefault(ends[row], []).append(row)
    nearest = {ROOT: ROOT}  # node to the first at or above it where a call ends, or the root
    parent = [NO_PARENT] * len(columns)
    for row in tree:
        node, passed = trie.parent[prompts[row]], []
        while node not in nearest and node not in ending:
            passed.append(node)
            node = trie.parent[node]
        node = nearest.get(node, node)
        nearest.update(dict.fromkeys(passed, node))
        if candidates := ending.get(node):
            parent[row] = candidates[0] if len(candidates) == 1 else _likeliest(columns, row, candidates)
    return parent


def _likeliest(columns: RolloutColumns, row: int, candidates: Sequence[int]) -> int:
    """Which of the calls with equal cumulative ids `row` continues; the first of the best."""
    named = columns.parent_call_id[row]
    return min(candidates, key=lambda c: (columns.call_ids[c] != named, not columns.delivered[c]))


def _mark_orphans(
    columns: RolloutColumns, rows: Sequence[int], prompts: Sequence[int], extended: set[int]
) -> list[bool]:
    """Among calls of one agent and role with identical prompts, those that did not live on.

    Alive are those whose thread went on: the extended ones, and the delivered ones that a call names as its
    parent. Where there is none, the delivered ones; where none was either, the last one started, since each
    retry gave up on the answer before it. A call with a prompt of its own is alive.
    """
    named = {columns.parent_call_id[row] for row in rows if columns.fallback[row] != _GUESSED}

    def went_on(row: int) -> bool:
        return columns.delivered[row] and columns.call_ids[row] in named

    siblings: dict[tuple[str, str | None, int], list[int]] = {}
    for row in rows:
        who = columns.role[row], columns.agent_id[row]
        siblings.setdefault((*who, prompts[row]), []).append(row)
    orphan = [False] * len(columns)
    for group in siblings.values():
        if len(group) > 1:
            alive = (
                {row for row in group if row in extended or went_on(row)}
                or {row for row in group if columns.delivered[row]}
                or {group[-1]}
            )
            for row in group:
                orphan[row] = row not in alive
    return orphan
