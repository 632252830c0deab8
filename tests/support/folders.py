"""Files of a run's folder, compared."""

import hashlib
from pathlib import Path

from dpo_lightning.processes.ownership import LOCK_FILE, OWNER_FILE


def hashes(folder: Path) -> dict[str, str]:
    """Content of each file, but for those by which a process holds the folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (LOCK_FILE, OWNER_FILE)
    }
