"""The examples, run as a person runs them."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

EXAMPLES = Path(__file__).parents[1] / "src" / "examples"


def run(*arguments: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", *map(str, arguments)],
        cwd=cwd,
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.stdout


def test_fully_connected(tmp_path: Path) -> None:
    script = EXAMPLES / "fully_connected" / "main.py"
    out = run(script, "--steps", "150", "--seeds", "1", "--figure", tmp_path / "figure.png", cwd=tmp_path)
    accuracy = {m[1]: float(m[2]) for m in re.finditer(r"^(.+?), lr.*?([\d.]+)%", out, re.MULTILINE)}
    assert accuracy["manic"] > 85
    assert accuracy["manic"] > accuracy["AdamW"] + 30  # the last rows are those at the wrong lr
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_char_lm_loses_nothing_to_a_kill(tmp_path: Path) -> None:
    script = EXAMPLES / "char_lm" / "main.py"
    arguments = ["--steps", "60", "--warmup", "10", "--save-every", "10"]
    whole = run(script, *arguments, "--checkpoint", tmp_path / "whole.pt", cwd=tmp_path)

    killed = tmp_path / "killed.pt"
    command = [sys.executable, str(script), *arguments, "--checkpoint", str(killed)]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not killed.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    step = torch.load(killed, weights_only=True)["step"]
    assert 10 <= step < 60

    resumed = run(script, *arguments, "--checkpoint", killed, "--resume", cwd=tmp_path)
    assert f"resumed after step {step}" in resumed
    a, b = (torch.load(path, weights_only=True) for path in (tmp_path / "whole.pt", killed))
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    assert whole.splitlines()[-1] == resumed.splitlines()[-1]
    assert float(whole.split()[-4]) < 4.0  # nats per byte; 5.5 at the start
