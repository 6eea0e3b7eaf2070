"""Packaging that pyproject.toml cannot express: the compiled kernels, the shipped tasks/, the entry points.

Environment variables of the build:
    LEAML_NATIVE=0          build nothing; the package runs on its eager reference kernels
    LEAML_CUDA=auto|0|1     the CUDA kernels: where a toolkit is found (default), never, or fail without one
    TORCH_CUDA_ARCH_LIST    CUDA architectures, default "8.0;9.0;10.0+PTX"
    LEAML_SANITIZE=1        CPU kernels with address and undefined-behaviour sanitizers (tests)

Nothing asks whether a GPU is present. Without a compiler the build warns and goes on.
"""

import glob
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

from setuptools import Distribution, find_packages, setup

from distutils.command.install_data import install_data  # isort: skip  (setuptools brings it)

HERE = Path(__file__).parent.resolve()
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "leaml_plugin" / "__init__.py").read_text()).group(1)

TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # the stable ABI of torch 2.11: loads there and later
NUMERIC_FLAGS = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]  # the same bits on every vector width
# nvcc contracts multiply and add by default, in one kernel and not in the next; memory is what the kernels wait for
NVCC_FLAGS = ["-O3", "-std=c++20", "-fmad=false"]


def find_cuda_home():
    """The real folder of a CUDA toolkit, or None. Wrappers on PATH and pip's fragments do not count."""
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates += sorted(glob.glob("/usr/local/cuda-*"), reverse=True)
    nvcc = shutil.which("nvcc")
    if nvcc:
        candidates.append(str(Path(nvcc).resolve().parent.parent))
    for candidate in candidates:
        if candidate and all((Path(candidate) / part).exists() for part in ("bin/nvcc", "include/cuda_runtime.h")):
            return str(Path(candidate).resolve())
    return None


def wants_cuda():
    """The toolkit to build with, or None."""
    choice = os.environ.get("LEAML_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        sys.exit(f"LEAML_CUDA: wanted auto, 0 or 1, got {choice!r}")
    home = None if choice == "0" else find_cuda_home()
    if choice == "1" and home is None:
        sys.exit("LEAML_CUDA=1, but no CUDA toolkit was found; set CUDA_HOME to its folder")
    return home


def native_build():
    """``(ext_modules, cmdclass)``; empty where nothing can be compiled, with the reason."""
    if os.environ.get("LEAML_NATIVE", "1") == "0":
        return [], {}
    compiler = shutil.which(os.environ.get("CXX", "c++").split()[0]) or shutil.which("g++")
    if compiler is None:
        warnings.warn("no C++ compiler: leaml_plugin will run on its slower reference kernels", stacklevel=2)
        return [], {}
    cuda_home = wants_cuda()
    if cuda_home:
        os.environ["CUDA_HOME"] = cuda_home  # before torch looks for one
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        warnings.warn("no torch at build time: leaml_plugin will run on its slower reference kernels", stacklevel=2)
        return [], {}
    headers = glob.glob("csrc/*.h") + glob.glob("csrc/*.cuh")

    flags = ["-O3", "-std=c++20", "-fopenmp-simd", "-fvisibility=hidden", "-Wall", "-Wno-psabi", "-g0", *NUMERIC_FLAGS]
    link = ["-Wl,--as-needed"]
    if os.environ.get("LEAML_SANITIZE") == "1":
        # resolvers of cloned functions run before the sanitizer is up, so there is one instruction set
        sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
        flags += [*sanitize, "-g", "-DLEAML_NO_CLONES"]
        link += sanitize
    modules = [
        cpp_extension.CppExtension(
            "leaml_plugin._C",
            ["csrc/ops_cpu.cpp", "csrc/cpu_kernels.cpp"],
            depends=headers,
            extra_compile_args={"cxx": [TORCH_TARGET, *flags]},
            extra_link_args=link,
            py_limited_api=True,
        )
    ]
    if torch.version.cuda and cuda_home:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX")
        modules.append(
            cpp_extension.CUDAExtension(
                "leaml_plugin._C_cuda",
                ["csrc/ops_cuda.cu"],
                depends=headers,
                extra_compile_args={
                    "cxx": [TORCH_TARGET, "-DUSE_CUDA", "-O3", "-std=c++20"],
                    "nvcc": [TORCH_TARGET, "-DUSE_CUDA", *NVCC_FLAGS, "--threads=2", "-Xfatbin=-compress-all"],
                },
                extra_link_args=["-Wl,--as-needed"],
                py_limited_api=True,
            )
        )
    elif os.environ.get("LEAML_CUDA") == "1":
        sys.exit("LEAML_CUDA=1, but this torch was built without CUDA")
    try:
        import pybind11
        from setuptools import Extension

        native = Extension(
            "leaml_plugin._native",
            ["csrc/native.cpp"],
            include_dirs=[pybind11.get_include()],
            extra_compile_args={"cxx": ["-O3", "-std=c++20", "-fvisibility=hidden", "-g0"]},
            language="c++",
        )
        modules.append(native)
    except ImportError:
        warnings.warn("no pybind11 at build time: `leaml doctor` will not name the processor's features", stacklevel=2)

    class Build(cpp_extension.BuildExtension):
        """torch's ninja build, kept between installs, and optional as a whole unless a part was asked for."""

        def finalize_options(self):
            super().finalize_options()
            # editable installs use a fresh temporary folder each time, which would compile everything anew
            self.build_temp = str(HERE / "build" / "native")

        def build_extension(self, ext):
            try:
                super().build_extension(ext)
            except (RuntimeError, OSError, subprocess.CalledProcessError, self._compile_errors()) as error:
                if os.environ.get("LEAML_CUDA") == "1" and ext.name.endswith("_C_cuda"):
                    raise
                warnings.warn(f"{ext.name} was not built, its reference kernels stay: {error}", stacklevel=2)
                ext.optional = True
                self.failed = [*getattr(self, "failed", []), ext.name]

        @staticmethod
        def _compile_errors():
            from setuptools.errors import BaseError

            return BaseError

        def copy_extensions_to_source(self):
            failed = getattr(self, "failed", [])
            self.extensions = [ext for ext in self.extensions if ext.name not in failed]
            super().copy_extensions_to_source()

    return modules, {"build_ext": Build.with_options(use_ninja=shutil.which("ninja") is not None)}


class StartUpHook(install_data):
    """Puts the ``.pth`` file beside the package, in wheels and in editable installs alike; "data" go elsewhere."""

    def finalize_options(self):
        super().finalize_options()
        self.install_dir = self.get_finalized_command("install").install_lib


class WithData(Distribution):
    def has_data(self):
        """What editable installs ask for; the other commands ask for ``has_data_files``."""
        return self.has_data_files()


EXT_MODULES, CMDCLASS = native_build()

setup(
    distclass=WithData,
    version=VERSION,
    packages=[
        *find_packages(include=["leaml_plugin", "leaml_plugin.*"]),
        "leaml_plugin.tasks",
        "leaml_plugin.tasks.endoscopy",
        "leaml_plugin.tasks.sports",
    ],
    package_dir={"leaml_plugin.tasks": "tasks"},
    package_data={"leaml_plugin": ["**/*"], "leaml_plugin.tasks": ["**/*"]},
    ext_modules=EXT_MODULES,
    cmdclass={**CMDCLASS, "install_data": StartUpHook},
    py_modules=["leaml_plugin_startup"],
    data_files=[("", ["leaml_plugin_startup.pth"])],
    entry_points={
        "console_scripts": ["leaml = leaml_plugin.cli:main"],
        "lmms_eval.models": ["leaml = leaml_plugin.lmms.entry:register"],
    },
)
