"""Step Law: the best learning rate and batch of AdamW for a language model of N parameters on D tokens.

Li et al. 2025, "Predictable Scale: Part I". N counts no embeddings; fitted from 60M parameters on, so that below it is
an extrapolation. The optimum is flat.
"""


def learning_rate(n: float, d: float) -> float:
    """1.79 N^-0.713 D^0.307, the peak of the schedule."""
    return 1.79 * n**-0.713 * d**0.307


def batch_tokens(d: float) -> float:
    """0.58 D^0.571 tokens in a batch."""
    return 0.58 * d**0.571
