"""Whether a harness works here: a scripted engine, scenarios for it, and what came of each (../README.md)."""
