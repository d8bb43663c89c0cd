"""From the statistics of gold tokens to one strength, and the record of it. No model."""
