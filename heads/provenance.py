"""What a run says of itself, for all who need neither its heads nor torch, which takes memory and seconds to load."""

from pathlib import Path

from configs import OnceoverError
from configs.formats import FINETUNED, PROVENANCE, RESUME, RUN_FORMAT, RUN_VERSION
from extract.files import read_json


class RunError(OnceoverError):
    """A run folder that is missing, unfinished, damaged, or of other settings or features."""


def read_provenance(folder: str | Path) -> dict:
    """What ``run.json`` says, without loading the heads.

    Raises:
        RunError: no finished run there.
    """
    folder = Path(folder)
    if not (folder / PROVENANCE).is_file():
        if (folder / FINETUNED).is_file():
            raise RunError(
                f"the encoders in {folder} are fine-tuned, and no features of theirs are there yet; run the same "
                "finetune command again with --re-extract"
            )
        if (folder / RESUME).is_file():
            raise RunError(f"the fit in {folder} was interrupted; run the same fit command again to go on with it")
        raise RunError(f"{folder} is no run folder; make one: python cli.py fit --store FILE.h5 --run {folder}")
    provenance = read_json(folder / PROVENANCE, "the run's provenance")
    if (provenance.get("format"), provenance.get("format_version")) != (RUN_FORMAT, RUN_VERSION):
        raise RunError(f"{folder / PROVENANCE} is not of this program's format {RUN_VERSION}; fit again")
    return provenance
