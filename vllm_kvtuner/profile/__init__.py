"""Precision profiles: reading, checking, and meeting a model."""
