"""The table of deliberate breaks still fits the code. pytest tests/project/test_hazards.py"""

import ast

import hazards
import pytest


@pytest.mark.parametrize("entry", hazards.BREAKS, ids=lambda entry: f"{entry.hazard}: {entry.what}")
def test_the_break_still_fits(entry):
    source = (hazards.ROOT / entry.file).read_text()
    broken = entry.applied(source)
    assert broken != source and ast.parse(broken)
    assert (hazards.ROOT / entry.tests.split()[0].split("::")[0]).exists()
