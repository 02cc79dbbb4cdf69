"""Where a result comes from: versions, machine, git commit."""

import os
import platform
import subprocess
from pathlib import Path

import torch


def provenance():
    """{"versions": {...}, "commit": str or None}, as config.json stores them."""
    processor = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {"processor": processor, "cores": os.cpu_count()}
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
        commit = git.stdout.strip() or None
    except OSError:  # no git on this machine
        commit = None
    return {"versions": versions, "commit": commit}
