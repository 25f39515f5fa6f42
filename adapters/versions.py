"""Which frameworks are installed, and which versions the adapters know."""

from __future__ import annotations

from importlib import metadata

from packaging.specifiers import SpecifierSet

from tamoe.topology.errors import InputError

# Distribution, versions that were read and tried, what is steered.
FRAMEWORKS: dict[str, tuple[str, str, str]] = {
    "transformers": (
        "transformers",
        ">=4.57,<6",
        "Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek-V2 and -V3, gpt-oss, and routers like them",
    ),
    "deepspeed": ("deepspeed", ">=0.16,<0.20", "TopKGate of deepspeed.moe.layer.MoE"),
    "megatron": ("megatron-core", ">=0.16,<0.20", "TopKRouter"),
    "torchtitan": ("torchtitan", ">=0.3,<0.4", "TokenChoiceTopKRouter"),
    "fastmoe": ("fastmoe", ">=1", "a gate class for FMoE(gate=...), by its contract"),
}


def installed(distribution: str) -> str | None:
    """Version of a distribution, None where it is absent.

    >>> installed("no-such-distribution") is None
    True
    """
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def require(framework: str) -> str:
    """The version of a framework that is installed.

    Raises
    ------
    InputError
        It is absent, or a version that the adapter does not know.
    """
    distribution, known, _ = FRAMEWORKS[framework]
    version = installed(distribution)
    if version is None:
        raise InputError(
            f"{framework} is not installed; allowed: {distribution}{known}. "
            f"pip install '{distribution}{known}'"
        )
    if not SpecifierSet(known).contains(version, prereleases=True):
        raise InputError(
            f"{framework} is {version}; allowed: {known}, which is what the adapter was tried with"
        )
    return version
