"""The schedule of a fit: how many epochs it has, and the learning rate of each step. numpy only."""

import dataclasses
import math

from onceover.configs.schema import Config, FinetuneConfig, TrainingConfig

MOST_EPOCHS = 30  # from 4,000 images on, and where an epoch is a single step
MANY_IMAGES = 4000


def usual_epochs(images: int, batch_size: int) -> int:
    """How many epochs a fit on so many train images needs, where ``training.num_epochs`` does not say.

    They grow with the root of the number of images, as it was measured (docs/notes/few-images.md): 15 for 1,000
    images, 30 for 4,000 and more; and there are at least 30 steps.
    """
    by_images = MOST_EPOCHS * math.sqrt(images / MANY_IMAGES)
    by_steps = MOST_EPOCHS / math.ceil(images / batch_size)
    return min(MOST_EPOCHS, math.ceil(max(by_images, by_steps)))


def with_epochs(config: Config, images: int) -> Config:
    """The settings with a number of epochs for so many train images, if they do not name one."""
    training = config.training
    if training.num_epochs is not None:
        return config
    epochs = usual_epochs(images, training.batch_size)
    return dataclasses.replace(config, training=dataclasses.replace(training, num_epochs=epochs))


def learning_rate(step: int, total: int, config: TrainingConfig | FinetuneConfig) -> float:
    """The learning rate of a step: linear warm-up, then a cosine to zero (Loshchilov and Hutter 2017).

    Args:
        step: counted from 0 over all epochs. total: steps of all epochs.
    """
    warmup_steps = round(config.warmup * total)
    if step < warmup_steps:
        return config.learning_rate * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total - warmup_steps)
    progress = min(1.0, progress)  # chunks can make an epoch a few steps longer
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
