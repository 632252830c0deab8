"""Judges of answers: functions of a user's own modules, and reward models."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig

from dpo_lightning import plugins
from dpo_lightning.errors import UserError
from dpo_lightning.evaluation.named_judge import make_judge
from dpo_lightning.evaluation.scorers import RewardModel
from dpo_lightning.plugins import find_scorer, load_plugins, register_scorer
from dpo_lightning.settings.judging import JudgeSettings
from tests.support.models import byte_tokenizer, tiny_llama_config


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    """A working folder for plugins; what they register and import is forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    monkeypatch.setattr(plugins, "SCORERS", {})
    monkeypatch.setattr("dpo_lightning.evaluation.named_judge.SCORERS", plugins.SCORERS)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith(("mine", "other")):
            del sys.modules[name]


def plugin(text: str, name: str = "mine") -> list[str]:
    Path(f"{name}.py").write_text(text)
    load_plugins([name])
    return [name]


def scorer(name: str, names: list[str], *, batch_size: int = 4):
    def reward_model(source: str) -> RewardModel:
        return RewardModel(source, device=torch.device("cpu"), batch_size=batch_size)

    settings = JudgeSettings(name, tuple(names), None, batch_size, Path("marks"))
    judge = make_judge(settings, reward_model=reward_model)
    return lambda prompts, answers: judge.mark(prompts, answers)[0]


LENGTH = "def length(prompts, answers):\n    return [len(answer) for answer in answers]\n"
REGISTERED = (
    "from dpo_lightning.plugins import register_scorer\n\n"
    "@register_scorer('brevity')\ndef f(prompts, answers):\n    return [-len(a) for a in answers]\n"
)


@pytest.mark.parametrize("name", ["mine.length", "mine:length"])
def test_a_function_of_a_plugin_is_named_in_full(name):
    assert scorer(name, plugin(LENGTH))(["p", "p"], ["abc", ""]) == [3.0, 0.0]


def test_a_registered_scorer_has_a_name_of_its_own():
    assert scorer("brevity", plugin(REGISTERED))(["p"], ["abc"]) == [-3.0]


@pytest.mark.parametrize("name", ["none", "endpoint"])
def test_a_name_with_a_meaning_of_its_own_is_not_registered(name):
    with pytest.raises(ValueError, match="choose another name"):
        register_scorer(name)(len)


def test_a_package_is_a_plugin_too(place):
    (place / "mine_package").mkdir()
    (place / "mine_package" / "__init__.py").touch()
    (place / "mine_package" / "judges.py").write_text(LENGTH)
    load_plugins(["mine_package.judges"])
    assert scorer("mine_package.judges.length", ["mine_package.judges"])(["p"], ["ab"]) == [2.0]


def test_nothing_but_a_named_plugin_is_called():
    Path("other.py").write_text(LENGTH + "open('canary', 'w')\n")
    assert find_scorer("other.length", plugin(LENGTH)) is None
    assert find_scorer("os.system", ["mine"]) is None
    with pytest.raises(UserError, match="no plugin registers it"):
        scorer("other.length", ["mine"])
    assert not Path("canary").exists()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return [1.0]", "1 marks for 2 answers"),
        ("return [1.0, float('nan')]", "not finite"),
        ("return [1.0, 'a']", "could not convert"),
        ("raise KeyError('gone')", "KeyError: 'gone'"),
        ("return None", "TypeError"),
    ],
)
def test_a_wrong_scorer_is_named(body, said):
    names = plugin(f"def bad(prompts, answers):\n    {body}\n")
    with pytest.raises(UserError, match=r"evaluation.judge=mine.bad") as caught:
        scorer("mine.bad", names)(["p", "q"], ["a", "b"])
    assert said in str(caught.value)


def test_a_plugin_without_the_function_is_named():
    with pytest.raises(UserError, match=r"evaluation.judge=mine.nope: mine has no function nope"):
        scorer("mine.nope", plugin(LENGTH))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "plugins=mine: no such module"),
        ("import nowhere_to_be_found", "plugins=mine: No module named 'nowhere_to_be_found'"),
        ("x = 1\ny = (", "mine.py:2"),
        ("x = 1\n\nraise ValueError('why')", "ValueError: why"),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_one_line(text, said):
    if text is not None:
        Path("mine.py").write_text(text)
    with pytest.raises(UserError) as caught:
        load_plugins(["mine"])
    assert said in str(caught.value)
    if text is not None:
        assert "mine.py:" in str(caught.value)


# Reward models -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory) -> Path:
    """A random classifier with one output; its config has no pad token."""
    folder = tmp_path_factory.mktemp("reward")
    torch.manual_seed(0)
    config = LlamaConfig(**{**tiny_llama_config().to_dict(), "num_labels": 1, "pad_token_id": None})
    model = AutoModelForSequenceClassification.from_config(config)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    byte_tokenizer(pad=False).save_pretrained(folder)
    return folder


def plain_scores(folder: Path, texts: list[str]) -> list[float]:
    """Each text alone, so that nothing is padded: the head on the last token's state."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            state = model.model(input_ids=ids).last_hidden_state[0, -1]
            found.append(model.score(state).item())
    return found


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_a_reward_model_scores_prompt_and_answer_whatever_the_batch(reward_model, batch_size):
    prompts = ["Add 1.", "Say yes to all of it", "x"]
    answers = [" It is 2.", " no", " " + "long " * 15]
    found = scorer(str(reward_model), [], batch_size=batch_size)(prompts, answers)
    expected = plain_scores(reward_model, [p + a for p, a in zip(prompts, answers, strict=True)])
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert len(set(found)) == 3


def test_of_what_is_too_long_the_end_counts(reward_model):
    answer = "a" * 500 + "the end"
    [found] = scorer(str(reward_model), [])(["p"], [answer])
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    ids = tokenizer("p" + answer)["input_ids"][-128:]
    model = AutoModelForSequenceClassification.from_pretrained(reward_model).eval()
    with torch.no_grad():
        state = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        assert found == pytest.approx(model.score(state).item(), rel=1e-4)


def test_messages_go_through_its_chat_template(reward_model, tmp_path):
    import shutil

    folder = tmp_path / "chat"
    shutil.copytree(reward_model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    messages = [{"role": "user", "content": "Hi"}]
    found = scorer(str(folder), [])([messages, "Hi"], [" you ", " you "])
    assert found[0] == pytest.approx(found[1])
    expected = plain_scores(reward_model, ["[user]Hi[assistant]you", "User: Hi\n\nAssistant: you"])
    assert found[0] == pytest.approx(expected[0], rel=1e-4)
    # Without a template the turns are written out.
    plain = scorer(str(reward_model), [])([messages], [" you "])
    assert plain[0] == pytest.approx(expected[1], rel=1e-4)


def test_models_that_are_no_reward_models_are_refused_before_the_training(tiny_model, tmp_path):
    with pytest.raises(UserError, match="LlamaForCausalLM"):
        scorer(str(tiny_model), [])
    two = LlamaConfig(**{**tiny_llama_config().to_dict(), "num_labels": 2})
    AutoModelForSequenceClassification.from_config(two).save_pretrained(tmp_path / "two")
    byte_tokenizer().save_pretrained(tmp_path / "two")
    with pytest.raises(UserError, match="it has 2 outputs; a reward model has one"):
        scorer(str(tmp_path / "two"), [])
    with pytest.raises(UserError, match=r"evaluation.judge=org/nowhere"):
        scorer("org/nowhere", [])


def test_a_plugin_offers_what_it_defines_and_not_what_it_imports(tmp_path, monkeypatch):
    (tmp_path / "my_offers.py").write_text("from os import system\ndef own(p, r): return [0.0]\n")
    monkeypatch.syspath_prepend(tmp_path)
    load_plugins(["my_offers"])
    assert find_scorer("my_offers.own", ["my_offers"]) is not None
    with pytest.raises(UserError, match=r"my_offers.system: my_offers only imports it from posix"):
        find_scorer("my_offers.system", ["my_offers"])
    with pytest.raises(UserError, match="plugins=os: a module of Python itself"):
        load_plugins(["os"])
