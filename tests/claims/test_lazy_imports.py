"""What only some users need is imported when it is needed, or never."""

import json
import subprocess
import sys

from tests.helpers import FIXTURES, TOP

SCRIPT = """
import json, sys
import transformer_lens_bd3lm as bd3lm

LAZY = ("conllu", "lm_eval", "matplotlib", "omegaconf", "plotly", "pytorch_lightning", "stanza")
loaded = {}

def done(what):
    loaded[what] = [name for name in LAZY if name in sys.modules]

done("import")

class Nobody:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("omegaconf", "pytorch_lightning", "lightning", "nowhere"):
            raise AssertionError(f"{name} was imported")

sys.meta_path.insert(0, Nobody())
assert bd3lm.boot_lightning(sys.argv[1], device="cpu").cfg.n_layers == 2
done("boot_lightning")
sys.meta_path.pop(0)

from transformer_lens_bd3lm.analysis.by_depth import read_conllu
read_conllu("1\\tw1\\t_\\tX\\t_\\t_\\t0\\troot\\t_\\t_\\n\\n")
done("read_conllu")

assert bd3lm.lm_eval.BD3LM.__name__ == "BD3LM"
assert not hasattr(bd3lm, "lm_evil")
done("lm_eval")
print(json.dumps(loaded))
"""


def test_optional_and_slow_libraries_are_imported_at_first_use():
    command = [sys.executable, "-c", SCRIPT, str(FIXTURES / "lightning" / "best.ckpt")]
    ended = subprocess.run(command, cwd=TOP, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    loaded = json.loads(ended.stdout.splitlines()[-1])
    assert loaded["import"] == loaded["boot_lightning"] == []
    assert loaded["read_conllu"] == ["conllu"]
    assert "lm_eval" in loaded["lm_eval"]
