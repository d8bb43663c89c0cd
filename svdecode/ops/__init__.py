"""The operators on logits, one file each, registered under `torch.ops.svdecode`; they need torch alone."""

from svdecode.ops import fused_steer, optimal_strength, steer_sample, steer_topk, steered_nll, steering_vector

__all__ = ["fused_steer", "optimal_strength", "steer_sample", "steer_topk", "steered_nll", "steering_vector"]
