"""The thin decoding loop: the paper's Algorithm 1."""
