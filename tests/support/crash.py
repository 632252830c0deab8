"""A run that dies, or finds no room, at a named point of the save of a step.

    python tests/support/crash.py <point> <step> <overrides of train.py …>

Nothing of this is in the product: the calls it makes are replaced here.
"""

import os
import resource
import shutil
import signal
import sys
from pathlib import Path

from dpo_lightning.cli import main
from dpo_lightning.training.checkpoints import files as checkpoints
from dpo_lightning.training.checkpoints.writer import _Hashed

POINTS = (
    "before writing",
    "first bytes",
    "half written",
    "before the sync",
    "before the rename",
    "after the rename",
    "in the manifest",
    "after the manifest",
    "before removing the old",
    "between the two files of the old",
)


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def of_step(path, step: int) -> bool:
    return f"step-{step:06d}" in Path(path).name


def arm(point: str, step: int) -> None:
    real_write, real_fsync = _Hashed.write, os.fsync
    real_replace, real_unlink = Path.replace, Path.unlink

    def write(self, data):
        name = Path(self._file.name)
        if of_step(name, step):
            if point == "before writing":
                die()
            count = real_write(self, data)
            if point == "first bytes" or (point == "half written" and self._bytes > 50_000):
                self._file.flush()
                die()
            return count
        return real_write(self, data)

    def fsync(handle):
        name = Path(f"/proc/self/fd/{handle}").readlink().name
        if of_step(name, step):
            if point == "before the sync" and ".ckpt" in name:
                die()
            if point == "in the manifest" and ".json" in name:
                die()
        return real_fsync(handle)

    def replace(self, target):
        if not of_step(target, step):
            return real_replace(self, target)
        is_manifest = Path(target).suffix == ".json"
        if point == "before the rename" and not is_manifest:
            die()
        found = real_replace(self, target)
        if point == ("after the manifest" if is_manifest else "after the rename"):
            die()
        return found

    def unlink(self, *args, **kwargs):
        saved = checkpoints.manifest_path(self.with_name(f"step-{step:06d}.ckpt")).exists()
        if self.name.startswith("step-") and saved:
            if point == "before removing the old":
                die()
            if point == "between the two files of the old" and self.suffix == ".json":
                die()
        return real_unlink(self, *args, **kwargs)

    for owner, call in ((_Hashed, write), (os, fsync), (Path, replace), (Path, unlink)):
        setattr(owner, call.__name__, call)


def limit(step: int, size: int) -> None:
    """Lets no file grow beyond a size from the save of a step on."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    real = shutil.disk_usage

    def disk_usage(path):
        if list(Path(path).glob(f"step-{step - 1:06d}.ckpt")) or step == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        return real(path)

    shutil.disk_usage = disk_usage


def believe_in_room() -> None:
    """Makes the preflight find room, as on a disk that others fill meanwhile."""
    real = shutil.disk_usage
    shutil.disk_usage = lambda path: real(path)._replace(free=1 << 60)


if __name__ == "__main__":
    point, step, *overrides = sys.argv[1:]
    if point in POINTS:
        arm(point, int(step))
    elif point == "limit":
        limit(int(step), 60_000)
    elif point == "believe in room":
        believe_in_room()
    sys.exit(main(overrides))
