"""What Longhaul is and needs. Metadata only; tool settings live in pyproject.toml."""

from setuptools import find_packages, setup

PACKAGES = ("planner", "parallel", "memory", "trainer", "launch")

setup(
    name="longhaul",
    version="0.1.0",
    description="Trains language models on long, unequal sequences; every step runs from a plan.",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=[pattern for name in PACKAGES for pattern in (name, f"{name}.*")]),
    package_data={
        **{name: ["py.typed"] for name in PACKAGES},
        "memory": ["py.typed", "native/*.cpp"],
        "planner": [
            "py.typed", "inputs/hardware/*.yaml", "inputs/models/*.yaml", "replay/curves/*.yaml",
            "reproduce/data/*.yaml",
        ],
        "trainer": ["py.typed", "settings/recipes/*.yaml"],
    },
    zip_safe=False,
    install_requires=[
        "torch>=2.11,<2.16",
        "megatron-core>=0.16,<0.20",
        # From 0.18 on, megatron-core (Python 3.12 and newer) imports triton without naming it as a requirement.
        'triton>=3; platform_system == "Linux" and python_version >= "3.12"',
        'megatron-core<0.18; platform_system != "Linux"',
        "pulp>=3.3,<5",
        "highspy>=1.10,<2",
        "numpy>=1.26,<3",
        "nvidia-ml-py>=12",
        "tyro>=0.9,<2",
        "PyYAML>=6,<7",
        "rich>=13,<16",
        "safetensors>=0.5,<1",
        "tokenizers>=0.21,<1",
    ],
    extras_require={
        "dev": [
            "hypothesis>=6.100,<7",
            "mypy>=1.13,<3",
            "pytest>=8.2,<10",
            "pytest-timeout>=2.3,<3",
            "pytest-xdist>=3.6,<4",
            "ruff>=0.12,<0.18",
            "types-PyYAML>=6",
        ],
        "packing": ["ortools>=9.10,<10"],
        "report": ["plotly>=5.24,<8"],
    },
    entry_points={"console_scripts": ["longhaul = launch.cli:main"]},
)
