"""What a user installs."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import manic

ROOT = Path(__file__).parents[1]
PROGRAM = """
import torch, manic
from manic import Mechanic, Updater, mechanize, is_mechanized
weight = torch.nn.Parameter(torch.ones(2))
updater = Updater(torch.optim.SGD([weight], lr=1.0))
mechanic = Mechanic(updater)
for _ in range(3):
    weight.grad = weight.detach().clone()
    mechanic.step()
    updater.step()
assert is_mechanized(mechanize(torch.optim.SGD)([weight], lr=1.0))
assert float(mechanic.scale) > 0
print(manic.__file__)
"""


def test_the_wheel_works_elsewhere(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert "manic/py.typed" in names
    assert "manic/opt_list/nadamw.csv" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"manic"}  # no examples, no tests
    metadata = next((tmp_path / "site").glob("*.dist-info/METADATA")).read_text()
    assert f"Version: {manic.__version__}\n" in metadata
    versions = re.findall(r"^Classifier: .* (3\.\d+)$", metadata, re.MULTILINE)
    assert f"on Python {', '.join(versions[:-1])} and {versions[-1]}\n" in metadata  # as the README says
    links = re.findall(r"\]\(([^)]*)\)", metadata)
    assert any(link.endswith("docs/quality.md") for link in links)
    assert all(link.startswith(("https://", "#")) for link in links)  # those of the README lead somewhere on PyPI
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert [line.split()[1].split(">")[0] for line in required] == ["torch"]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin"},
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert Path(done.stdout.strip()).is_relative_to(tmp_path)
