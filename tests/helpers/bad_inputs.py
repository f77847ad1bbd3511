"""Write the table of bad inputs, ``docs/bad-inputs.md``, from what each call really raises.

Run it after a message has changed: ``python -m tests.helpers.bad_inputs``. A test compares them.
"""

from pathlib import Path
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge

import transformer_lens_bd3lm as bd3lm
from tests.helpers import TOP
from tests.helpers.command import run

PAGE = TOP / "docs" / "bad-inputs.md"

CALLS: dict[str, list[str]] = {
    "A forward pass": [
        "bridge(torch.tensor([[0, 9]]))",
        "bridge(torch.zeros(1, 0, dtype=torch.long))",
        "bridge(torch.zeros(1, 20, dtype=torch.long))",
        "bridge(ids.float())",
        "bridge(ids, clean=ids[:, :2])",
        "bridge(ids, timesteps=float('nan'))",
        "bridge(ids, timesteps=torch.zeros(3))",
        "bridge(ids, attention_mask=torch.tensor([[0, 1, 1, 1]]))",
        "bridge(ids, return_type='loss')",
        "bridge(ids, store_kv=True)",
    ],
    "The block size": [
        "bridge(ids, block_size=0)",
        "bridge(ids, block_size='whole')",
        "bd3lm.set_block_size(bridge, True)",
        "bd3lm.set_block_size('grammar', 4)",
    ],
    "Hooks": [
        "bd3lm.denoise(bridge, ids, hooks=[('blocks.0.hook_rezid_post', hook)])",
        "bd3lm.denoise(bridge, ids, max_new_tokens=2, hooks=[('hook_embed', narrow)])",
        "bd3lm.StepHooks().add('hook_embed', hook, step=-1)",
        "bd3lm.StepHooks().add('hook_embed', hook, scope='all')",
        "bd3lm.exact(bridge, ids, hooks=[('hook_embed', with_step)])",
    ],
    "Writing": [
        "bd3lm.denoise(bridge, ids, max_new_tokens=-1)",
        "bd3lm.denoise(bridge, ids, seed=1, noise=bd3lm.Noise(2))",
        "bd3lm.denoise(bridge, ids, sampler=bd3lm.Ancestral(), temperature=0.5)",
        "bd3lm.FirstHitting(temperature=-1)",
        "bd3lm.FirstHitting(nucleus_p=0)",
        "bd3lm.Ancestral(steps=0)",
        "bd3lm.Noise(seed=-1)",
        "bd3lm.Confidence(k=2, threshold=0.5)",
        "bd3lm.replay(run, mode='same')",
        "bd3lm.fork(run, 99)",
        "bd3lm.Run.load('no-such-folder', bridge)",
    ],
    "Likelihoods": [
        "bd3lm.exact(bridge, ids.masked_fill(ids == 1, 7))",
        "bd3lm.exact(bridge, ids, rows=0)",
        "bd3lm.exact(bridge, long, 'full', max_states=10)",
        "bd3lm.nelbo(bridge, ids, method='guess')",
        "bd3lm.likelihood(bridge, 3)",
        "bd3lm.likelihood(bridge, Path('no-such-file.txt'))",
        "bd3lm.likelihood(bridge, ['a b'], stride=99)",
    ],
    "Files and models": [
        "bd3lm.denoise(3)",
        "bd3lm.boot_lightning('no-such.ckpt')",
        "bd3lm.load_sae('no-such-folder')",
        "bd3lm.Harvest.load('no-such-folder')",
        "bd3lm.harvest(bridge, ['a'], ['hook_embed'], distribution='all', out='new')",
        "run.to_html('no-such-folder/page.html')",
    ],
}  # fmt: skip

LINES = [
    "bd3lm exat tiny",
    "bd3lm info tinny",
    "bd3lm exact tiny",
    "bd3lm exact tiny --text a --block-size four",
    "bd3lm generate tiny a --max-new-tokens 0",
    "bd3lm generate tiny a --temperature warm",
    "bd3lm generate tiny a --sampler best",
    "bd3lm generate tiny a --steps 3",
    "bd3lm likelihood tiny --file no-such-file.txt",
    "bd3lm report no-such-folder",
    "bd3lm exact tiny --text a --plot picture.bmp",
    "bd3lm exact tiny --text a --device gpu",
]

HEAD = """# Bad inputs and their messages

After this page you know how a mistake is answered. Each line is a call and the message that it
really raises: the argument and its value, the rule, and the way out. Nothing has been changed when
it is raised. [errors.md](errors.md) explains the classes; `python -m tests.helpers.bad_inputs`
writes the table, and a test compares it.

The calls share a bridge of the embedded grammar model, which has a context of 8 tokens and as many
words:

```python
import torch
import transformer_lens_bd3lm as bd3lm
from transformer_lens.model_bridge import TransformerBridge

bridge = TransformerBridge.boot_transformers(bd3lm.GRAMMAR)
ids = torch.tensor([[0, 1, 2, 3]])
try:
    bridge(ids, block_size=0)
except bd3lm.BlockSizeError as error:
    print(error)                          # {message}
```
"""


def namespace() -> dict[str, Any]:
    """What the calls use."""
    bridge = TransformerBridge.boot_transformers(bd3lm.GRAMMAR, device="cpu")
    ids = torch.tensor([[0, 1, 2, 3]])
    return {
        "bridge": bridge, "bd3lm": bd3lm, "torch": torch, "Path": Path, "ids": ids,
        "long": torch.cat([ids, ids[:, 1:], ids[:, 1:2]], dim=1),
        "hook": lambda x, hook: None, "narrow": lambda x, hook: x[..., :1],
        "with_step": lambda x, hook, step: None,
        "run": bd3lm.denoise(bridge, ids, max_new_tokens=2),
    }  # fmt: skip


def raised(call: str, names: dict[str, Any]) -> tuple[str, str]:
    """Return the class and message of the error of a call.

    Raises:
        AssertionError: if it raises none.
    """
    try:
        eval(call, names)
    except bd3lm.BD3LMError as error:
        return type(error).__name__, str(error)
    raise AssertionError(f"{call} is no bad input: it raises nothing")


def page() -> str:
    """Return the page as text."""
    names = namespace()
    parts = [HEAD.replace("{message}", raised("bridge(ids, block_size=0)", names)[1])]
    for title, calls in CALLS.items():
        parts.append(f"## {title}\n\n| call | error | message |\n|---|---|---|")
        for call in calls:
            error, message = raised(call, names)
            cells = f"`{call}`", f"`{error}`", message
            shown = (cell.replace("|", "\\|").replace("\n", " ") for cell in cells)
            parts.append(f"| {' | '.join(shown)} |")
        parts.append("")
    parts.append("## The command line\n\nEach ends with exit status 2, before a model is loaded.\n")
    parts.append("| line | message |\n|---|---|")
    for line in LINES:
        ended = run(*line.split()[1:])
        assert ended.exit_code == 2, line
        message = ended.stderr.splitlines()[0].removeprefix("error: ")
        parts.append(f"| `{line}` | {message} |".replace("\n", " "))
    return "\n".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
