"""What whole rehearsals share."""

import pytest


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Where the built-in base is made once for all of these tests."""
    return tmp_path_factory.mktemp("cache")
