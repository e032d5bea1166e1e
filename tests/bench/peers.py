"""The environment of the peers: TRL and accelerate, beside Temper's own environment and never in it.

build/bench-peers/    a venv that sees Temper's packages through a .pth file: the same torch and transformers for everybody
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

REQUIREMENTS = Path(__file__).with_name("peers.txt")
FOLDER = REQUIREMENTS.parents[2] / "build" / "bench-peers"


def peers_python() -> Path:
    """The interpreter of the peers, made and installed at the first call (and anew when peers.txt has changed)."""
    python, stamp = FOLDER / "bin" / "python", FOLDER / ".ready"
    if stamp.exists() and stamp.read_text() == REQUIREMENTS.read_text():
        return python
    stamp.unlink(missing_ok=True)
    print("installing the peers (a minute) ...", flush=True)
    subprocess.run([sys.executable, "-m", "venv", FOLDER], check=True)
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    Path(site, "temper.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", REQUIREMENTS], check=True)
    stamp.write_text(REQUIREMENTS.read_text())
    return python
