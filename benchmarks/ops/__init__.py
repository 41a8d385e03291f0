"""Cases of the ops, one file for each; ``bench_ops.py`` runs them under pytest-benchmark."""
