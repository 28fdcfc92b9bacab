"""Malicious files: each would run code, reach outside itself, or wait for ever. None may, whatever the command says."""

import hashlib
import os
from collections.abc import Callable

from reliability.contents import Snapshot, digests
from reliability.hostile_code import (
    encoder_folder,
    pickled_array,
    pickled_resume,
    pickled_trial,
    pickled_weights,
    postscript,
    python_in_settings,
    tokenizer_of_run,
    tokenizer_of_store,
)
from reliability.hostile_files import (
    compressed_bomb,
    external_link,
    external_storage,
    fifo_as_image,
    fifo_as_store,
    fifo_as_text,
    huge_dataset,
    large_images,
    linked_embeddings,
    virtual_dataset,
    zip_bomb,
    zip_link,
    zip_names,
    zip_slips,
)
from reliability.session import Session
from reliability.traps import SECRET, Commands, Trap
from reliability.trials import Command, Verdict, ending

WAIT_SECONDS = 15.0
CASES: dict[str, Callable[[Trap], Commands]] = {
    case.__name__: case
    for case in (
        pickled_resume,
        pickled_trial,
        pickled_weights,
        pickled_array,
        tokenizer_of_run,
        tokenizer_of_store,
        encoder_folder,
        postscript,
        zip_slips,
        zip_names,
        zip_link,
        zip_bomb,
        external_storage,
        external_link,
        virtual_dataset,
        huge_dataset,
        compressed_bomb,
        linked_embeddings,
        fifo_as_store,
        fifo_as_image,
        fifo_as_text,
        python_in_settings,
        large_images,
    )
}
REFUSED = ("zip_slips", "zip_link", "zip_bomb", "huge_dataset", "linked_embeddings", "pickled_array")


def try_case(session: Session, name: str) -> Verdict:
    """Runs the commands on a malicious file: no code runs, nothing outside is read or written, all end."""
    trap = Trap(session)
    commands = CASES[name](trap)
    before = {path: value for path, value in digests(trap.outside).items() if trap.folder not in path.parents}
    inputs = Snapshot(trap.folder)
    archives: tuple = ()
    if (trap.folder / "a.zip").exists():
        sha = hashlib.md5((trap.folder / "a.zip").read_bytes()).hexdigest()
        address = f"{session.address}/{(trap.folder / 'a.zip').relative_to(trap.base.folder)}"
        archives = ((address, sha, "Flicker8k_Dataset"),)
    environment = {"PATH": f"{trap.programs}{os.pathsep}{os.environ['PATH']}"}
    verdict = Verdict("right")
    for arguments in commands:
        command = Command(
            tuple(str(part) for part in arguments),
            folder=str(trap.folder),
            environment=environment,
            stdin=str(trap.yes),
            wait_seconds=WAIT_SECONDS,
            archives=archives,
        )
        ended = session.run(command)
        if trap.mark.exists():
            return Verdict("let in", f"{arguments[0]} ran its code")
        ended_so = ending(ended)
        if ended_so and ended_so.is_fault:
            return Verdict(ended_so.outcome, f"{arguments[0]}: {ended_so.detail}")
        if ended_so is None and name in REFUSED and arguments[0] != "info":
            return Verdict("let in", f"{arguments[0]} takes it")
        verdict = ended_so or verdict
    after = {path: value for path, value in digests(trap.outside).items() if trap.folder not in path.parents}
    if before != after:
        return Verdict("let in", f"files outside have changed: {sorted(map(str, before.keys() ^ after.keys()))}")
    for path in trap.folder.rglob("*"):
        is_new = path not in inputs.files and path.is_file()
        if is_new and path.stat().st_size < 2**24 and SECRET in path.read_bytes():
            return Verdict("let in", f"{path.relative_to(trap.folder)} holds the secret")
    return verdict
