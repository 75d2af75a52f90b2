"""Engines that the tools run, each in a process of its own."""
