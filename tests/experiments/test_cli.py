"""What the commands share."""

import pytest

from experiments.shared.cli import with_switches


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("", ""),  # README's first command has none
        ("--quiet", "--quiet=true"),
        ("--compile --quiet", "--compile=true --quiet=true"),
        ("--quiet --seed 1 --bdmc", "--quiet=true --seed 1 --bdmc=true"),
        ("--quiet true --dry_run -c FILE", "--quiet true --dry_run=true -c FILE"),
        ("--compile false --output --quiet=false", "--compile false --output --quiet=false"),
        ("--brief --runs FOLDER --speed", "--brief=true --runs FOLDER --speed=true"),
    ],
)
def test_a_switch_needs_no_true(given: str, meant: str) -> None:
    assert with_switches(given.split()) == meant.split()
