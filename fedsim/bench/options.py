"""What `fedsim bench` is asked to measure."""

from __future__ import annotations

from dataclasses import dataclass

from fedsim.errors import ConfigError, unknown

SECTIONS = ("engines", "chunks", "simulator", "runs", "control", "memory")
"""In the order in which they run."""

_CARD_SECTIONS = ("engines", "chunks")


@dataclass(frozen=True)
class Options:
    """See `fedsim bench --help`.

    Attributes:
        size: ``quick`` (seconds; no target is judged), ``default`` or ``full``.
        sections: some of `SECTIONS`; empty: all (on a card only those that use it).
        threads: of torch's products.
    """

    torch_device: str = "cpu"
    size: str = "default"
    sections: tuple[str, ...] = ()
    threads: int = 1

    def __post_init__(self) -> None:
        """Raises ConfigError: a value that is not allowed."""
        for section in self.sections:
            if section not in SECTIONS:
                raise ConfigError(f"--only: {unknown('section', section, SECTIONS)}")
        if self.threads < 1:
            raise ConfigError(f"--threads: value {self.threads} is not allowed (at least 1)")

    @property
    def is_quick(self) -> bool:
        """Smallest sizes: that everything works, not how fast it is."""
        return self.size == "quick"

    @property
    def is_full(self) -> bool:
        """More cases, more repetitions."""
        return self.size == "full"

    @property
    def asked(self) -> tuple[str, ...]:
        """Sections to measure, in order."""
        wanted = self.sections or (_CARD_SECTIONS if self.torch_device == "cuda" else SECTIONS)
        return tuple(section for section in SECTIONS if section in wanted)

    def repeats(self, fewer: bool = False) -> int:
        """Turns of a comparison."""
        if self.is_quick:
            return 2
        return (3 if fewer else 5) * (3 if self.is_full else 1)
