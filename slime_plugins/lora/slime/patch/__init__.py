"""Putting the calls into a slime checkout and taking them out again. Stdlib only."""
