"""The part of the build that pyproject.toml cannot say: the Cython kernels.

`-O3` without `-march=native`: a wheel built here must run on every x86-64 or arm64 machine.
Never `-ffast-math`: NaN means "unknown height" and must stay NaN. `-ffp-contract=off`: a product and a sum
rounded at once where a machine can, and twice where not, would let results depend on the machine.
"""

import os
from pathlib import Path

import numpy as np
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_py import build_py

KERNELS = Path("geopose_dist/kernels")

# GEOPOSE_SANITIZE=address,undefined builds the kernels under the sanitizers (see CONTRIBUTING.md).
sanitize = os.environ.get("GEOPOSE_SANITIZE", "")
flags = ["-O1", "-g", f"-fsanitize={sanitize}", "-fno-omit-frame-pointer"] if sanitize else ["-O3"]
flags += ["-ffp-contract=off"]
link = [f"-fsanitize={sanitize}"] if sanitize else []

extensions = [
    Extension(
        f"geopose_dist.kernels.{path.stem}",
        [str(path)],
        include_dirs=[np.get_include()],
        define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION")],
        extra_compile_args=flags,
        extra_link_args=link,
    )
    for path in sorted(KERNELS.glob("_*.pyx"))
]


class BuildWithRecipes(build_py):
    """Put the recipes of `configs/` into the package, so that `--config smoke` works from a wheel."""

    def run(self) -> None:
        """Copy the package, then the recipes."""
        super().run()
        if self.editable_mode:
            return  # a checkout's own configs/ is found by geopose_dist.config
        for source in sorted(Path("configs").rglob("*.yaml")):
            target = Path(self.build_lib) / "geopose_dist" / source
            self.mkpath(str(target.parent))
            self.copy_file(str(source), str(target))


setup(
    ext_modules=cythonize(
        extensions,
        language_level=3,
        compiler_directives={
            "boundscheck": bool(sanitize),
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": False,
        },
    ),
    cmdclass={"build_py": BuildWithRecipes},
    options={"build_ext": {"parallel": os.cpu_count()}},
)
