"""The one exception type of our own: what a user typed was wrong (exit code 2)."""


class UsageError(ValueError):
    """A flag, a name or a combination of them that cannot work. Everything else that is bad raises ValueError."""
