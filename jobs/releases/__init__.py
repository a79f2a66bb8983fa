"""Releases: which checkpoint rankers read, which were before it and may come after it."""
