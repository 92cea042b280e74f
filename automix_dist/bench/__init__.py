"""Benchmarks, one subject a file; `automix bench NAME` runs them."""
