"""Whether a file benched over SSH by llama.cpp's own `llama-bench` is as fast as edgelora finds it in its own process.

    python bench/over_ssh.py FILE.gguf LLAMA_CPP/build/bin

A real sshd on loopback, the same machine at both ends, one thread, both from the same release of llama.cpp, an idle machine. What differs is
who measures: llama-bench reads random tokens and takes the mean of a repeat, edgelora reads a text and takes the median of single
tokens; both decode after the same number of tokens. Processes of one program on this machine differ by more than their own
repeats do (where their memory lies), so each side is started anew in turns and its fastest start counts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import results
from click.testing import CliRunner

from edgelora.cli import cli
from tests.device_tools import ssh_server

TURNS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("runner", type=Path)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder, ssh_server(Path(folder)) as server:
        where = ["--device", "here", "--device", f"ssh:{server.host}", "--runner", str(arguments.runner)]
        how = ["--threads", "1", "--prompt-tokens", "128", "--repeats", "3", "--json"]
        for _ in range(TURNS):
            done = CliRunner().invoke(cli, ["bench", str(arguments.file), *where, *how], catch_exceptions=False, standalone_mode=False)
            rows.append(json.loads(done.stdout)["bench"])
    headline = []
    for key, best in (("ttft_ms", min), ("decode_tok_per_s", max)):
        here, there = (best(turn[side][key] for turn in rows) for side in (0, 1))
        every = " ".join(f"{turn[1][key]:.0f}/{turn[0][key]:.0f}" for turn in rows)
        headline.append([key, f"fastest of {TURNS} starts over SSH {there:.1f}, here {here:.1f}: {there / here - 1:+.1%}; each {every}"])
    print(headline)
    results.save("over-ssh", f"python bench/over_ssh.py {arguments.file.name} build/bin", ("llama-cpp-python",), headline, {"turns": rows})


if __name__ == "__main__":
    main()
