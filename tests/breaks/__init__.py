"""The breaks of tests/hazards.py, by the room that they are in."""
