"""Files of models on Hugging Face's hub: of its cache on this machine, or downloaded where the network answers."""

from collections.abc import Sequence
from pathlib import Path

from onceover.base.errors import first_line
from onceover.base.progress import LOGGER
from onceover.extract.encoders import NETWORK_TIMEOUT, EncoderError, Spec


def hub_file(spec: Spec, repository: str, names: Sequence[str], instead: str) -> Path:
    """The first of some files that a repository has.

    Args:
        instead: what can be done without a network, for the error.

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
        f"{spec.text}: the weights are not in the Hugging Face cache, and {repository} cannot be downloaded "
        f"({fault}); {instead}"
    )
