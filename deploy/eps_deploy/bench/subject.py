"""What `eps-bench` times: any model file, as something that can be called with a batch size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from eps_compact.interleaving import Block
from eps_train.errors import EpsError


class BenchError(EpsError):
    """A file that cannot be timed, or files that cannot be compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What must be alike for two latencies to be compared.

    Attributes:
        input: type and shape of one image, as in `uint8 [3, 32, 32]`.
        output: as in `float32 [10]`.
        precision: what its layers compute in, as in `fp32`.
        runtime: with its version.
        provider: what runs it.
        threads: on the processor; None for what runs on a GPU.
    """

    input: str
    output: str
    precision: str
    runtime: str
    provider: str
    threads: int | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Subject(Protocol):
    """A loaded model.

    Attributes:
        name: its file, as the user named it.
        facts: see :class:`Facts`.
        batches: smallest and largest batch that it takes; None: no limit of its own.
        remark: what a reader of its times must know; None when there is nothing.
        gpu: number of the CUDA device that it runs on, None for none.
    """

    @property
    def name(self) -> str: ...

    @property
    def facts(self) -> Facts: ...

    @property
    def batches(self) -> tuple[int, int | None]: ...

    @property
    def remark(self) -> str | None: ...

    @property
    def gpu(self) -> int | None: ...

    def call(self, batch: int) -> Callable[[], object]:
        """A call that computes one batch, made-up images in, results in memory out.

        Raises BenchError when it fails, for want of memory for instance.
        """

    def on_device(self, batch: int) -> Block | None:
        """The same, timed by the device's own events; None when it cannot tell."""

    def end_to_end(self, batch: int) -> Callable[[], object] | None:
        """From a picture's bytes to a label, `batch` times; None when no picture is known."""

    def close(self) -> None: ...


def differences(subjects: list[Subject]) -> dict[str, list[str]]:
    """In what the subjects differ: the name of a fact, and what each of them has there."""
    each = [subject.facts.to_dict() for subject in subjects]
    return {
        name: [str(facts[name]) for facts in each]
        for name in each[0]
        if len({facts[name] for facts in each}) > 1
    }


def refuse_unlike(subjects: list[Subject]) -> None:
    """Raise BenchError, in one line, unless all that matters is alike."""
    for other in subjects[1:]:
        unlike = differences([subjects[0], other])
        if unlike:
            told = "; ".join(f"{name} {a} and {b}" for name, (a, b) in unlike.items())
            raise BenchError(
                f"{subjects[0].name} and {other.name} are unlike: {told};"
                " add --allow-unlike to compare them all the same"
            )


def refuse_batch(subject: Subject, batch: int) -> None:
    """Raise BenchError for a batch that the model does not take."""
    smallest, largest = subject.batches
    if batch < smallest or (largest is not None and batch > largest):
        takes = f"exactly {smallest}" if smallest == largest else f"{smallest} to {largest}"
        raise BenchError(f"{subject.name}: takes batches of {takes} images, not {batch}")
