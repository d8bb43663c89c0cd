"""A short parameter-efficient fine-tuning run."""
