"""Two models' logits from one forward, behind the interface of a transformers model."""
