"""Weights stored as codes: a tensor that is a matrix to whoever asks, and dense only while it multiplies."""
