"""The schedule of a fit: the size of its batches, how many epochs it has, and the learning rate of each step."""

import dataclasses
import math

from onceover.configs.schema import Config, FinetuneConfig, TrainingConfig

EPOCHS = (15, 30)  # the fewest, for 1,000 images, and the most, for 4,000
BATCH_SIZES = (64, 256)  # of up to 512 images, and of 2,048 and more
MIN_STEPS = 120  # of a fit, unless it has the most epochs


def scheduled(config: Config, images: int) -> Config:
    """The settings with a batch size and a number of epochs for so many train images, where they name none."""
    training = config.training
    batch_size = training.batch_size or usual_batch_size(images)
    epochs = training.num_epochs or usual_epochs(images, batch_size)
    return dataclasses.replace(config, training=dataclasses.replace(training, batch_size=batch_size, num_epochs=epochs))


def usual_batch_size(images: int) -> int:
    """An eighth of the train images, within bounds; measured, as the epochs are (docs/notes/few-images.md)."""
    least, most = BATCH_SIZES
    return min(most, max(least, images // 8))


def usual_epochs(images: int, batch_size: int) -> int:
    """Epochs that grow with the root of the number of train images, within bounds; small datasets have more."""
    fewest, most = EPOCHS
    by_images = math.ceil(most * math.sqrt(images / 4000))
    by_steps = math.ceil(MIN_STEPS / math.ceil(images / batch_size))
    return min(most, max(fewest, by_images, by_steps))


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
