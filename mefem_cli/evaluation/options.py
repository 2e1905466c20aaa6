"""The options of the probing protocol."""

from __future__ import annotations

from dataclasses import dataclass, field

from mefem_cli.errors import UsageError
from mefem_cli.evaluation import labels


@dataclass(frozen=True)
class ProbeOptions:
    """The protocol."""

    store: list[str] = field(default_factory=list)  # feature store; given twice or more, the first is compared with
    # the others; default: the pipe, else features.h5
    head: str = "default"  # attentive, mlp, linear, knn, several with commas, or all; default: linear and mlp, and
    # attentive where patches are stored
    features: str | None = None  # patches, cls, mean, patches+cls or cls+mean; default: patches for attentive, else cls
    kind: str | None = None  # regression or classification; default: text or few whole numbers are classes
    group: str | None = None  # label that says who is who; default: subject or patient
    folds: int | str = 5  # how many folds, each person in one; or a table with the column fold and one of path, id or
    # a label such as subject
    split: str | None = None  # label with the data set's own split: train, val (options are chosen on it), test; or
    # whole numbers, which are folds
    leave_out: str | None = None  # test on each value of this label in turn, learning from the others, such as site
    train_store: list[str] = field(default_factory=list)  # learn from this store and test on --test-store; several
    # pairs are compared
    test_store: list[str] = field(default_factory=list)  # another data set's features of the same encoder
    repeats: int = 1  # repeat all with as many seeds: other folds, other first values; scores are means
    fraction: str | None = None  # also learn from these shares of the training people, such as 0.01,0.1,1
    aggregate: str | None = None  # average the predictions for all photos with one value of this label: subject
    by: list[str] = field(default_factory=list)  # also scores for each value of this label (quarters of a number)
    bootstraps: int = 2000  # bootstrap samples of groups behind each 95 % interval
    permute: int = 0  # permutation test: as many times, fit all anew on labels shuffled between people
    max_memory: float | None = None  # GiB of patch features to hold; where there are more, each batch is read from the
    # store; default: half of the free memory
    device: str = "auto"  # where attentive and mlp heads are trained: auto, cpu, cuda, cuda:N or mps

    def __post_init__(self) -> None:
        for name, least in (("folds", 2), ("bootstraps", 100), ("repeats", 1), ("permute", 0)):
            value = getattr(self, name)
            if isinstance(value, int) and value < least:
                raise UsageError(f"--{name} {value}: wanted a whole number from {least}")
        if self.max_memory is not None and not self.max_memory >= 0:
            raise UsageError(f"--max-memory {self.max_memory}: wanted GiB, a number from 0")
        if self.kind is not None and self.kind not in labels.KINDS:
            raise UsageError(f"--kind {self.kind}: wanted {' or '.join(labels.KINDS)}")
        self._refuse_two_splits()
        self.fractions  # noqa: B018 (parsing checks it)

    def _refuse_two_splits(self) -> None:
        given = {
            "--split": self.split,
            "--folds FILE": isinstance(self.folds, str),
            "--leave-out": self.leave_out,
            "--test-store": self.test_store,
        }
        names = [name for name, value in given.items() if value]
        if len(names) > 1:
            raise UsageError(f"{names[0]} and {names[1]} both say who is tested on; leave one out")
        if len(self.train_store) != len(self.test_store):
            raise UsageError("--train-store and --test-store come in pairs; give each as often as the other")
        if self.train_store and self.store:
            raise UsageError("--store and --train-store both say what to learn from; leave one out")

    @property
    def fractions(self) -> tuple[float, ...]:
        """The shares of training people to learn from, ascending; empty without `--fraction`."""
        if self.fraction is None:
            return ()
        try:
            values = sorted({float(word) for word in self.fraction.split(",")})
        except ValueError:
            values = [0.0]
        if not 0 < values[0] <= values[-1] <= 1:
            raise UsageError(f"--fraction {self.fraction}: wanted numbers above 0 and up to 1, such as 0.01,0.1,1")
        return tuple(values)
