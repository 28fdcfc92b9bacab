"""Files of models on Hugging Face's hub: of its cache on this machine, or downloaded where the network answers."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

from onceover.base.errors import OnceoverError, first_line
from onceover.base.progress import LOGGER
from onceover.extract.encoders import NETWORK_TIMEOUT, EncoderError, Spec

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo


def hub_file(spec: Spec, repository: str, names: Sequence[str], what: str, instead: str) -> Path:
    """The first of some files that a repository has.

    Args:
        what: these files are, for the error. instead: what can be done without a network, for the error.

    Raises:
        EncoderError: none is in the cache, and none can be downloaded.
    """
    from huggingface_hub import hf_hub_download

    for name in names:
        cached = cached_file(spec, repository, name)
        if cached is not None:
            return cached
    with downloading(spec, repository, f"{what} are", instead) as info:
        available = {sibling.rfilename for sibling in info.siblings or []}
        for name in names:
            if name in available:
                LOGGER.debug("downloading %s of %s", name, repository)
                return Path(hf_hub_download(repository, name))
        raise FileNotFoundError(f"it has none of {', '.join(names)}")


def cached_file(spec: Spec, repository: str, name: str) -> Path | None:
    """The place of a repository's file in the cache, of the revision that ``spec`` names; None where it is not there.

    Raises:
        EncoderError: no repository can have that name.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(repository, name, revision=spec.revision)
    except HFValidationError as error:
        raise EncoderError(f"{spec.text}: there is no such folder, and no model can have that name") from error
    return Path(cached) if isinstance(cached, str) else None


@contextlib.contextmanager
def downloading(spec: Spec, repository: str, what: str, instead: str) -> Iterator["ModelInfo"]:
    """What the hub knows of a repository, once it has answered; within, files are downloaded from it.

    Args:
        what: begins the error: "the weights are". instead: ends it, with what can be done without a network.

    Raises:
        EncoderError: the hub does not answer within seconds, has no such repository, or the download fails.
    """
    from huggingface_hub import model_info

    try:
        yield model_info(repository, revision=spec.revision, timeout=NETWORK_TIMEOUT)
    except OnceoverError:
        raise
    except Exception as error:  # whatever the network stack raises, the user needs the same ways out
        raise EncoderError(
            f"{spec.text}: {what} not in the Hugging Face cache, and {repository} cannot be downloaded "
            f"({type(error).__name__}: {first_line(error)}); {instead}"
        ) from error


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Keeps huggingface_hub from the network: within, it finds what is on this machine, and fails at once else."""
    from huggingface_hub import constants

    with patch.object(constants, "HF_HUB_OFFLINE", True):
        yield
