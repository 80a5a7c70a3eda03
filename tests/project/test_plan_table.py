"""docs/memory.md is what the command says. pytest tests/project/test_plan_table.py"""

import plan_table


def test_the_tables_are_what_the_command_says():
    _, mark, rest = plan_table.PAGE.read_text().partition(plan_table.START)
    made, end, _ = rest.partition(plan_table.END)
    assert mark and end and made.strip() == plan_table.tables().strip(), "make: python tests/project/plan_table.py"
