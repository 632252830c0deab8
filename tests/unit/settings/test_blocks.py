"""Grids in blocks: what a file of them may hold, and what is said of one that is wrong."""

import itertools
import logging
import math

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from dpo_lightning import cli
from dpo_lightning.errors import UserError
from dpo_lightning.settings.blocks import GridBlock, blocks_of
from dpo_lightning.settings.compose import compose as composed
from dpo_lightning.settings.compose import make_hydra, parse_words, ready_hydra, typed_overrides
from dpo_lightning.settings.grids import check_grid
from dpo_lightning.settings.overrides import flag_parser, parse_overrides
from tests.support.properties import examples


def read(source: object) -> list[GridBlock]:
    return blocks_of(OmegaConf.create({"sweep": {"trials": source}}))


def grid(*words: str):
    """The trials of a command line, checked as before a sweep, and what the command became."""
    with ready_hydra():
        args = parse_words(flag_parser(), ["-m", *words])
        hydra = make_hydra(args)
        overrides = typed_overrides(args, hydra)
        fixed = [str(o.input_line) for o in overrides if not o.is_sweep_override()]
        cfg = composed(hydra, args, fixed)
        found = check_grid(hydra, args, cfg, overrides, in_process=False, explicit_run_dir=True)
    return found, args.overrides


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> str:
        (tmp_path / "grid.yaml").write_text(text)
        return "grid.yaml"

    return write


# Trials ------------------------------------------------------------------------------------------


def test_each_block_is_a_product_of_its_own_and_is_crossed_with_what_is_typed(file):
    """Two betas of sigmoid, one beta by two gammas of simpo, each with two seeds: (2 + 2) * 2."""
    name = file(
        "- {loss: sigmoid, beta: [0.01, 5e-1]}\n- {loss: simpo, beta: 2, loss.gamma: [0.5, 1]}\n"
    )
    found, words = grid(f"sweep.trials={name}", "seed=1,2")
    told = [(c.loss.name, c.beta, c.seed, c.loss.gamma) for c in found.configs]
    gamma = found.configs[0].loss.gamma
    assert told == [
        *(("sigmoid", beta, seed, gamma) for beta in (0.01, 0.5) for seed in (1, 2)),
        *(("simpo", 2.0, seed, own) for own in (0.5, 1.0) for seed in (1, 2)),
    ]
    assert found.trials[3] == [f"sweep.trials={name}", "seed=2", "loss=sigmoid", "beta=5e-1"]
    # The file is no part of a trial's name, and its blocks get the sweeper that runs them.
    assert "hydra/sweeper=blocks" in words
    assert "hydra.job.config.override_dirname.exclude_keys=['sweep.trials']" in words


values = st.one_of(
    st.integers(-1000, 1000),
    st.floats(allow_nan=False, allow_infinity=False, width=32),
    st.booleans(),
    st.none(),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=12),
)
keys = st.sampled_from(["beta", "seed", "name", "loss.gamma", "data.train", "optimizer.lr"])
blocks = st.lists(
    st.dictionaries(keys, st.lists(values, min_size=1, max_size=3), min_size=1, max_size=3),
    min_size=1,
    max_size=3,
)


def plain(line: str) -> tuple[str, object]:
    """A setting as Hydra reads it."""
    [override] = parse_overrides([line])
    assert not override.is_sweep_override()
    value = override.value()
    return override.key_or_group, value if value is None or isinstance(value, bool) else str(value)


def same(found: list[tuple[str, object]], meant: list[tuple[str, object]]) -> bool:
    return len(found) == len(meant) and all(
        a == c and (b == d or _number(b) == _number(d) is not None)
        for (a, b), (c, d) in zip(found, meant, strict=True)
    )


def _number(value: object) -> float | None:
    try:
        return float(str(value))
    except ValueError:
        return None


@settings(max_examples=examples(40))
@given(blocks)
@example([{"name": ["a,b", "range(1,3)", "", "x"]}])
def test_a_value_is_the_same_in_a_file_in_a_list_and_on_the_command_line(tmp_path_factory, grids):
    """Whatever texts hold, nothing becomes several values, and no cell is lost or made up."""
    path = tmp_path_factory.mktemp("blocks") / "grid.yaml"
    path.write_text(yaml.safe_dump(grids, allow_unicode=True), encoding="utf-8")
    for found in (read(str(path)), read(OmegaConf.create([_escaped(block) for block in grids]))):
        cells = [cell for block in found for cell in block.cells()]
        assert len(cells) == sum(math.prod(map(len, block.values())) for block in grids)
        by_block = [
            {entry.key: [plain(line)[1] for line in entry.lines] for entry in block.entries}
            for block in found
        ]
        for own, meant in zip(by_block, grids, strict=True):
            assert own.keys() == meant.keys()
            for key, items in meant.items():
                wanted = [x if x is None or isinstance(x, bool) else str(x) for x in items]
                assert same(
                    list(zip(itertools.repeat(key), own[key])),
                    list(zip(itertools.repeat(key), wanted)),
                ), (own[key], wanted)


def _escaped(block: dict[str, list[object]]) -> dict[str, list[object]]:
    """A block whose texts interpolate nothing in a config."""
    return {
        key: [x.replace("$", r"\$") if isinstance(x, str) and "${" in x else x for x in items]
        for key, items in block.items()
    }


# Errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "grid.yaml:1: must be a list of blocks, such as `- {loss:"),
        ("beta: [1, 2]", "grid.yaml:1: must be a list of blocks"),
        ("- beta: 1\n- 3\n", "grid.yaml:2: must be a block of keys and values"),
        ("- beta: 1\n  beta: 2\n", "grid.yaml:2: beta stands in this block twice"),
        ("- seed: 1\n  beta: []\n", "grid.yaml:2: beta has no value"),
        ("- {beta: 1\n- 2", "grid.yaml:2: "),
        ("- [beta]: 1\n", "grid.yaml:1: a key must be one setting"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_list_of_blocks_is_refused_with_the_place(file, text, said):
    with pytest.raises(UserError) as error:
        read(file(text))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "- seed: 1\n  betta: 3\n- loss: nope\n- hydra.launcher.devices: 2\n- sweep.metric: x\n"
            "- {data.batch_size: 4, beta: 1}\n- {logger.wandb_api_key: x}\n",
            [
                "grid.yaml:2: betta: unknown key; did you mean `beta`?",
                "grid.yaml:3: loss=nope: ",
                "grid.yaml:4: hydra.launcher.devices is no setting of a trial",
                "grid.yaml:5: sweep.metric is no setting of a trial",
                "grid.yaml:6: data.batch_size has values here, and data.batch_size=8 gives it one",
                "grid.yaml:7: logger.wandb_api_key: credentials are no settings",
            ],
        ),
        (
            "- {loss: sigmoid, beta: [-1, 2]}\n- loss: ipo\n  beta: [3, -4]\n  loss.gamma: 7\n",
            [
                "grid.yaml:1: beta=-1: must be a finite number > 0",
                "grid.yaml:3: beta=-4: must be a finite number > 0",
                "grid.yaml:4: loss.gamma=7: loss=ipo has no such option",
            ],
        ),
    ],
)  # fmt: skip
def test_all_that_is_wrong_with_settings_is_said_at_once_with_the_places(file, text, said):
    """Keys and choices first; values, when those are right."""
    with pytest.raises(UserError) as error:
        grid(f"sweep.trials={file(text)}", "data.batch_size=8")
    for part in said:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sweep.trials=a.yaml,b.yaml"], "gives several values, and a sweep has one"),
        (["sweep.trials=[{beta:[-1]}]"], "sweep.trials[0].beta: beta=-1: must be a finite number"),
        (["sweep.trials=[{beta:[1]}]", "hydra/sweeper=optuna"], "chooses trials by itself"),
        (["experiment=frontier", "sweep.trials=[{beta:[1]}]"], "and beta=0.1,0.2,0.5,1,2,5 gives"),
    ],
)  # fmt: skip
def test_blocks_that_do_not_go_with_the_command_are_refused(words, said):
    with pytest.raises(UserError) as error:
        grid(*words)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("no.yaml", "sweep.trials=no.yaml: No such file or directory, seen from"),
        (3, "sweep.trials=3: must be a file of blocks"),
        ([3], "sweep.trials[0]=3: must be a block"),
        ([{"beta": []}], "sweep.trials[0].beta has no value"),
    ],
)
def test_what_is_no_list_of_blocks_is_refused(source, said):
    with pytest.raises(UserError) as error:
        read(source)
    assert said in str(error.value)


def test_blocks_without_a_sweep_are_refused_before_anything_is_made(file, tmp_path, capsys):
    assert cli.main([f"sweep.trials={file('- beta: 1')}"]) == 2
    assert "sweep.trials=grid.yaml is for a sweep: add -m" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["grid.yaml"]


def test_a_loss_by_its_other_name_is_taken_and_said(file, caplog):
    with caplog.at_level(logging.WARNING):
        [config] = grid(f"sweep.trials={file('- {loss: dpo, beta: 0.3}')}")[0].configs
    assert config.loss.name == "sigmoid"
    assert "loss=dpo is loss=sigmoid here" in caplog.text


def test_the_blocks_of_an_experiment_are_read_and_given_to_no_trial_twice(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nsweep:\n  trials:\n"
        "    - {loss: sigmoid, beta: [0.1, 0.2]}\n    - {loss: simpo, beta: [2]}\n"
    )
    found, _ = grid("--config-dir", str(tmp_path), "experiment=mine")
    assert [(c.loss.name, c.beta) for c in found.configs] == [
        ("sigmoid", 0.1), ("sigmoid", 0.2), ("simpo", 2.0),
    ]  # fmt: skip
    with pytest.raises(UserError, match="of an experiment which is swept is not read"):
        grid("--config-dir", str(tmp_path), "experiment=mine,frontier")
