"""The line of progress: no estimate before there is something to go by."""

from __future__ import annotations

import pytest

from tamoe.progress import progress_line


def test_no_time_is_shown_before_a_unit_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    progress_line("probe")("retest", 0, 4, 0.0)
    assert capsys.readouterr().err == "probe: retest 0/4\n"
    progress_line("probe")("retest", 1, 4, 3.0)
    assert capsys.readouterr().err == "probe: retest 1/4, 3 s left\n"
    progress_line("probe")("retest", 4, 4, 0.0)
    assert capsys.readouterr().err == "probe: retest 4/4\n"
