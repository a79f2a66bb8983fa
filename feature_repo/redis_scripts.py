"""What Redis itself does in one step: the Lua scripts of the fence, of positions and of deletions.

A script runs alone in the server, so what it compares is still so when it writes. All keys of a script have one hash
tag. Stamps are digits of fixed width (`redis_store.packed_stamp`), so that they compare as text.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

GENERATION, CHECKPOINTS = b"vql:{meta}:generation", b"vql:{meta}:checkpoints"
# Digits of a packed stamp that order it: epoch, offset, revision. The partition follows.
ORDERED_DIGITS = 39


@dataclass(frozen=True, slots=True)
class Script:
    """A script and the name by which a server that has it is told to run it."""

    text: str
    sha: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sha", hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest())


# KEYS: the index of users, then the rows. ARGV: time to live (ms, 0 none), length of the rows' common prefix, then for
# each row: how, stamp, follows, recent, and folded unless how is "part". The index has each user at the time when the
# row expires, so that the users of a checkpoint can be counted and found.
PUT_ROWS = Script(f"""
local index, ttl_ms, prefix = KEYS[1], tonumber(ARGV[1]), tonumber(ARGV[2])
local done, a, expires_ms = {{}}, 3, '+inf'
if ttl_ms > 0 then
    local time = redis.call('TIME')
    local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
    expires_ms = string.format('%.0f', now_ms + ttl_ms)
    local gone = redis.call('ZRANGEBYSCORE', index, '-inf', string.format('(%.0f', now_ms), 'LIMIT', 0, 100)
    if #gone > 0 then redis.call('ZREM', index, unpack(gone)) end
end
for k = 2, #KEYS do
    local key, how, stamp, follows = KEYS[k], ARGV[a], ARGV[a + 1], ARGV[a + 2]
    local stored = redis.call('HGET', key, 's')
    local follows_it = how == 'any' or (how == 'first' and not stored) or stored == follows
    local newer = not stored or string.sub(stamp, 1, {ORDERED_DIGITS}) > string.sub(stored, 1, {ORDERED_DIGITS})
    if follows_it and newer then
        if how == 'part' then
            redis.call('HSET', key, 's', stamp, 'r', ARGV[a + 3])
        else
            redis.call('HSET', key, 's', stamp, 'r', ARGV[a + 3], 'f', ARGV[a + 4])
        end
        if ttl_ms > 0 then
            redis.call('PEXPIREAT', key, expires_ms)
            redis.call('ZADD', index, expires_ms, string.sub(key, prefix + 1))
        elseif not stored or redis.call('PERSIST', key) == 1 then
            redis.call('ZADD', index, '+inf', string.sub(key, prefix + 1))
        end
        done[k - 1] = '1'
    else
        done[k - 1] = '0'
    end
    a = a + (how == 'part' and 4 or 5)
end
return table.concat(done)
""")

# KEYS: the index, the row. ARGV: the user, and the stamp that the row must have; without it, any.
DELETE_ROW = Script("""
local stored = redis.call('HGET', KEYS[2], 's')
if ARGV[2] and stored and stored ~= ARGV[2] then return 0 end
redis.call('ZREM', KEYS[1], ARGV[1])
return redis.call('DEL', KEYS[2])
""")

# KEYS: the index. ARGV: the rows' common prefix, how many at most. Answers how many users, and how many had a row.
DELETE_SOME = Script("""
local users = redis.call('ZRANGE', KEYS[1], 0, tonumber(ARGV[2]) - 1)
if #users == 0 then return {0, 0} end
local keys = {}
for n = 1, #users do keys[n] = ARGV[1] .. users[n] end
redis.call('ZREM', KEYS[1], unpack(users))
return {#users, redis.call('DEL', unpack(keys))}
""")

# A writer's tally counts its puts, in the store itself. Each of these is refused (0) where the store is another
# generation than the writer's, or where it has lost puts that it had acknowledged.
_UNLESS_LOST = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
local tally = tonumber(redis.call('GET', KEYS[2]) or -1)
if tally < tonumber(ARGV[2]) then return 0 end
"""

# KEYS: the generation, the tally. ARGV: the generation, puts before this one, seconds to keep the tally.
# A tally that is one ahead counted this put already, and lost only its answer.
TALLY = Script(f"""{_UNLESS_LOST}
redis.call('SET', KEYS[2], ARGV[2] + 1, 'EX', ARGV[3])
return 1
""")

# KEYS: the generation, the tally, the positions. ARGV: the generation, puts so far, epoch, then partition and offset
# of each.
COMMIT_POSITIONS = Script(f"""{_UNLESS_LOST}
local epoch = tonumber(ARGV[3])
for a = 4, #ARGV, 2 do
    local stored = redis.call('HGET', KEYS[3], ARGV[a])
    local old_epoch, old_offset = string.match(stored or '', '^(%d+) (-?%d+)$')
    old_epoch, old_offset = tonumber(old_epoch or -1), tonumber(old_offset or -1)
    if epoch > old_epoch or (epoch == old_epoch and tonumber(ARGV[a + 1]) > old_offset) then
        redis.call('HSET', KEYS[3], ARGV[a], ARGV[3] .. ' ' .. ARGV[a + 1])
    end
end
return 1
""")

# KEYS: the generation, the tally, the record. ARGV: the generation, puts so far, the record.
RECORD_BACKFILL = Script(f"""{_UNLESS_LOST}
redis.call('SET', KEYS[3], ARGV[3])
return 1
""")

SCRIPTS = (PUT_ROWS, DELETE_ROW, DELETE_SOME, TALLY, COMMIT_POSITIONS, RECORD_BACKFILL)
