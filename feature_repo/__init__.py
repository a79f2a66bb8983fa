"""The online store of caches: its promise (`store`), what keeps it (`sqlite_store`), Feast's view of it, the reader."""
