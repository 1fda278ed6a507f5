"""Test doubles shared by the suites: a scripted engine, its tokenizer and its ready scripts."""
