"""The folders of runs and sweeps: under a name of their own before Hydra makes anything."""

import itertools
import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dpo_lightning.errors import UserError
from dpo_lightning.settings.credentials import is_secret_text, refusal
from dpo_lightning.settings.overrides import hydra_error

CACHE_VARIABLE = "DPO_LIGHTNING_CACHE"
_CACHE_DIR = "outputs/cache"

# Folders inside a run's whose files are written by name.
_WRITTEN_INTO = ("checkpoints", ".hydra", "csv")


def cache_folder(named: str | None) -> Path:
    """Folder of what is kept for all runs.

    Args:
        named: ``reference.cache_dir``.
    """
    return Path(named or os.environ.get(CACHE_VARIABLE) or _CACHE_DIR).expanduser()


def is_fixed(cfg: DictConfig, key: str) -> bool:
    """True if ``hydra.<key>`` is the same at every start, and not one made from the time."""
    section, _, name = key.partition(".")
    unresolved = OmegaConf.to_container(cfg.hydra[section], resolve=False)
    assert isinstance(unresolved, dict)
    return "${now" not in str(unresolved[name])


def prepare_folder(cfg: DictConfig, key: str) -> tuple[Path, list[str]]:
    """Checks ``hydra.<key>``; makes it, under a name that nothing else has, where time names it.

    Args:
        cfg: The config, as Hydra composed it.
        key: ``run.dir`` or ``sweep.dir``.

    Returns:
        The folder, and the overrides that give it to Hydra.

    Raises:
        UserError: If it cannot be a folder, or ranks would each make their own.
    """
    try:
        named = str(OmegaConf.select(cfg.hydra, key) or "")
    except OmegaConfBaseException as error:
        raise UserError(hydra_error(error)) from error
    if not named:
        raise UserError(f"hydra.{key}= has no value: must be a folder")
    if is_secret_text(named):  # out of a variable of the environment; what is typed was judged
        raise UserError(refusal(f"hydra.{key}"))
    if Path(named).is_file():
        raise UserError(f"hydra.{key}={named} is a file; must be a folder")
    if is_fixed(cfg, key):
        refuse_links(Path(named))
        return Path(named), []
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "LOCAL_RANK" in os.environ:
        raise UserError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: processes that something else starts must "
            f"agree on one folder; name it with hydra.{key}=<folder>"
        )
    # Another start of the same second may have taken it.
    for number in itertools.count(1):
        folder = Path(named if number == 1 else f"{named}-{number}")
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(cannot_write(error, key)) from error
    return folder, [hydra_override(key, folder)]


def refuse_links(folder: Path) -> None:
    """Refuses a folder in which a link would lead what is written into it elsewhere.

    The folder itself may be one: whoever named it chose where it leads. wandb makes links of its
    own, inside a folder of its own.

    Args:
        folder: Of a run or a sweep; it need not exist.

    Raises:
        UserError: If it, or a folder of checkpoints or settings in it, holds a symbolic link.
    """
    for part in (folder, *(folder / name for name in _WRITTEN_INTO)):
        try:
            links = sorted(path for path in part.iterdir() if path.is_symlink())
        except OSError:
            continue  # not there, or not a folder; those who write it will tell
        if links:
            raise UserError(
                f"{links[0]}: a symbolic link to {links[0].readlink()}, and a run writes inside "
                "its own folder alone; take the link away, or name another folder"
            )


def resumed_sweep(wanted: str, cfg: DictConfig) -> Path:
    """The folder that ``sweep.resume`` names: ``last`` or a path.

    Raises:
        UserError: If there is none, or ``hydra.sweep.dir`` names one too.
    """
    if is_fixed(cfg, "sweep.dir"):
        raise UserError(
            f"sweep.resume={wanted} and hydra.sweep.dir={cfg.hydra.sweep.dir} both name a folder; "
            "the second alone does"
        )
    if wanted == "last":
        parent = Path(str(cfg.hydra.sweep.dir)).parent
        # Their names begin with the date.
        sweeps = sorted(path.parent for path in parent.glob("*/multirun.yaml"))
        if not sweeps:
            raise UserError(f"sweep.resume=last: there is no sweep in {parent} yet; leave it out")
        return sweeps[-1]
    folder = Path(wanted).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"sweep.resume={wanted}: no such folder, seen from {Path.cwd()}; sweep.resume=last "
            "takes the newest"
        )
    return folder


def hydra_override(key: str, folder: Path) -> str:
    """The override that sets ``hydra.<key>`` to a folder, whatever its name holds."""
    escaped = str(folder).replace("\\", "\\\\").replace("'", "\\'")
    return f"hydra.{key}='{escaped}'"


def hydra_files(cfg: DictConfig, hydra: Any, subdir: str) -> dict[str, str]:
    """Hydra's record of a run: the files of ``.hydra`` by name, as Hydra itself writes them.

    Args:
        cfg: The settings.
        hydra: Hydra's own node.
        subdir: The folder's name, ``hydra.output_subdir``.
    """
    node = OmegaConf.to_container(hydra, resolve=False)
    assert isinstance(node, dict)
    own = OmegaConf.create({"hydra": node | {"output_subdir": subdir}})
    return {
        "config.yaml": OmegaConf.to_yaml(cfg),
        "hydra.yaml": OmegaConf.to_yaml(own),
        "overrides.yaml": OmegaConf.to_yaml(hydra.overrides.task),
    }


def cannot_write(error: OSError, key: str) -> str:
    """One line about a folder that could not be made."""
    return f"{error.filename}: {error.strerror}; name another folder, hydra.{key}=<folder>"
