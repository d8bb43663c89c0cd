"""Rows of files and data sets, prompts and completions, and padded batches of them."""
