"""Profiles of the property tests: the same few examples always, or many times as many at random."""

from hypothesis import settings

# What a profile gives a test that names no number; a test's own number grows in proportion.
_USUAL = 100
_TIMES_AS_LONG = 20


def register_profiles() -> None:
    """Registers the profiles: ``ci`` is used unless ``--hypothesis-profile=long`` is given.

    Under ``ci`` a failure is one of the code, never of a draw, and what is printed repeats it.
    """
    settings.register_profile(
        "ci", max_examples=_USUAL, derandomize=True, print_blob=True, deadline=None
    )
    settings.register_profile(
        "long", max_examples=_USUAL * _TIMES_AS_LONG, print_blob=True, deadline=None
    )
    settings.load_profile("ci")


def examples(count: int) -> int:
    """Number of examples, in proportion more under a longer profile than under the usual one."""
    return count * settings().max_examples // _USUAL
