"""The one place where the seeds of fits and fine-tunings come from.

A random choice depends on (seed, purpose, epoch) alone, so that an interrupted fit resumes bit for bit without storing
a generator's state, and two fits with one seed on one machine are equal. Two fine-tunings on a GPU may differ in the
last bits: the gradients of convolutions and attention are summed in no fixed order there.
"""

import numpy as np

_PURPOSES = ("initialisation", "order", "noise", "shuffle", "crops", "words")


def seed_for(seed: int, purpose: str, epoch: int = 0) -> int:
    """A 63-bit seed for one purpose in one epoch.

    Args:
        seed: the setting. purpose: ``initialisation``, ``order``, ``noise``, ``shuffle``, ``crops`` or ``words``.
    """
    sequence = np.random.SeedSequence([seed, _PURPOSES.index(purpose), epoch])
    return int(sequence.generate_state(1, np.uint64)[0]) >> 1
