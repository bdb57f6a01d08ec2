"""Builds the two binaries through ninja and leaves everything else to pyproject.toml.

peftkern/_kernels.abi3.so  every op's C++ and CUDA on PyTorch's stable ABI: one file for every torch >= 2.10 and Python.
peftkern/_host.*.so        pybind11: build information and pure host functions.

Without a C++ compiler, or without an importable torch, the package installs all the same and runs on Triton and the
reference; `peftkern doctor` says so. Environment:
  PEFTKERN_CUDA_ARCHS   semicolon list, default "80;86;89;90a;100;120+PTX"; empty builds no CUDA
  MAX_JOBS              ninja jobs, default one per core
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from fnmatch import fnmatch
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
LONGEST_SOURCE = "gemm_r256.cu"  # to compile
KERNELS = "peftkern/_kernels.abi3.so"
HOST = "peftkern/_host" + sysconfig.get_config_var("EXT_SUFFIX")
DEFAULT_ARCHS = "80;86;89;90a;100;120+PTX"
# Kernels on instructions that only one architecture has: compiled for it, and chosen on it, alone.
SOURCE_ARCHS = {
    "bottleneck/hopper.cu": ["90a"],
    "gemm/gemm_group_r*.cu": ["90a"],
    "gemm/gemm_r*.cu": ["90a"],
    "nf4/mid_m.cu": ["90a"],
    "nf4/tile.cu": ["90a"],
}
STABLE_ABI_TARGET = "0x020a000000000000"  # torch 2.10
WARNINGS = "-Wall -Wextra -Wno-unused-parameter -Wno-maybe-uninitialized"
# Codes and values are promised bitwise, so the compiler must not fuse products into sums.
CXXFLAGS = f"-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=off {WARNINGS}"


def torch_root() -> Path | None:
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def nvcc_path() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [str(Path(home) / "bin" / "nvcc") for home in homes if home]
    return next((c for c in candidates if os.access(c, os.X_OK)), None) or shutil.which("nvcc")


def gencode_flags(archs: list[str]) -> list[str]:
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def source_archs(source: Path, archs: list[str]) -> list[str]:
    name = source.relative_to(CSRC).as_posix()
    return next((own for pattern, own in SOURCE_ARCHS.items() if fnmatch(name, pattern)), archs)


def ninja_file(torch: Path, cxx: str, nvcc: str | None, archs: list[str]) -> str:
    """The whole build as one ninja file; paths are absolute, objects land beside it."""
    import pybind11

    includes = f"-I{CSRC} -isystem {torch / 'include'}"
    python_includes = f"-I{sysconfig.get_paths()['include']} -isystem {pybind11.get_include()}"
    archs = archs if nvcc else []
    defines = f'-DTORCH_TARGET_VERSION={STABLE_ABI_TARGET} -DPEFTKERN_CUDA_ARCHS=\\"{",".join(archs)}\\"'
    lines = [
        "ninja_required_version = 1.5",
        "rule cxx",
        f"  command = {cxx} -MMD -MF $out.d {CXXFLAGS} {defines} $includes -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = c++ $in",
        "rule link",
        f"  command = {cxx} -shared -o $out $in $libs",
        "  description = link $out",
    ]
    kernel_sources = sorted(CSRC.glob("*/*.cpp"))
    kernel_sources = [s for s in kernel_sources if s.parent.name != "host"]
    if archs:
        # What takes longest goes first, or one core compiles it at the end while the others wait.
        cuda_sources = sorted(CSRC.glob("*/*.cu"))
        kernel_sources = sorted(cuda_sources, key=lambda s: s.name != LONGEST_SOURCE) + kernel_sources
        nvcc_flags = "-std=c++17 -O3 --expt-relaxed-constexpr -Xcompiler -fPIC,-fvisibility=hidden -DUSE_CUDA"
        lines += [
            "rule nvcc",
            f"  command = {nvcc} -MMD -MF $out.d {nvcc_flags} {defines} $archs $includes -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = nvcc $in",
        ]
    kernel_objects = []
    for source in kernel_sources:
        rule = "nvcc" if source.suffix == ".cu" else "cxx"
        object_file = f"{source.parent.name}.{source.name}.o"
        lines += [f"build {object_file}: {rule} {source}", f"  includes = {includes}"]
        if rule == "nvcc":
            flags = gencode_flags(source_archs(source, archs))
            lines.append(f"  archs = {' '.join(flags)}")
        kernel_objects.append(object_file)
    host_objects = []
    for source in sorted((CSRC / "host").glob("*.cpp")):
        object_file = f"host.{source.name}.o"
        lines += [f"build {object_file}: cxx {source}", f"  includes = {includes} {python_includes}"]
        host_objects.append(object_file)
    # --no-as-needed: the stable ABI's shims live in libtorch_cpu, which nothing references by symbol at link time.
    torch_libs = f"-Wl,--no-as-needed -L{torch / 'lib'} -ltorch_cpu -ltorch"
    kernel_libs = torch_libs
    if archs:
        kernel_libs += f" -L{Path(nvcc).resolve().parents[1] / 'lib64'} -lcudart_static -ldl -lrt -lpthread"
    lines += [f"build {Path(KERNELS).name}: link {' '.join(kernel_objects)}", f"  libs = {kernel_libs}"]
    lines += [f"build {Path(HOST).name}: link {' '.join(host_objects)}", f"  libs = {torch_libs}"]
    return "\n".join(lines) + "\n"


class NinjaBuild(build_ext):
    """Runs ninja once for both binaries and copies them to where setuptools wants them."""

    def run(self) -> None:
        torch, cxx = torch_root(), os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
        if torch is None or cxx is None:
            missing = "torch is not importable (use --no-build-isolation)" if torch is None else "no C++ compiler"
            print(f"peftkern: {missing}: installing without compiled kernels", file=sys.stderr)
            return
        tools = [name for name in ("ninja", "pybind11") if importlib.util.find_spec(name) is None]
        if tools:
            raise SystemExit(f"peftkern: the build needs {' and '.join(tools)}; pip install {' '.join(tools)}")
        archs = [a for a in os.environ.get("PEFTKERN_CUDA_ARCHS", DEFAULT_ARCHS).split(";") if a]
        build = ROOT / "build" / f"ninja-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        text = ninja_file(torch, cxx, nvcc_path(), archs)
        path = build / "build.ninja"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
        jobs = [f"-j{os.environ['MAX_JOBS']}"] if os.environ.get("MAX_JOBS") else []
        subprocess.run([sys.executable, "-m", "ninja", "--quiet", "-C", str(build), *jobs], check=True)
        for target in (KERNELS, HOST):
            destination = ROOT / target if self.inplace else Path(self.build_lib) / target
            destination.parent.mkdir(parents=True, exist_ok=True)
            # Replace, never overwrite: a running process may have the old library mapped.
            temporary = destination.with_suffix(".tmp")
            shutil.copyfile(build / Path(target).name, temporary)
            os.replace(temporary, destination)

    def get_ext_filename(self, fullname: str) -> str:
        return KERNELS if fullname.endswith("_kernels") else HOST

    def get_outputs(self) -> list[str]:
        return [str(p) for t in (KERNELS, HOST) if (p := Path(self.build_lib) / t).exists()]


sources = [str(p.relative_to(ROOT)) for p in sorted(CSRC.glob("*/*.c*"))]
setup(
    ext_modules=[Extension("peftkern._kernels", sources), Extension("peftkern._host", [])],
    cmdclass={"build_ext": NinjaBuild},
)
