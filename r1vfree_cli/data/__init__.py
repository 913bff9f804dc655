"""Data: sources become rows, rows become parquet, and every stage reads rows back from there."""
