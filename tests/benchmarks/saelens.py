"""Train an SAE of SAELens on a harvest, with its own store of cached activations and trainer.

SAELens needs another TransformerLens than this package, so this runs in an environment of its own
and imports nothing of the package. To make the harvest and the environment, and to run::

    bd3lm harvest tiny --file a.txt --file b.txt --name blocks.2.hook_resid_post \\
        --distribution t-uniform --out out
    python -m venv sae && sae/bin/pip install "sae-lens==6.54.*"
    sae/bin/python tests/benchmarks/saelens.py out blocks.2.hook_resid_post

It prints the versions, and mean squared error and explained variance of the validation part before
and after; it fails if the error does not fall.
"""

import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
from sae_lens import ActivationsStore, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

K, WIDER, BATCH, STEPS = 16, 4, 256, 200


def store_of(folder: Path, name: str, width: int) -> Any:
    """Open cached activations as SAELens does, a row at a time (``context_size=1``)."""
    return ActivationsStore(
        model=torch.nn.Module(), dataset=None, streaming=False, hook_name=name,
        hook_head_index=None, context_size=1, d_in=width, n_batches_in_buffer=8 * BATCH,
        total_training_tokens=BATCH * STEPS, store_batch_size_prompts=BATCH,
        train_batch_size_tokens=BATCH, prepend_bos=False, normalize_activations="none",
        device=torch.device("cpu"), dtype="float32", cached_activations_path=str(folder),
    )  # fmt: skip


@torch.no_grad()
def scores(sae: Any, x: torch.Tensor) -> tuple[float, float]:
    """Return mean squared error and explained variance of the reconstruction."""
    error = (sae.decode(sae.encode(x)) - x).pow(2).sum(-1).mean()
    return float(error), float(1 - error / (x - x.mean(0)).pow(2).sum(-1).mean())


def main() -> None:
    """Train, and print what changed."""
    out, name = Path(sys.argv[1]), sys.argv[2]
    for package in ("sae-lens", "transformer-lens", "datasets", "torch"):
        print(package, importlib.metadata.version(package))
    torch.manual_seed(0)
    validation = store_of(out / "validation", name, width_of(out, name))
    x, ids = validation.get_raw_llm_batch()
    print(f"{name}: activations {list(x.shape)}, token ids {list(ids.shape)}")
    train = store_of(out / "train", name, x.shape[1])
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=x.shape[1], d_sae=WIDER * x.shape[1], k=K))
    before = scores(sae, x)
    settings = SAETrainerConfig(
        total_training_samples=BATCH * STEPS, train_batch_size_samples=BATCH, lr=1e-3, lr_end=1e-3
    )
    SAETrainer(cfg=settings, sae=sae, data_provider=train).fit()
    after = scores(sae, x)
    for when, (error, explained) in (("before", before), ("after", after)):
        print(f"{when:7s} mean squared error {error:9.3f}   explained variance {explained:7.3f}")
    if not after[0] < 0.7 * before[0]:
        raise SystemExit("the error did not fall")


def width_of(out: Path, name: str) -> int:
    """Return the width of a hook point's activation, from the types of the columns."""
    return datasets.load_from_disk(str(out / "train")).features[name].shape[1]


if __name__ == "__main__":
    main()
