"""Calibration: from a model and a memory budget to a precision profile."""
