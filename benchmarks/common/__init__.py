"""What several benchmarks share: cells of results, tables, contestants."""
