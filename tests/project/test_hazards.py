"""The table of deliberate breaks still fits the code. pytest tests/project/test_hazards.py"""

import hazards
import pytest


@pytest.mark.parametrize("entry", hazards.BREAKS, ids=lambda entry: f"{entry.hazard}: {entry.what}")
def test_the_text_is_there_once(entry):
    assert (hazards.ROOT / entry.file).read_text().count(entry.old) == 1
    assert (hazards.ROOT / entry.tests.split()[0].split("::")[0]).exists()
