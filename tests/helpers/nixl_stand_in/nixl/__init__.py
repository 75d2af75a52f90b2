"""A stand-in for NIXL on one Linux machine, for tests where its library is not installed: see ``_api``."""
