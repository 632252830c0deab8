"""The log file of a run whose folder goes away."""

import logging
import shutil

from dpo_lightning.tracking.terminal import LogFile


def test_a_log_whose_folder_is_gone_says_so_once_and_raises_nothing(tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    log = logging.Logger("alone")
    log.addHandler(LogFile(folder / "train.log", delay=True))
    shutil.rmtree(folder)
    log.info("one")
    log.info("two")
    said = capsys.readouterr().err
    assert said.count("train.log cannot be written: No such file or directory") == 1
