"""Files of models on Hugging Face's hub: of its cache on this machine, or downloaded where the network answers."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest.mock import patch

from onceover.base.errors import first_line
from onceover.base.progress import LOGGER
from onceover.extract.encoders import NETWORK_TIMEOUT, EncoderError, Spec


def hub_file(spec: Spec, repository: str, names: Sequence[str], what: str, instead: str) -> Path:
    """The first of some files that a repository has.

    Args:
        what: these files are, for the error. instead: what can be done without a network, for the error.

    Raises:
        EncoderError: none is in the cache, and none can be downloaded.
    """
    from huggingface_hub import hf_hub_download, model_info, try_to_load_from_cache

    for name in names:
        cached = try_to_load_from_cache(repository, name)
        if isinstance(cached, str):
            return Path(cached)
    try:
        siblings = model_info(repository, timeout=NETWORK_TIMEOUT).siblings or []
        available = {sibling.rfilename for sibling in siblings}
        name = next(name for name in names if name in available)
        LOGGER.debug("downloading %s of %s", name, repository)
        return Path(hf_hub_download(repository, name))
    except StopIteration:
        fault = f"it has none of {', '.join(names)}"
    except Exception as error:  # whatever the network stack raises, the user needs the same ways out
        fault = f"{type(error).__name__}: {first_line(error)}"
    raise EncoderError(
        f"{spec.text}: {what} are not in the Hugging Face cache, and {repository} cannot be downloaded "
        f"({fault}); {instead}"
    )


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Keeps huggingface_hub from the network: within, it finds what is on this machine, and fails at once else."""
    from huggingface_hub import constants

    with patch.object(constants, "HF_HUB_OFFLINE", True):
        yield
