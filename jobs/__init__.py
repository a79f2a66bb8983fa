"""The scheduled side: Spark jobs (ingest, train, encode items, backfill) and the command line `vql`.

A job takes values out, calls functions of `models`, and puts values back.
"""
