"""``Run.load``: a saved run, whose manifest has a digest; half of the inputs get a right one."""

import functools
import json
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

import transformer_lens_bd3lm as bd3lm
from tests.fuzz.engine import Reader
from tests.helpers import small
from tests.helpers.passes import boot
from transformer_lens_bd3lm.denoising.run_folder import MANIFEST, TENSORS, digest, file_hash


@functools.cache
def bridge() -> Any:
    """A bridge of a tiny model."""
    folder = small.save(Path(mkdtemp(prefix="fuzz-model-")), n_blocks=1, hidden_dim=4, cond_dim=2)
    return boot(folder, torch.device("cpu"))


def make(folder: Path) -> None:
    """Write a run with a record and a stop rule."""
    run = bd3lm.denoise(bridge(), "w1 w2", max_new_tokens=6, record=["blocks.0.hook_resid_post"],
                        stop=bd3lm.EndOfText(), sampler=bd3lm.Ancestral(steps=3))  # fmt: skip
    run.save(folder / "run")
    for file in (folder / "run").iterdir():
        file.rename(folder / file.name)
    (folder / "run").rmdir()


def mend(folder: Path) -> None:
    """Make the digests right, as somebody would who edits a run on purpose."""
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
        content["tensors_bytes"] = (folder / TENSORS).stat().st_size
        content["tensors_sha256"] = file_hash(folder / TENSORS)
        content["sha256"] = digest(content)
        (folder / MANIFEST).write_text(json.dumps(content))
    except (ValueError, TypeError, OSError, RecursionError, OverflowError):
        return


def read(folder: Path) -> None:
    """Load it, read every part of it, and replay it pinned."""
    run = bd3lm.Run.load(folder, bridge())
    repr(run), run.text, run.to_dict(), len(run.steps), run.tokens
    for step in run.steps:
        repr(step)
    run.table()
    if not run.request.unsaved:
        bd3lm.replay(run, mode="pinned")


READER = Reader((MANIFEST, TENSORS), make, read, mend)
