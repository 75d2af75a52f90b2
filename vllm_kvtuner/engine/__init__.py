"""One run of an engine: its configuration, checks, statics and metrics."""
