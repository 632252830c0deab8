"""Callbacks by name: Lightning's own by an allowlist, those of plugins, and their arguments."""

import lightning.pytorch.callbacks as library
import pytest

from dpo_lightning.errors import UserError
from dpo_lightning.plugins import CALLBACKS, register_callback
from dpo_lightning.training.library_callbacks import LIBRARY, REFUSED, make_all_callbacks


def test_each_callback_of_lightning_is_taken_or_refused_with_a_reason():
    assert sorted([*LIBRARY, *REFUSED]) == sorted(library.__all__)


@pytest.fixture
def bell():
    @register_callback("bell")
    class Bell:
        def __init__(self, volume: int = 1) -> None:
            self.volume = volume

    yield Bell
    CALLBACKS.pop("bell")


def test_callbacks_are_made_with_their_arguments(bell):
    stop = {"EarlyStopping": {"monitor": "eval/loss", "patience": 7}}
    made = make_all_callbacks(["bell", {"bell": {"volume": 3}}, "LearningRateMonitor", stop])
    assert [type(own) for own in made] == [
        *(bell, bell, library.LearningRateMonitor, library.EarlyStopping),
    ]
    assert (made[0].volume, made[1].volume) == (1, 3)
    assert (made[3].monitor, made[3].patience) == ("eval/loss", 7)


def test_a_name_of_a_plugin_counts_before_lightnings(bell):
    register_callback("ModelCheckpoint")(bell)
    try:
        assert type(make_all_callbacks(["ModelCheckpoint"])[0]) is bell
    finally:
        CALLBACKS.pop("ModelCheckpoint")


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("Bell", "Bell: unknown callback (known: "),
        ("os.system", "os.system: unknown callback"),
        ("ModelCheckpoint", "ModelCheckpoint: checkpoints are kept by checkpoint.every_n_steps="),
        ({"Timer": {"duration": 1}}, "Timer: trainer.max_time= ends a run in time"),
        ({"bell": {"loud": 1}}, "bell: got an unexpected keyword argument 'loud'; fix"),
        ({"LearningRateMonitor": {"x": 1}}, "LearningRateMonitor: it takes no x; there are logg"),
        ({"LearningRateMonitor": {"logging_interval": "x"}}, "LearningRateMonitor: logging_int"),
        ("EarlyStopping", "EarlyStopping: EarlyStopping.__init__() missing 1 required"),
        ({"EarlyStopping": {"monitor": "loss"}}, "EarlyStopping: monitor=loss is no metric of"),
        ({"EarlyStopping": {"monitor": "eval/lss"}}, "EarlyStopping: monitor=eval/lss is no"),
        (3, "3: needs names, such as [bell], or a name with its arguments"),
        ({"bell": 3}, "{'bell': 3}: needs names"),
        ({"bell": {}, "x": {}}, "{'bell': {}, 'x': {}}: needs names"),
    ],
)
def test_a_wrong_entry_is_answered_in_one_line(bell, entry, said):
    with pytest.raises(UserError) as caught:
        make_all_callbacks([entry])
    assert str(caught.value).startswith(f"trainer.callbacks={said}")
    assert "\n" not in str(caught.value)
