"""These live in polar_mitm.conformance now; import them from there."""

from polar_mitm.conformance.scripts import (
    Answer,
    Script,
    always,
    sequence,
    shell_call,
    write_file_in_two_turns,
)

__all__ = ["Answer", "Script", "always", "sequence", "shell_call", "write_file_in_two_turns"]
