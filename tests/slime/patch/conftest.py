import pytest
from slime_checkouts import make_checkout


@pytest.fixture
def slime(tmp_path):
    return make_checkout(tmp_path / "slime checkout")
