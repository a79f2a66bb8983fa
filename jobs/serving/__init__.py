"""`vql serve`: the ranking worker over HTTP."""
