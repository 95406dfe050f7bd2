"""Ahead-of-time compilation: what is traced, what a second process finds in the cache, what is a fault."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton import knobs

from ensdistill.aot import __main__ as aot
from ensdistill.aot import trace as aot_trace
from ensdistill.aot.resources import Resources, format_table, matrix_instructions, read_table, write_table
from ensdistill.config.configs import write_config
from ensdistill.config.recipes import find_recipe
from ensdistill.kernels import launch
from ensdistill.kernels.conv import tiles
from ensdistill.runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
RECIPE = "cifar100-wrn28x4"  # of the committed table, and what CI compiles
GOOD = Resources(
    arch=90,
    kernel="k",
    variant="C=64",
    registers=198,
    stack_bytes=0,
    local_accesses=0,
    shared_bytes=65536,
    shared_limit=232448,
    matrix="HGMMA",
    wide_loads="LDGSTS",
)


def run(*arguments: object, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, that compiles kernels where pytest's interprets them."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT | environment, text=True, capture_output=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def kernels(cache: Path, what: str, arch: int = 90, **environment: str) -> dict[str, Any]:
    return json.loads(run("tests/helpers/aot_kernels.py", cache, what, arch, **environment).stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    cache = tmp_path_factory.mktemp("aot") / "cache"
    return cache, kernels(cache, "good")


def test_launches_that_need_the_same_code_are_one_variant(compiled: tuple[Path, dict[str, Any]]) -> None:
    texts = [(name, text.removesuffix(" num_warps=4 num_stages=3")) for name, text, _ in compiled[1]["variants"]]
    constants = "ROWS=8192 BLOCK=1024"
    assert texts[:6] == [
        ("add_kernel", f"p_x:*bf16 n:i32/16 {constants}"),
        ("add_kernel", f"p_x:*bf16 p_y:*bf16 n:i32 {constants}"),
        ("add_kernel", f"p_x:*bf16 p_y:*bf16 n:i32/16 {constants}"),
        ("add_kernel", f"p_x:*bf16 p_y:*bf16 n=1 {constants}"),
        ("add_kernel", f"p_x:*bf16! p_y:*bf16! n:i32/16 {constants}"),
        ("box_kernel", "d_x:tensordesc<bf16[64, 64]> p_y:*bf16 SIZE=64"),
    ]
    assert all(recipes == ["first", "second"] for *_, recipes in compiled[1]["variants"])


def test_resources_are_read_from_the_binaries(compiled: tuple[Path, dict[str, Any]]) -> None:
    assert compiled[1]["found"] == []
    rows = [Resources(**row) for row in compiled[1]["rows"]]
    assert len(rows) == 8
    wide = {row.variant.split(" ROWS")[0]: row.wide_loads for row in rows if row.kernel == "add_kernel"}
    assert wide["p_x:*bf16 p_y:*bf16 n:i32/16"] == "LDG"
    assert wide["p_x:*bf16! p_y:*bf16! n:i32/16"] == ""
    box, half, single = rows[5:]
    assert box.wide_loads == "UTMALDG" and box.matrix == ""
    assert half.matrix == "HGMMA" and half.wide_loads == "LDGSTS"
    assert single.matrix == "", "fp32 products have no tensor cores and need none"
    assert 8 * 1024 < box.shared_bytes < 16 * 1024 and 64 * 1024 < half.shared_bytes < 96 * 1024
    assert all(8 <= row.registers <= 255 and row.shared_limit == 232448 for row in rows)


def test_a_second_process_compiles_nothing(compiled: tuple[Path, dict[str, Any]]) -> None:
    again = kernels(compiled[0], "check")
    assert again["found"] == [] and len(again["variants"]) == 8
    if shutil.which("gcc") or shutil.which("clang"):
        from triton.backends.nvidia import driver

        assert bool(list(compiled[0].glob("*/__triton_launcher*.so"))) == hasattr(driver, "make_launcher")
        assert len(list(compiled[0].glob("*/cuda_utils*.so"))) == hasattr(driver, "compile_module_from_src")
    assert not list(compiled[0].glob("*/*.ptx"))


def test_a_cache_lists_no_file_that_was_taken_out(compiled: tuple[Path, dict[str, Any]]) -> None:
    groups = list(compiled[0].glob("*/__grp__*.json"))
    assert len(groups) == 8
    for group in groups:  # Triton 3.8 would compile again what misses one
        paths = json.loads(group.read_text())["child_paths"]
        assert {Path(name).suffix for name in paths} == {".ttir", ".cubin", ".json"}
        assert all(Path(path).is_file() for path in paths.values())


class Driver36:
    """Triton 3.6's: C from a string, and a launcher a signature."""

    def __init__(self) -> None:
        self.made: list[str] = []

    compile_module_from_src = make_launcher = staticmethod(lambda *_: None)

    def CudaUtils(self) -> None:
        self.made.append("utils")

    def CudaLauncher(self, src: object, metadata: object) -> None:
        assert (src, metadata) == ("source", "metadata")
        self.made.append("launcher")


class Driver37(Driver36):
    """Triton 3.7's: one C module, whose launch every kernel shares and asks the active driver for."""

    make_launcher = property()  # there is none

    def CudaLauncher(self, src: object, metadata: object) -> None:
        import triton

        triton.runtime.driver.active.utils.launch  # noqa: B018


class Driver38(Driver37):
    """Triton 3.8's: the same, kept in the cache under this machine's folders."""

    compile_module_from_src = property()


@pytest.mark.parametrize(
    ("driver", "made"), [(Driver36(), ["utils", "launcher"]), (Driver37(), ["utils"]), (Driver38(), [])]
)
def test_what_c_a_launch_needs_is_built_as_far_as_this_triton_has_it(
    driver: Driver36, made: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from triton.backends import nvidia
    from triton.runtime import build
    from triton.runtime import driver as active

    monkeypatch.setattr(nvidia, "driver", driver, raising=False)
    monkeypatch.setattr(build, "_load_module_from_path", build._load_module_from_path)  # both are restored behind it
    monkeypatch.setattr(knobs.nvidia, "libcuda_path", None)
    monkeypatch.setattr(active, "_active", aot_trace.StubDriver(90))
    kernel = SimpleNamespace(src="source", metadata="metadata")
    assert aot._build_launcher(kernel, str(tmp_path)) == "" and driver.made == made


def test_a_moved_cache_is_found_and_a_new_variant_is_not(compiled: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(compiled[0], moved)
    hidden = compiled[0].rename(tmp_path / "hidden")
    try:
        changed = kernels(moved, "changed")
    finally:
        hidden.rename(compiled[0])
    assert changed["found"] == ["sm_90 unused_kernel [p_x:*bf16 BLOCK=64 num_warps=4 num_stages=3]"]


def test_faults_name_kernel_and_variant(tmp_path: Path) -> None:
    result = kernels(tmp_path / "cache", "bad")
    spills, shared, broken = result["found"]
    assert "sm_90 matrix_kernel: spills" in spills and "N=256 num_warps=4" in spills
    assert "sm_90 matrix_kernel: wants" in shared and "of 232448 [" in shared and "num_stages=8]" in shared
    assert "sm_90 unused_kernel: does not compile" in broken and "power of 2" in broken and "BLOCK=63" in broken
    assert result["rows"][0]["stack_bytes"] > 0 and result["rows"][0]["local_accesses"] > 0


@pytest.mark.skipif(bool(tiles.persistent_missing()), reason=tiles.persistent_missing() or "it is there")
def test_the_persistent_convolution_compiles_and_spills_nothing(tmp_path: Path) -> None:
    result = json.loads(run("tests/kernels/persistent_kernels.py", tmp_path / "cache").stdout.splitlines()[-1])
    assert result["found"] == [] and len(result["rows"]) == 4
    for row in (Resources(**row) for row in result["rows"]):
        assert row.matrix == "HGMMA" and "UTMALDG" in row.wide_loads
        wide = "BLOCK_N=128" in row.variant  # one program a multiprocessor; the others are two
        assert row.registers <= (168 if wide else 128)
        assert row.shared_bytes <= tiles.SHARED_PER_MULTIPROCESSOR // (1 if wide else 2)


def test_what_is_a_fault() -> None:
    assert GOOD.faults() == []
    assert replace(GOOD, matrix="").faults() == []
    assert replace(GOOD, wide_loads="").faults() == []
    assert replace(GOOD, stack_bytes=8).faults() == ["spills: 8 bytes a thread, 0 local loads and stores"]
    assert replace(GOOD, local_accesses=2).faults() == ["spills: 0 bytes a thread, 2 local loads and stores"]
    assert replace(GOOD, matrix="missing").faults() == ["multiplies half-precision matrices without tensor cores"]
    assert replace(GOOD, shared_bytes=232449).faults() == ["wants 232449 bytes of shared memory of 232448"]


def test_products_that_the_assembler_removed_do_not_count() -> None:
    kept = "WARPGROUP.ARRIVE ;\n HGMMA.64x64x16.F32.BF16 R24, R120, gdesc[UR4].tnspB, RZ, !UPT ;"
    removed = "HGMMA.64x8x16.F16 RZ, gdesc[URZ], RZ, !UPT, gsb0 ;"
    assert matrix_instructions(kept) == "HGMMA" and matrix_instructions(f"{kept}\n{removed}") == ""


def test_the_table_survives_writing(tmp_path: Path) -> None:
    rows = [replace(GOOD, kernel="m", shared_bytes=1024), replace(GOOD, variant="C=128"), GOOD]
    write_table(tmp_path / "table.csv", rows)
    assert read_table(tmp_path / "table.csv") == [rows[1], rows[2], rows[0]]
    lines = format_table(rows).splitlines()
    assert lines[1].split() == ["90", "k", "2", "198", "0", "64", "227", "HGMMA", "2", "of", "2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipes", "digit"], "no such recipe (did you mean 'digits'?)"),
        (["--archs", "70"], "--archs 70: expected some of 80, "),
        (["--check", "no-such-folder"], "--check no-such-folder: no such folder"),
        (["--arch", "90"], "--archs"),
        (["--jobs", "-1"], "--jobs: got -1, expected 0 (all processors) or a positive number"),
        (["--recipes", "digits", "--cache", __file__], "cannot be written"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["aot", *arguments])
    with pytest.raises(UserError) as mistake:
        aot.main()
    assert message in str(mistake.value) and "\n" not in str(mistake.value)


def test_interpreted_kernels_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["aot", "--list", "--cache", str(tmp_path)])
    monkeypatch.setattr(launch, "INTERPRETED", True)
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))  # restored behind the command, which sets it
    with pytest.raises(UserError, match=r"^TRITON_INTERPRET is set: "):
        aot.main()


def test_the_committed_table_is_of_the_kernels_as_they_are(tmp_path: Path) -> None:
    listed = run("-m", "ensdistill.aot", "--cache", tmp_path, "--recipes", RECIPE, "--list").stdout.splitlines()[1:]
    table = read_table(ROOT / "kernels/resources_sm90.csv")
    assert {f"{row.kernel} [{row.variant}]" for row in table} == {line.rpartition("]")[0] + "]" for line in listed}
    assert [fault for row in table for fault in row.faults()] == []
    assert len(table) <= 250, "what CI compiles should take minutes"


@pytest.mark.skipif(not shutil.which("cmake"), reason="no cmake on this machine")
def test_cmake_compiles_the_kernels(tmp_path: Path) -> None:
    options = ["-DENSDISTILL_ARCHS=80;90", "-DENSDISTILL_AOT_RECIPES=digits", f"-DPYTHON_EXECUTABLE={sys.executable}"]
    configure = ["cmake", "-S", ROOT, "-B", tmp_path / "build", "-G", "Unix Makefiles", *options]
    subprocess.run(configure, check=True, capture_output=True)
    plan = ["cmake", "--build", tmp_path / "build", "--target", "aot", "--", "--dry-run"]
    done = subprocess.run(plan, check=True, capture_output=True, text=True).stdout
    (line,) = [line for line in done.splitlines() if "-m ensdistill.aot" in line]
    assert "--unset=TRITON_INTERPRET" in line and sys.executable in line
    assert f"--archs 80 90 --cache {tmp_path / 'build'}/aot/cache --tiles default --recipes digits" in line


@pytest.mark.gpu
def test_a_gpu_finds_what_was_compiled_without_it(tmp_path: Path) -> None:
    arch = 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
    compiled = kernels(tmp_path, "good", arch, CUDA_VISIBLE_DEVICES="")
    launched = kernels(tmp_path, "launch", arch)
    assert launched["variants"] == compiled["variants"] and launched["found"] == []


def test_a_builder_that_a_recipe_s_file_names_is_not_called(tmp_path, monkeypatch):
    path, victim = tmp_path / "config.json", tmp_path / "victim"
    arguments = json.dumps({"path": str(victim)})
    write_config(path, replace(find_recipe("digits"), network="os:mkdir", network_args=arguments))
    for more in ([], ["--builder", "os:listdir"]):
        monkeypatch.setattr("sys.argv", ["aot", "--list", "--recipes", str(path), *more])
        with pytest.raises(UserError, match=r"names the builder os:mkdir, .*; give --builder os:mkdir as well"):
            aot.main()
    assert not victim.exists()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{half",
        '{"child_paths": 3}',
        '{"child_paths": {"../x": "y"}}',
        "[" * 100_000,
        '{"child_paths": {"x": 1}}',
    ],
)
def test_a_damaged_list_of_the_cache_is_deleted(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knobs.cache, "dir", "elsewhere")
    whole, damaged = tmp_path / "a" / "__grp__k.json", tmp_path / "b" / "__grp__k.json"
    for path, text in ((whole, '{"child_paths": {"k.cubin": "/old/k.cubin"}}'), (damaged, content)):
        path.parent.mkdir()
        path.write_text(text)
        (path.parent / "k.cubin").write_text("x")
    with pytest.warns(UserWarning, match="b/__grp__k.json: no list of a kernel's files"):
        aot.use_cache(tmp_path)
    assert not damaged.exists()
    assert json.loads(whole.read_text()) == {"child_paths": {"k.cubin": str(tmp_path / "a" / "k.cubin")}}
