"""Cases of the ops, one file for each, which pytest-benchmark runs as well."""
