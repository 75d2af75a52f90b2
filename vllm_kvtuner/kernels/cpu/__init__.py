"""Store, gather and attention on a CPU, compiled by the user's C++ compiler when they are first used."""
