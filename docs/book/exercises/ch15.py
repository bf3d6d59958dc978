"""Chapter 15, a captioner. Fill in the functions, then: make exercise N=15"""


def rope(x, places):
    """x [B, L, N, K] with rotary positions, places [L]: the pair (x[i], x[i + K/2]) is turned by the angle place · 10000^(-2i/K), i = 0 … K/2 - 1.

    Hint: turning (a, b) by t gives (a cos t - b sin t, b cos t + a sin t).
    """
    raise NotImplementedError


class Cache:
    """Keys and values of a text that grows."""

    def attend(self, q, k, v):
        """Causal attention of the new places, q, k, v [B, L, N, K], to all places so far and themselves; keeps k and v. -> [B, L, N, K]

        Hint: scaled_dot_product_attention takes a boolean attn_mask, true where a key may be seen; its heads come second.
        """
        raise NotImplementedError


def nucleus(logits, p):
    """logits [B, V] with -inf for all but the likeliest that together have at least the share p (0 < p < 1); the likeliest always stays.

    Hint: sort; a token goes if those that are less likely and it itself have at most 1 - p.
    """
    raise NotImplementedError
