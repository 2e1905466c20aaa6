"""The options that say where work runs."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from mefem_cli.errors import NoInputError, UsageError

LOCAL, RAY = "local", "ray"


@dataclass(frozen=True)
class OnOptions:
    """Where it runs."""

    on: str = "local"  # local: this machine; ray: the Ray cluster that it belongs to, else one of this machine alone;
    # ray://HOST:PORT: a cluster by its client port; ray:HOST:PORT: by its address

    def __post_init__(self) -> None:
        if self.on not in (LOCAL, RAY) and not self.on.startswith(f"{RAY}:"):
            raise UsageError(f"--on {self.on}: wanted local, ray, ray://HOST:PORT or ray:HOST:PORT")

    @property
    def is_local(self) -> bool:
        """Whether all runs on this machine, without Ray."""
        return self.on == LOCAL

    def require_ray(self) -> None:
        """Raise NoInputError where Ray is asked for and not installed."""
        if not self.is_local and find_spec(RAY) is None:
            raise NoInputError(f'--on {self.on} wants the package ray; type pip install "mefem-cli[ray]"')


@dataclass(frozen=True)
class PartsOptions:
    """In parts on a cluster."""

    on: str = "local"  # local: this process; ray: the Ray cluster that this machine belongs to, else one of this
    # machine alone; ray://HOST:PORT: a cluster by its client port; ray:HOST:PORT: by its address
    parts: int | None = None  # with --on ray: cut the work into so many; default: one for each machine of the cluster

    def __post_init__(self) -> None:
        if self.where.is_local and self.parts is not None:
            raise UsageError(f"--parts {self.parts}: is for a cluster; add --on ray")
        if self.parts is not None and self.parts < 1:
            raise UsageError(f"--parts {self.parts}: wanted 1 or more")

    @property
    def where(self) -> OnOptions:
        """Where it runs."""
        return OnOptions(self.on)
