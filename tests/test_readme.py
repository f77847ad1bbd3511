"""Every Python snippet of the README runs, in order, as printed."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_snippets_of_the_readme_run(capsys):
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(snippets) == 3
    names: dict = {}
    exec(snippets[0], names)
    assert "O Romeo, Romeo" in capsys.readouterr().out
    names["x_0"] = names["bridge"].to_tokens("To be, or not to be")
    names["x_t"] = names["x_0"].clone()
    names["x_t"][0, 3] = names["bridge"].cfg.mask_token_id
    for snippet in snippets[1:]:
        exec(snippet, names)
    assert names["bridge"].cfg.block_size == 8
