"""The folders of runs and sweeps: one that nothing else has, and the one to go on in."""

from pathlib import Path

import pytest
from hydra.core.utils import setup_globals
from omegaconf import DictConfig, OmegaConf

from dpo_lightning.errors import UserError
from dpo_lightning.settings.folders import prepare_folder, refuse_links, resumed_sweep


def config(folder: Path, *, fixed: bool = False) -> DictConfig:
    """Hydra's node with both folders, made from the time unless they are fixed."""
    setup_globals()
    name = str(folder) if fixed else f"{folder}/${{now:%Y}}"
    return OmegaConf.create({"hydra": {"run": {"dir": name}, "sweep": {"dir": name}}})


def test_the_last_sweep_is_the_one_of_the_latest_date(tmp_path):
    for date in ("2026-01-02", "2026-03-01", "2025-12-31"):
        (tmp_path / date).mkdir()
        (tmp_path / date / "multirun.yaml").touch()
    (tmp_path / "2027-01-01").mkdir()  # it has not begun
    assert resumed_sweep("last", config(tmp_path)) == tmp_path / "2026-03-01"
    assert resumed_sweep(str(tmp_path / "2025-12-31"), config(tmp_path)).name == "2025-12-31"


@pytest.mark.parametrize(
    ("wanted", "fixed", "said"),
    [
        ("last", False, "there is no sweep in"),
        ("nowhere", False, "sweep.resume=nowhere: no such folder"),
        ("last", True, "both name a folder"),
    ],
)
def test_a_sweep_that_cannot_be_gone_on_with_is_said(tmp_path, wanted, fixed, said):
    with pytest.raises(UserError, match=said):
        resumed_sweep(wanted, config(tmp_path, fixed=fixed))


def test_a_folder_that_time_names_is_made_anew_and_a_fixed_one_is_left(tmp_path):
    names = []
    for _ in range(3):
        folder, overrides = prepare_folder(config(tmp_path), "run.dir")
        assert folder.is_dir()
        assert overrides == [f"hydra.run.dir='{folder}'"]
        names.append(folder.name)
    assert names[1:] == [f"{names[0]}-2", f"{names[0]}-3"]
    fixed = tmp_path / "mine"
    assert prepare_folder(config(fixed, fixed=True), "run.dir") == (fixed, [])
    assert not fixed.exists()


def test_ranks_that_something_else_starts_need_a_fixed_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match="must agree on one folder"):
        prepare_folder(config(tmp_path), "run.dir")
    prepare_folder(config(tmp_path, fixed=True), "run.dir")


@pytest.mark.parametrize("inside", ["", "checkpoints", ".hydra", "csv"])
def test_a_link_in_what_is_written_by_name_is_refused(tmp_path, inside):
    real = tmp_path / "real"
    (real / inside).mkdir(parents=True)
    (tmp_path / "run").symlink_to(real)
    refuse_links(tmp_path / "run")  # whoever named it chose where it leads
    (real / inside / "metrics.jsonl").symlink_to("/elsewhere")
    with pytest.raises(UserError, match="a symbolic link to /elsewhere"):
        refuse_links(tmp_path / "run")
