"""The README's Python runs as it stands, and its commands are the ones in use."""

import pathlib
import re
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.splitlines()[-1][:40])
def test_python_blocks_run(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(compile(block, "README.md", "exec"), scope)
    if "loss_fn" in scope:
        assert float(scope["loss"]) < 0.05


def test_the_test_command_is_the_one_of_ci():
    pattern = (ROOT / ".ci" / "run").read_text().split("grep -m1 -- '")[1].split("'")[0]
    found = subprocess.run(
        ["grep", "-c", "--", pattern, "README.md"], cwd=ROOT, capture_output=True
    )
    assert found.stdout.strip() == b"1"
