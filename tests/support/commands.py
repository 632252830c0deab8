"""Command lines of any kind, each of which must be accepted, or refused in one line."""

import contextlib
import io
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from hydra.core.utils import JobReturn, JobStatus
from hypothesis import strategies as st

from dpo_lightning import cli
from dpo_lightning.settings.foreign_keys import KEYS as FOREIGN_KEYS
from dpo_lightning.settings.keys import settings
from dpo_lightning.settings.schema import CONF
from dpo_lightning.sweeps import finish

GROUPS = [*sorted(folder.name for folder in CONF.iterdir() if folder.is_dir()), "hydra/launcher"]
OPTIONS = sorted({path.stem for path in CONF.glob("*/*.yaml")} | {"basic", "devices", "null"})
KEYS = sorted(settings())

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
# Where a folder is named, it is one below the working folder: this writes for real.
HYDRA = (
    *("hydra.job.num=3", "hydra.job.name=a/b", "hydra.job.name=x", "hydra.verbose=true"),
    *("hydra.output_subdir=null", "hydra.output_subdir=../x", "hydra.mode=MULTIRUN"),
    *("hydra.mode=nope", "hydra.run.dir=r", "hydra.run.dir=", "hydra.run.dir=rows.jsonl/x"),
    *("hydra.sweep.dir=s", "hydra.sweep.subdir=/x", "hydra.launcher=null", "hydra.launcher=3"),
    *("hydra.sweeper=null", "hydra.job=null", "hydra.job_logging=null", "hydra=null", "~hydra"),
    *("hydra.callbacks=3", "+hydra.callbacks.a=3", "+hydra.callbacks.a._target_=os.system"),
    *("hydra.searchpath=[nowhere]", "hydra.searchpath=3", "hydra.searchpath=[file://nowhere]"),
    *("~hydra.run", "~hydra.launcher", "~hydra.job", "~hydra.sweep", "hydra.run=null"),
    *("hydra.sweeper.params={beta:1}", "+hydra.sweeper.params.beta='1,2'", "hydra.job.env_set=3"),
    *("+hydra.sweeper.params.beta='[1'", "hydra.sweeper.params=3", "hydra.launcher.devices=x"),
    *("hydra.job.chdir=3", "hydra.help=null", "hydra.overrides.task=[a]", "hydra.runtime=null"),
    *("hydra.job_logging.root=3", "hydra.job_logging.handlers=null", "hydra/job_logging=none"),
    *("hydra.job.config.override_dirname=3", "hydra.job.config=null", "hydra.job.name=null"),
)
values = (
    st.sampled_from(
        [
            *("", "null", "true", "0", "1", "-1", "1.5", "1e400", "nan", "inf", "-inf", "'", '"'),
            *("[]", "{}", "[1,2]", "{a:1}", "{a:{b:[1]}}", "a,b", "1,2,3", "range(1,4)", "[[1],2]"),
            *("choice(1,2)", "interval(0,1)", "glob(*)", "glob([a*,b*],exclude=c)", "sort(2,1)"),
            *("shuffle(1,2)", "tag(x,1)", "str(1)", "int(x)", "float(inf)", "json_str({a:1})"),
            *("extend_list(1)", "${beta}", "${nope}", "${beta", "${oc.env:HOME}", "${oc.env:NOPE}"),
            *("${now:%Y}", "${seed}${seed}", "???", "rows.jsonl", "model", "./nowhere", "a/b"),
            *("~/x", "../x", "a b", "a=b", "a:b", "\\", "\\,", "x\n", "x" * 3000, "9" * 5000),
            *("[" * 50, "[" * 2000, "{a:" * 300, "0x10", "1_000", "é", "\x00", "‮", "{_target_:x}"),
            *("1,-1", "cpu", "auto", "5,x", "2026-01-01", "10:20", "hf_" + "a1B" * 11),
        ]
    )
    | st.sampled_from(OPTIONS)
    | st.integers().map(str)
    | st.floats().map(str)
    | names
)
keys = (
    st.sampled_from(KEYS)
    | st.sampled_from(GROUPS)
    | st.sampled_from(["model.config_overrides.a", "data.columns.prompt", "loss.terms.sigmoid"])
    | st.tuples(st.sampled_from(KEYS), names).map(".".join)
    | st.sampled_from(sorted(FOREIGN_KEYS))
    | st.sampled_from(["a@b", "model@x", "optimizer.betas[0]", "api_key", "a.b.c", "model.", ".a"])
    | names
)
prefixes = st.sampled_from(["", "", "", "", "+", "++", "~"])
words = (
    st.tuples(prefixes, keys, st.sampled_from(["=", "=", "=", "=", "=", ""]), values).map("".join)
    | st.sampled_from(HYDRA)
    | st.sampled_from(["-m", "-m", "--multirun", "--config-name=x", "--config-dir=own", "--", "-"])
    | st.sampled_from(["--config-dir=nowhere", "--config-path=conf", "--package=a", "-x", "--x=1"])
    | values
)
commands = st.lists(words, min_size=1, max_size=4).filter(lambda line: not _only_asks(line))

# Files of one's own are read like any other.
yaml_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | names | st.sampled_from(OPTIONS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)
files = st.dictionaries(
    st.sampled_from([key.partition(".")[0] for key in KEYS] + ["hydra", "defaults"]) | names,
    yaml_values
    | st.dictionaries(
        st.sampled_from([key.rpartition(".")[2] for key in KEYS] + ["_target_", "run", "job"]),
        yaml_values,
        max_size=3,
    ),
    max_size=3,
)


def _only_asks(line: list[str]) -> bool:
    """True if Hydra would print something instead of running."""
    return any(
        word.startswith(("-h", "--h", "--i", "-i", "-c", "-s", "--s", "-e")) for word in line
    )


@contextlib.contextmanager
def own_place(folder: Path) -> Iterator[None]:
    """A working folder with rows and a model; no run behind the front door; the log is restored."""
    (folder / "rows.jsonl").touch()
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "config.json").touch()
    (folder / "own" / "experiment").mkdir(parents=True, exist_ok=True)
    before, root = Path.cwd(), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    environment = dict(os.environ)

    def launch(context, config, task, job_overrides, **options):
        return [JobReturn(status=JobStatus.COMPLETED, _return_value=1.0) for _ in job_overrides]

    os.chdir(folder)
    try:
        with (
            mock.patch.object(cli, "_start", return_value=0),
            mock.patch("dpo_lightning.sweeps.launch.launch", launch),
            mock.patch.object(finish, "finish_sweep", return_value=True),
        ):
            yield
    finally:
        os.chdir(before)
        os.environ.clear()
        os.environ.update(environment)
        for handler in root.handlers:
            if handler not in handlers:
                handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)


def check_command(line: list[str]) -> None:
    """Exit code 0 and nothing on standard error, or 2 and one line with the reason."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(line)
    said = err.getvalue().splitlines()
    assert code in (0, 2), (line, code, err.getvalue()[-2000:])
    assert "Traceback" not in out.getvalue() + err.getvalue(), (line, err.getvalue())
    if code == 2:
        assert len(said) == 1, (line, said)
        assert said[0].startswith("error: "), (line, said)
        assert len(said[0]) > len("error: "), line
    else:
        assert not said, (line, said)
