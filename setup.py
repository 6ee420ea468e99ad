"""Everything but the mapping of folders to packages is in pyproject.toml."""

from setuptools import find_packages, setup

# Device code and benchmarks live beside the package in the checkout and inside it when installed: `kernels` is also the name
# of a package that transformers looks for, so it must never be a top-level one. Of bench/ the wheel has what `tfkern bench`
# runs; the folders in it (static, gpu, reference, suite) are for a checkout.
setup(
    packages=[*find_packages(include=["tfkern", "tfkern.*"]), "tfkern.kernels", "tfkern.kernels.hopper", "tfkern.bench"],
    py_modules=["tfkern_command"],
    package_dir={"tfkern.kernels": "kernels", "tfkern.bench": "bench"},
    package_data={"tfkern.bench": ["*.c"]},
)
