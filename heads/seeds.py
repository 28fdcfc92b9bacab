"""The one place where the seeds of a fit come from.

Every random choice is decided by (seed, purpose, epoch) alone, so that an interrupted fit needs no generator's state to
go on bit for bit, and two fits of one seed on one machine are the same. Two fine-tunings on a card may differ in the
last bits: the ways back through convolutions and attention add up in no fixed order there.
"""

import numpy as np

_PURPOSES = ("initialisation", "order", "noise", "shuffle", "crops", "words")


def seed_for(seed: int, purpose: str, epoch: int = 0) -> int:
    """A 63-bit seed for initialisation, the order, noise, crops or words of an epoch, or the control's shuffle."""
    return int(np.random.SeedSequence([seed, _PURPOSES.index(purpose), epoch]).generate_state(1, np.uint64)[0] >> 1)
