"""One file per op: ``python -m pytest benchmarks/ops``; ``python -m benchmarks.ops.table`` shows a record."""
