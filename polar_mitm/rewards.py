"""Verdicts: what a rollout's attempt at a task is worth. Functions and commands, on the host."""
