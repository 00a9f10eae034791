"""Environments of their own for libraries that flowmm is measured against; flowmm depends on none of them.

``python benchmarks/peers/build.py`` makes ``runs/peers/kvpress`` from the package index. mllm-kvcompress is in none:
give a copy of its repository, ``--source mllm-kvcompress=DIRECTORY``, and it is made, too. ``run.py`` measures what
is there.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

ENVIRONMENTS = Path(__file__).parents[2] / "runs" / "peers"
# The newest transformers that each works with; None: flowmm's own.
TRANSFORMERS = {"kvpress": "5.2.0", "mllm-kvcompress": None}
REQUIREMENTS = {"kvpress": "kvpress==0.5.5", "mllm-kvcompress": None}


def python_of(environment: Path) -> Path:
    """Its interpreter."""
    return environment / ("Scripts" if os.name == "nt" else "bin") / "python"


def requirements(peer: str, source: str | None) -> list[str]:
    """What pip is asked for: the peer, and the same torch as flowmm runs on.

    Raises:
        SystemExit: the peer is in no package index, and no copy of it is given.
    """
    named = source or REQUIREMENTS[peer]
    if named is None:
        raise SystemExit(f"{peer} is in no package index; give a copy of its repository: --source {peer}=DIRECTORY")
    if source is not None and not Path(source).exists():
        raise SystemExit(f"--source {peer}={source}: found no such file or directory")
    host = TRANSFORMERS[peer] or transformers.__version__
    return [named, f"torch=={torch.__version__.partition('+')[0]}", f"transformers=={host}"]


def build(environment: Path, wanted: Sequence[str], pip_args: Sequence[str] = ()) -> None:
    """Make an environment anew, with what is wanted in it.

    Raises:
        SystemExit: it cannot be made; says which step failed and how it ended.
    """
    steps = [
        [sys.executable, "-m", "venv", "--clear", str(environment)],
        [str(python_of(environment)), "-m", "pip", "install", "--quiet", *pip_args, *wanted],
    ]
    for step in steps:
        status = subprocess.run(step, check=False).returncode
        if status != 0:
            raise SystemExit(f"{environment}: '{' '.join(step[1:])}' ended with status {status}; see above")
    print(environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="append", choices=list(REQUIREMENTS), help="default: kvpress and every source")
    parser.add_argument("--source", action="append", default=[], metavar="PEER=PATH", help="install from there")
    parser.add_argument("--at", type=Path, default=ENVIRONMENTS, help="where environments are made")
    parser.add_argument("pip_args", nargs="*", help="further arguments of pip install, after --")
    arguments = parser.parse_args()
    sources = dict(text.partition("=")[::2] for text in arguments.source)
    unknown = set(sources) - set(REQUIREMENTS)
    if unknown:
        parser.error(f"--source {', '.join(sorted(unknown))}: expected {' or '.join(REQUIREMENTS)}")
    peers = arguments.peer or sorted({"kvpress", *sources})
    # What cannot be had is said before anything is built.
    wanted = {peer: requirements(peer, sources.get(peer)) for peer in peers}
    for peer in peers:
        build(arguments.at / peer, wanted[peer], arguments.pip_args)


if __name__ == "__main__":
    main()
