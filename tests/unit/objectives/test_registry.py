"""The registry of losses: registering one, checking an objective, the files of `conf/loss`."""

import dataclasses
import importlib
import subprocess
import sys
import typing
from pathlib import Path
from typing import Annotated

import pytest
import yaml

from dpo_lightning.objectives.objective import ObjectiveSettings, known_losses, merged_options
from dpo_lightning.objectives.registry import (
    DIVERGENCES,
    PAIRWISE_LOSSES,
    UNPAIRED_LOSSES,
    Option,
    losses_with_options,
    register_loss,
)
from dpo_lightning.settings.loss_group import objective_settings
from dpo_lightning.settings.schema import LossConfig, loss_schema
from dpo_lightning.settings.store import register

ROOT = Path(__file__).resolve().parents[3]
BUILT_IN = [
    name
    for name in known_losses()
    if name not in PAIRWISE_LOSSES
    or PAIRWISE_LOSSES[name].fn.__module__ == "dpo_lightning.objectives.losses"
]
FILES = sorted((ROOT / "conf" / "loss").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _losses_as_they_were():
    before = dict(PAIRWISE_LOSSES)
    yield
    PAIRWISE_LOSSES.clear()
    PAIRWISE_LOSSES.update(before)


# Registering -------------------------------------------------------------------------------------


def test_options_are_read_off_the_signature():
    @register_loss("mine", paper="here", reference="needed", couples=True)
    def mine(
        pairs,
        *,
        beta,
        slope: float = 2,
        order: int = 3,
        strict: bool = False,
        kind: Annotated[str, {"choices": ("soft", "hard")}] = "soft",
        share: Annotated[float, {"least": 0, "below": 0.5}] = 0.25,
    ):
        """The first line.

        And another.
        """

    entry = PAIRWISE_LOSSES["mine"]
    assert entry.fn is mine
    assert entry.options == {
        "slope": 2.0,
        "order": 3,
        "strict": False,
        "kind": "soft",
        "share": 0.25,
    }
    # A whole number as the default of a float is one.
    assert type(entry.options["slope"]) is float
    assert {name: option.kind for name, option in entry.schema.items()} == {
        "slope": float,
        "order": int,
        "strict": bool,
        "kind": str,
        "share": float,
    }
    assert dict(entry.schema["share"].rule) == {"least": 0, "below": 0.5}
    assert entry.summary == "The first line."
    assert (entry.paper, entry.couples, entry.on_margin) == ("here", True, False)
    assert (entry.needs_reference, entry.uses_reference, entry.uses_rejected) == (True, True, True)
    assert "mine" in known_losses()


@pytest.mark.parametrize(
    ("reference", "uses", "needs"),
    [("needed", True, True), ("optional", True, False), ("unused", False, False)],
)
def test_what_the_reference_is_to_it(reference, uses, needs):
    @register_loss("mine", paper="", reference=reference, uses_rejected=False, on_margin=True)
    def mine(pairs, *, beta): ...

    entry = PAIRWISE_LOSSES["mine"]
    assert (entry.uses_reference, entry.needs_reference) == (uses, needs)
    assert (entry.uses_rejected, entry.on_margin, entry.couples) == (False, True, False)
    assert (entry.options, entry.summary) == ({}, "")


PLUGIN = """
from __future__ import annotations

from typing import Annotated

from dpo_lightning.objectives.registry import register_loss

Positive = Annotated[float, {"above": 0}]


@register_loss("from_a_file", paper="there")
def loss(pairs, *, beta: float, width: Positive = 2, hard: bool = True,
         tries: Annotated[int, {"least": 1, "most": 9}] = 3):
    return pairs.margin()
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    (tmp_path / "a_plugin_of_losses.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "a_plugin_of_losses", raising=False)
    yield importlib.import_module("a_plugin_of_losses")
    sys.modules.pop("a_plugin_of_losses", None)


def test_annotations_that_are_strings_are_read_too(plugin):
    assert isinstance(plugin.loss.__annotations__["width"], str)
    schema = PAIRWISE_LOSSES["from_a_file"].schema
    assert schema["width"] == Option(float, 2.0, {"above": 0})
    assert schema["hard"] == Option(bool, True, {})
    assert schema["tries"] == Option(int, 3, {"least": 1, "most": 9})


def test_a_module_that_is_imported_again_may_register_again(plugin):
    first = PAIRWISE_LOSSES["from_a_file"].fn
    importlib.reload(plugin)
    assert PAIRWISE_LOSSES["from_a_file"].fn is plugin.loss
    assert plugin.loss is not first


@pytest.mark.parametrize("name", ["sigmoid", "plackett_luce", "softmax", "from_a_file"])
def test_a_name_that_is_taken_is_refused(plugin, name):
    with pytest.raises(ValueError, match=f"{name}' is registered already: choose another name"):

        @register_loss(name, paper="")
        def mine(pairs, *, beta): ...

    assert PAIRWISE_LOSSES["from_a_file"].fn is plugin.loss


def _no_beta(pairs): ...
def _beta_by_place(pairs, beta): ...
def _beta_is_not_first(pairs, *, slope: float = 1.0, beta): ...
def _more_by_place(pairs, other, *, beta): ...
def _anything(pairs, *, beta, **rest): ...
def _several(*pairs, beta): ...
def _by_name(*, pairs, beta): ...


@pytest.mark.parametrize(
    "function",
    [_no_beta, _beta_by_place, _beta_is_not_first, _more_by_place, _anything, _several, _by_name],
)
def test_other_signatures_are_refused(function):
    with pytest.raises(ValueError, match=r"called as fn\(pairs, \*, beta, \.\.\.\)"):
        register_loss("mine", paper="")(function)
    assert "mine" not in PAIRWISE_LOSSES


def _no_type(pairs, *, beta, width=1.0): ...
def _unknown_type(pairs, *, beta, width: "Nowhere" = 1.0): ...  # noqa: F821
def _no_default(pairs, *, beta, width: float): ...
def _other_type(pairs, *, beta, width: list = ()): ...  # noqa: RUF100
def _default_of_another_type(pairs, *, beta, width: int = 1.5): ...
def _text_for_a_number(pairs, *, beta, width: float = "1"): ...
def _number_for_a_switch(pairs, *, beta, width: bool = 1): ...
def _optional(pairs, *, beta, width: float | None = None): ...
def _not_a_number(pairs, *, beta, width: float = float("nan")): ...
def _below_its_bound(pairs, *, beta, width: Annotated[float, {"least": 0}] = -1.0): ...
def _at_its_open_bound(pairs, *, beta, width: Annotated[float, {"above": 0}] = 0.0): ...
def _no_choice(pairs, *, beta, width: Annotated[str, {"choices": ("a",)}] = "b"): ...


@pytest.mark.parametrize(
    "function",
    [
        _no_type,
        _unknown_type,
        _no_default,
        _other_type,
        _default_of_another_type,
        _text_for_a_number,
        _number_for_a_switch,
        _optional,
        _not_a_number,
        _below_its_bound,
        _at_its_open_bound,
        _no_choice,
    ],
)
def test_options_without_a_usable_type_and_default_are_refused(function):
    with pytest.raises(ValueError, match=r"'width' needs a type .* and a default of that type"):
        register_loss("mine", paper="")(function)
    assert "mine" not in PAIRWISE_LOSSES


def test_an_option_that_is_of_another_type_elsewhere_is_refused():
    """Settings have one field for both."""
    with pytest.raises(ValueError, match="'label_smoothing' is a float of loss 'sigmoid' and"):

        @register_loss("mine", paper="")
        def mine(pairs, *, beta, label_smoothing: bool = False): ...

    # Of the same type it may have other bounds and another default.
    @register_loss("mine", paper="")
    def other(pairs, *, beta, label_smoothing: float = 0.9): ...

    assert PAIRWISE_LOSSES["mine"].options == {"label_smoothing": 0.9}


def test_another_word_for_the_reference_is_refused():
    with pytest.raises(ValueError, match="'maybe': one of needed, optional, unused"):
        register_loss("mine", paper="", reference="maybe")


@pytest.mark.parametrize(
    ("option", "good", "bad", "words"),
    [
        (
            Option(float, 0.1, {"least": 0, "below": 0.5}),
            [0, 0.0, 0.499],
            [0.5, -1e-9, 1, "0", True, None, float("nan")],
            "a number >= 0 and < 0.5",
        ),
        (
            Option(float, 0.1, {"above": 0, "most": 2}),
            [1e-9, 2, 2.0],
            [0, 0.0, 2.1, float("inf")],
            "a number > 0 and <= 2",
        ),
        (Option(float, 0.1, {}), [-1e300, 3], [float("inf"), "x"], "a number"),
        (Option(int, 1, {"least": 1}), [1, 10**12], [0, 1.0, True], "a whole number >= 1"),
        (Option(bool, True, {}), [True, False], [0, 1, "true"], "true or false"),
        (Option(str, "a", {}), ["", "b"], [1, None], "a text"),
        (Option(str, "a", {"choices": ("a", "b")}), ["a", "b"], ["c", 1], "one of a, b"),
    ],
)
def test_what_an_option_accepts(option, good, bad, words):
    assert all(option.accepts(value) for value in good)
    assert not any(option.accepts(value) for value in bad)
    assert option.expected() == words


def test_options_of_several_losses_are_merged_with_the_first_ones_default():
    merged = merged_options([PAIRWISE_LOSSES["exo_pair"], PAIRWISE_LOSSES["cpo"]])
    assert {name: option.default for name, option in merged.items()} == {
        "label_smoothing": 0.001,
        "cpo_alpha": 1.0,
    }


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name in PAIRWISE_LOSSES])
def test_every_loss_says_where_it_is_from_and_what_it_is(name):
    entry = PAIRWISE_LOSSES[name]
    assert entry.paper.startswith("https://arxiv.org/abs/") or name == "sft"
    assert entry.summary
    hints = typing.get_type_hints(
        entry.fn, globalns={**vars(sys.modules[entry.fn.__module__]), "Tensor": object}
    )
    assert set(hints) == {"pairs", "beta", "return", *entry.options}


@pytest.mark.parametrize(
    "module",
    [
        "dpo_lightning.objectives.registry",
        "dpo_lightning.objectives.objective",
        "dpo_lightning.objectives.losses",
        "dpo_lightning.settings.loss_group",
        "dpo_lightning.settings.schema",
    ],
)
def test_settings_are_checked_without_torch(module):
    code = f"""
import sys, {module}
from dpo_lightning.objectives.objective import ObjectiveSettings
assert not list(ObjectiveSettings(terms={{"sigmoid": 1.0, "softmax": 2.0}}).problems())
assert list(ObjectiveSettings(terms={{"sigmod": 1.0}}).problems())
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_note_on_a_type_that_is_no_bounds_is_none():
    @register_loss("mine", paper="")
    def mine(pairs, *, beta, width: Annotated[float, "in nats", {"least": 0}] = 1.0): ...

    assert PAIRWISE_LOSSES["mine"].schema["width"] == Option(float, 1.0, {"least": 0})


# An objective ------------------------------------------------------------------------------------


def problems(*names, **changes):
    terms = changes.pop("terms", None)
    terms = dict.fromkeys(names, 1.0) if terms is None else terms
    return list(ObjectiveSettings(terms=terms, **changes).problems())


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_loss_alone_has_no_problem(name):
    assert problems(name) == []
    # Of single responses none is the better one.
    assert len(problems(name, rpo_alpha=0.5)) == (name in UNPAIRED_LOSSES)


@pytest.mark.parametrize(
    ("names", "changes", "clauses"),
    [
        (["sigmod"], {}, ["terms.sigmod: unknown loss; available: sigmoid, hinge"]),
        ([], {}, ["terms: needs at least one loss"]),
        ([], {"terms": {"sigmoid": -0.5}}, ["terms.sigmoid=-0.5: must be a finite weight"]),
        ([], {"terms": {"sft": float("nan")}}, ["terms.sft=nan: must be a finite weight"]),
        ([], {"terms": {"sft": float("inf")}}, ["terms.sft=inf: must be a finite weight"]),
        (
            ["hinge"],
            {"options": {"gamma": 0.5}},
            ["gamma=0.5: loss=hinge has no such option"],
        ),
        (
            ["simpo"],
            {"options": {"delta": 2.0}},
            ["delta=2: loss=simpo has no such option; it has gamma"],
        ),
        (
            ["sigmoid"],
            {"options": {"label_smoothing": 0.5}},
            ["label_smoothing=0.5: must be a number >= 0 and < 0.5 for loss=sigmoid"],
        ),
        # 0 is right for one of the two, and has no finite loss for the other.
        (
            ["sigmoid", "exo_pair"],
            {"options": {"label_smoothing": 0.0}},
            ["label_smoothing=0: must be a number > 0 and < 0.5 for loss=sigmoid,exo_pair"],
        ),
        (
            ["bco_pair"],
            {"f_divergence": "forward_kl"},
            ["f_divergence=forward_kl: loss=bco_pair is no function of the margin"],
        ),
        (
            ["sigmoid", "softmax"],
            {"f_divergence": "js_divergence"},
            ["f_divergence=js_divergence: loss=softmax is no function of the margin"],
        ),
        (
            ["sft"],
            {"f_divergence": "forward_kl"},
            ["f_divergence=forward_kl: loss=sft uses no reference"],
        ),
        (
            ["simpo"],
            {"f_divergence": "forward_kl"},
            ["loss=simpo is no function of the margin", "loss=simpo uses no reference"],
        ),
        (["sft"], {"ld_alpha": 0.5}, ["ld_alpha=0.5 is about the two responses of a pair"]),
        (["sft"], {"wpo": True}, ["wpo=true is about the two responses of a pair"]),
        (["softmax"], {"ld_alpha": 0.5}, ["which loss=softmax does not compare"]),
        (["sigmoid", "plackett_luce"], {"wpo": True}, ["wpo=true is about the two responses"]),
        (["aot"], {"wpo": True}, ["wpo=true weighs single pairs, and loss=aot has one loss"]),
        (["sigmoid", "kto_pair"], {"wpo": True}, ["loss=kto_pair has one loss for all pairs"]),
    ],
)
def test_what_does_not_fit_together_is_said(names, changes, clauses):
    found = problems(*names, **changes)
    assert len(found) == len(clauses)
    assert all(clause in text for clause, text in zip(clauses, found, strict=True))


@pytest.mark.parametrize(
    ("names", "changes"),
    [
        (["sigmoid", "sft"], {"f_divergence": "forward_kl"}),
        (["ipo"], {"f_divergence": "alpha_divergence", "f_alpha": 2.0}),
        (["sigmoid", "sft"], {"wpo": True, "ld_alpha": 0.0}),
        (["aot"], {"ld_alpha": 0.5}),
        (["sigmoid", "robust"], {"options": {"label_smoothing": 0.1}}),
        ([], {"terms": {"sigmoid": 0.0, "sft": 1}}),
        (["simpo"], {"options": {"gamma": 1}}),
    ],
)
def test_what_fits_together_is_accepted(names, changes):
    assert problems(*names, **changes) == []


def test_under_another_divergence_the_losses_that_can_be_are_named():
    (text,) = problems("apo_zero", f_divergence="forward_kl")
    assert text.endswith(", ".join(n for n, e in PAIRWISE_LOSSES.items() if e.on_margin))


def test_what_an_objective_needs():
    mixed = ObjectiveSettings(terms={"sft": 1.0, "aot": 0.5, "nca_pair": 1.0, "softmax": 1.0})
    assert list(mixed.pairwise) == ["sft", "aot", "nca_pair"]
    assert mixed.listwise == ["softmax"]
    assert mixed.uses_reference
    assert mixed.needs_reference == ["nca_pair"]
    assert mixed.couples == ["aot"]
    assert not mixed.needs_tokens
    assert not ObjectiveSettings(terms={"sft": 1.0, "simpo": 1.0}).uses_reference
    assert ObjectiveSettings(terms={"softmax": 1.0}).uses_reference
    long = ObjectiveSettings(terms={"sigmoid": 1.0}, ld_alpha=0.5)
    assert (long.desensitises, long.needs_tokens) == (True, True)
    weighed = ObjectiveSettings(terms={"sigmoid": 1.0}, wpo=True)
    assert (weighed.desensitises, weighed.needs_tokens) == (False, True)


def test_each_loss_takes_its_own_options():
    settings = ObjectiveSettings(
        terms={"cpo": 1.0, "slic": 1.0}, options={"cpo_alpha": 0.5, "delta": 2.0}
    )
    assert settings.own_options("cpo") == {"label_smoothing": 0.0, "cpo_alpha": 0.5}
    assert settings.own_options("slic") == {"delta": 2.0}


# The files of conf/loss --------------------------------------------------------------------------


def test_every_loss_is_a_choice_and_a_file_sets_something():
    """`loss=<name>` needs no file: a file that only has its name would say nothing."""
    from hydra.core.config_store import ConfigStore

    register()
    stored = {name.removesuffix(".yaml") for name in ConfigStore.instance().repo["loss"]}
    files = {path.stem for path in FILES}
    assert {*BUILT_IN} <= stored | files
    assert not stored & files
    assert all(len(yaml.safe_load(path.read_text())) > 1 for path in FILES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_one_loss_or_a_sum_of_them(path):
    text = path.read_text()
    content = yaml.safe_load(text)
    assert text.startswith("# ")
    assert content["name"] == path.stem
    assert path.stem in BUILT_IN or content["terms"]
    assert set(content.get("terms", {})) <= set(BUILT_IN)
    fields = {field.name for field in dataclasses.fields(loss_schema())}
    assert set(content) <= fields
    assert list(objective_settings(loss_schema()(**content)).problems()) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_states_no_default(path):
    """The defaults are those of the settings, which a run has where a file says nothing."""
    content = yaml.safe_load(path.read_text())
    defaults = loss_schema()()
    stated = {key: value for key, value in content.items() if key not in ("name", "terms")}
    assert all(value != getattr(defaults, key) for key, value in stated.items())
    if path.stem in PAIRWISE_LOSSES:
        own = PAIRWISE_LOSSES[path.stem].options
        needed = {key: own[key] for key in own if own[key] != getattr(defaults, key)}
        extra = {"label_smoothing": 0.1} if path.stem == "robust" else {}
        assert stated == needed | extra


def test_a_loss_without_a_file_has_its_own_defaults():
    """As an option of several losses label_smoothing has the default of the first, 0, at which EXO
    is infinite: `loss=exo_pair` brings its own.
    """
    from hydra.core.config_store import ConfigStore

    register()
    stored = ConfigStore.instance().repo["loss"]
    assert stored["exo_pair.yaml"].node == {"name": "exo_pair", "label_smoothing": 1e-3}
    assert stored["plackett_luce.yaml"].node == {"name": "plackett_luce"}


def test_robust_is_chosen_with_a_share_of_flips():
    """Without one it would be another name of `sigmoid`."""
    content = yaml.safe_load((ROOT / "conf" / "loss" / "robust.yaml").read_text())
    assert content["label_smoothing"] == 0.1


def test_the_settings_have_every_option_of_every_loss():
    defaults = loss_schema()()
    for name in BUILT_IN:
        if name in losses_with_options():
            for option, entry in losses_with_options()[name].schema.items():
                assert type(getattr(defaults, option)) is entry.kind
    own = {field.name for field in dataclasses.fields(LossConfig)}
    assert not own & {o for entry in losses_with_options().values() for o in entry.options}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence_is_a_choice(name):
    from dpo_lightning.objectives.divergences import link

    assert problems("sigmoid", f_divergence=name) == []
    assert (link(name, 0.5) is None) == (name == "reverse_kl")


def test_a_bound_of_another_name_is_refused():
    """It would otherwise bound nothing, without a word."""
    with pytest.raises(ValueError, match="'slope' has min in its bounds, which are least, above"):

        @register_loss("bounded", paper="none")
        def bounded(pairs, *, beta, slope: Annotated[float, {"min": 0}] = 1.0):
            return slope * pairs.margin()
