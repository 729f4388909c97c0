"""Whether a file benched over SSH by llama.cpp's own `llama-bench` is as fast as edgelora finds it in its own process.

    python bench/over_ssh.py FILE.gguf LLAMA_CPP/build/bin

A real sshd on loopback, the same machine at both ends, both from the same release of llama.cpp, one thread, an idle machine.
What differs is who measures: llama-bench reads random tokens and takes the mean of a repeat, edgelora reads a text and takes the
median of single tokens; both decode after the same number of tokens.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("runner", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ssh_server(Path(folder)) as server:
        where = ["--device", "here", "--device", f"ssh:{server.host}", "--runner", str(arguments.runner)]
        how = ["--threads", "1", "--prompt-tokens", "128", "--repeats", "5", "--json"]
        done = CliRunner().invoke(cli, ["bench", str(arguments.file), *where, *how], catch_exceptions=False, standalone_mode=False)
    found = json.loads(done.stdout)
    here, there = found["bench"]
    headline = [
        [key, f"here {here[key]:.1f}, over SSH {there[key]:.1f}: {there[key] / here[key] - 1:+.1%}"]
        for key in ("ttft_ms", "decode_tok_per_s")
    ]
    headline += [["disturbed", f"here: {here['noisy_why'] or 'no'}; over SSH: {there['noisy_why'] or 'no'}"]]
    print(headline)
    results.save(
        "over-ssh", "python bench/over_ssh.py smol-q8_0.gguf build/bin", ("llama-cpp-python",), headline, {"bench": found["bench"]}
    )


if __name__ == "__main__":
    main()
