"""Pre-trained model, warm start, SVDecode and its ablations on the same questions, with paired intervals."""
