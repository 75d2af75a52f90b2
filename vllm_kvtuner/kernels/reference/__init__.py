"""Reference of every kernel in torch; on a CPU, the implementation itself."""
