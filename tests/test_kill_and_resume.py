"""Protects what a killed run leaves: it ends, resumed, bit for bit as the run that was not killed."""

import pytest

from tests.scripts import kill_and_resume


@pytest.mark.slow
@pytest.mark.parametrize("plan", [False, True], ids=["one phase", "two phases"])
def test_killed_runs_end_as_the_whole_one(plan: bool, capfd: pytest.CaptureFixture[str]) -> None:
    """Two kills of `make kill-test`: one during a save, one between saves or, with a plan, between the phases."""
    assert kill_and_resume.main(seed=1, kills=2, plan=plan) == 0
    assert "2 of 2 killed runs" in capfd.readouterr().out
