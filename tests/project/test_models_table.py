"""docs/models.md is what the code says. pytest tests/project/test_models_table.py"""

import models_table


def test_the_table_is_what_the_code_says():
    _, mark, table = models_table.PAGE.read_text().partition(models_table.MARK)
    assert mark and table.strip() == models_table.table().strip(), "make it anew: python tests/project/models_table.py"
