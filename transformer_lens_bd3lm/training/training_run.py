"""State of a training run, and its optimizer step.

All randomness of a step comes from (seed, step). So a run that was stopped and resumed ends with
the same weights as one that was not, bit for bit on a CPU with the same number of threads.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from transformer_lens_bd3lm.checkpoint.pretrained import BD3LM
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.training.closed_form_loss import nelbo_loss
from transformer_lens_bd3lm.training.data import Rows
from transformer_lens_bd3lm.training.folder import whole_files, write_tensors
from transformer_lens_bd3lm.training.recipe import Recipe, learning_rate


class TrainingRun:
    """Weights, their moving average, Adam's moments, the step and the reports so far.

    Args:
        recipe: recipe of the run.
        device: device of the model.
    """

    def __init__(self, recipe: Recipe, device: torch.device | str = "cpu"):
        self.recipe = recipe
        self.device = torch.device(device)
        torch.manual_seed(recipe.seed)
        self.model = BD3LM(recipe.config())
        torch.nn.Module.to(self.model, self.device)
        self.ema = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        decayed = [p for p in self.model.parameters() if p.ndim >= 2]
        plain = [p for p in self.model.parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": recipe.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=recipe.learning_rate,
            betas=(0.9, 0.98),
            fused=True,
        )
        self.step = 0
        self.losses: list[float] = []  # of the steps since the last report
        self.reports: list[dict[str, float]] = []

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor of the state, under a flat name."""
        state = {f"ema/{name}": p for name, p in self.ema.items()}
        for name, p in self.model.named_parameters():
            state[f"model/{name}"] = p.detach()
            for key, value in self.optimizer.state[p].items():
                state[f"{key}/{name}"] = value
        return state

    def save(self, path: Path) -> None:
        """Write the state to a file, whole or not at all.

        Raises:
            OSError: if it cannot be written (a full disk, say); the file is as before then.
        """
        partial = path.with_suffix(".partial")
        metadata = {"step": str(self.step), "recipe": json.dumps(asdict(self.recipe))}
        metadata |= {"losses": json.dumps(self.losses), "reports": json.dumps(self.reports)}
        write_tensors({k: v.contiguous() for k, v in self.tensors().items()}, partial, metadata)
        os.replace(partial, path)

    def load(self, path: Path) -> None:
        """Replace the state by a saved one.

        Raises:
            InputError: if another recipe wrote it, or it is damaged.
        """
        try:
            self._load(path)
        except SafetensorError as error:
            raise InputError(
                f"{path} cannot be read as the state of a run ({error}): remove it to train anew"
            ) from error

    def _load(self, path: Path) -> None:
        with safe_open(path, framework="pt") as saved:
            metadata = saved.metadata() or {}
            recipe = json.loads(metadata.get("recipe", "null"))
            if recipe != json.loads(json.dumps(asdict(self.recipe))):
                raise InputError(
                    f"{path} was written by another recipe: use another folder, or remove it"
                )
            self.step = int(metadata["step"])
            self.losses = json.loads(metadata.get("losses", "[]"))
            self.reports = json.loads(metadata.get("reports", "[]"))
            for name, p in self.model.named_parameters():
                p.data.copy_(saved.get_tensor(f"model/{name}"))
                self.ema[name].copy_(saved.get_tensor(f"ema/{name}"))
                self.optimizer.state[p] = {
                    key: saved.get_tensor(f"{key}/{name}").to(p.device)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }

    def advance(self, draw: Rows) -> tuple[int, float]:
        """Make one optimizer step; return the block size drawn and the loss in nats a token."""
        recipe = self.recipe
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + self.step)
        torch.manual_seed(recipe.seed * 1_000_003 + self.step)
        choice = int(torch.randint(len(recipe.block_sizes), (), generator=generator))
        block_size = recipe.block_sizes[choice]
        x_0 = draw(recipe.batch, generator).to(self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(recipe, self.step)
        self.model.train()
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=recipe.autocast):
            loss = nelbo_loss(self.model, x_0, block_size, generator)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(recipe.ema, (1 + self.step) / (10 + self.step))
        for name, p in self.model.named_parameters():
            self.ema[name].lerp_(p.detach(), 1 - decay)
        self.losses.append(loss.item())
        return block_size, self.losses[-1]

    def report(self, validation: dict[str, float]) -> dict[str, float]:
        """Close a stretch of steps: note its mean loss and validation losses, and return them."""
        mean = sum(self.losses) / len(self.losses)
        self.reports.append({"step": self.step, "loss": mean} | validation)
        self.losses.clear()
        return self.reports[-1]

    @torch.no_grad()
    def validate(self, draw: Rows, block_size: int, rows: int = 64) -> float:
        """Estimate the NELBO of the averaged weights, in nats a token, on fixed rows and masks."""
        generator = torch.Generator().manual_seed(12345)
        own = {name: p.data for name, p in self.model.named_parameters()}
        for name, p in self.model.named_parameters():
            p.data = self.ema[name]
        self.model.eval()
        loss = nelbo_loss(self.model, draw(rows, generator).to(self.device), block_size, generator)
        for name, p in self.model.named_parameters():
            p.data = own[name]
        return loss.item()

    def export(self, folder: Path) -> None:
        """Write the averaged weights as a checkpoint: float16 on disk, float32 when loaded."""
        model = BD3LM(self.recipe.config())
        model.load_state_dict(self.ema, strict=False)
        state = {
            name: (p if name.endswith("inv_freq") else p.half()).contiguous()
            for name, p in model.state_dict().items()
        }
        with whole_files(folder) as draft:
            model.config.save_pretrained(draft)
            write_tensors(state, draft / "model.safetensors", {"format": "pt"})
