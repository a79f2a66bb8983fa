"""The embedded store as SQL: its schema, the fence, and positions that only rise."""

from __future__ import annotations

# Raised with every change of the schema: a file of another version is refused.
SCHEMA_VERSION = 3

# The user comes first in the key: rows of one user are together, which makes erasing one user a short walk.
SCHEMA = """
CREATE TABLE rows (
    user_id TEXT NOT NULL, checkpoint_id TEXT NOT NULL,
    epoch INTEGER NOT NULL, "offset" INTEGER NOT NULL, revision INTEGER NOT NULL, partition INTEGER NOT NULL,
    folded BLOB NOT NULL, recent BLOB NOT NULL, written_ms INTEGER NOT NULL,
    PRIMARY KEY (user_id, checkpoint_id));
CREATE TABLE positions (
    checkpoint_id TEXT NOT NULL, partition INTEGER NOT NULL, epoch INTEGER NOT NULL, "offset" INTEGER NOT NULL,
    PRIMARY KEY (checkpoint_id, partition));
CREATE TABLE logs (
    checkpoint_id TEXT NOT NULL, epoch INTEGER NOT NULL, log TEXT NOT NULL, PRIMARY KEY (checkpoint_id, epoch));
CREATE TABLE backfills (checkpoint_id TEXT NOT NULL PRIMARY KEY, record TEXT NOT NULL);
"""

# The fence is the WHERE clause: compared and written in one statement.
PUT_FIRST = """
INSERT INTO rows VALUES (:user_id, :checkpoint_id, :epoch, :offset, :revision, :partition, :folded, :recent, :now_ms)
ON CONFLICT DO UPDATE SET epoch = :epoch, "offset" = :offset, revision = :revision, partition = :partition,
    folded = :folded, recent = :recent, written_ms = :now_ms
WHERE rows.written_ms <= :expired_ms OR (rows.epoch, rows."offset", rows.revision) < (:epoch, :offset, :revision)
"""
IS_FOLLOWED = """ AND (rows.epoch, rows."offset", rows.revision, rows.partition)
    = (:follows_epoch, :follows_offset, :follows_revision, :follows_partition)
"""
PUT_NEXT = f"""
UPDATE rows SET epoch = :epoch, "offset" = :offset, revision = :revision, partition = :partition,
    folded = coalesce(:folded, folded), recent = :recent, written_ms = :now_ms
WHERE user_id = :user_id AND checkpoint_id = :checkpoint_id AND written_ms > :expired_ms
    AND (epoch, "offset", revision) < (:epoch, :offset, :revision) {IS_FOLLOWED}
"""
DELETE_ROW = """
DELETE FROM rows WHERE (user_id, checkpoint_id, epoch, "offset", revision, partition) = (?, ?, ?, ?, ?, ?)
"""
COMMIT_POSITION = """
INSERT INTO positions VALUES (?, ?, ?, ?)
ON CONFLICT DO UPDATE SET epoch = excluded.epoch, "offset" = excluded."offset"
WHERE (excluded.epoch, excluded."offset") > (positions.epoch, positions."offset")
"""
