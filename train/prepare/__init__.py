"""Corpora to token files."""
