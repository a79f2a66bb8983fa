"""The one file that `feast apply` executes: declares the checkpoints whose folders VQL_CHECKPOINTS lists.

    VQL_STATE=/srv/vql VQL_CHECKPOINTS=/srv/vql/a:/srv/vql/b feast apply

`feast apply` makes Feast's registry equal to what is declared here: a registered checkpoint that is not listed is
removed, and its rows with it.
"""

from __future__ import annotations

import os
from pathlib import Path

from feature_repo.views import declare
from models.checkpoint import open_checkpoint
from models.errors import InputError

paths = [Path(path) for path in os.environ.get("VQL_CHECKPOINTS", "").split(os.pathsep) if path]
if not paths:
    raise InputError(
        "VQL_CHECKPOINTS lists no checkpoint, so this would remove every view and its rows; "
        f"set it to the checkpoint folders, separated by {os.pathsep!r} (feast teardown removes all)"
    )
for path in paths:
    for thing in declare(open_checkpoint(path).checkpoint_id):
        # Feast collects the Feast objects among a module's names.
        globals()[f"{type(thing).__name__}_{thing.name}"] = thing
