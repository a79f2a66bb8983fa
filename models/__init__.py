"""The mathematics of the cache and of the ranker: torch, numpy and numba only.

Nothing here knows Beam, Spark or Feast; they all call it. Read `cache` first (the monoid), then `row`
(how a user's state is kept), `attention` (how it is read) and `ranker`.
"""
