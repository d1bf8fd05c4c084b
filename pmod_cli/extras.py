"""Packages that only some commands need: imported for real before the work, with one line where that fails.

Whether a package is on the disk says little: its import may still raise, because of a version that does not fit or of
another package of its name. So every command that needs one imports it here first, and ``pmod doctor`` does the same.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

from pmod_cli import bounds
from pmod_cli.output.errors import BrokenPackageError, MissingExtraError, PmodError


@dataclass(frozen=True)
class Package:
    """A package as pmod uses it.

    Attributes:
        name: What pip calls it.
        modules: What pmod imports of it, the top-level module first.
        extra: The extra of pmod-cli that brings it; None if pmod-cli itself does.
        exercise: Called after the imports: does what its users do later, where they would import more.
        mend: Called where it is broken: a better remedy than to install it again, or None.
    """

    name: str
    modules: tuple[str, ...]
    extra: str | None = None
    exercise: Callable[[], None] | None = None
    mend: Callable[[], str | None] | None = None

    @property
    def root(self) -> str:
        """The top-level module."""
        return self.modules[0]


def _lock_files() -> None:
    """What lmms-eval does first in every evaluation, and where it imports filelock's inside."""
    from lmms_eval import evaluator

    prepare = getattr(evaluator, "_enable_reentrant_filelocks", None)  # 0.7.3 has it; private, so it may go
    if prepare is not None:
        prepare()


OPTIONAL = {
    package.root: package
    for package in (
        Package(
            "lmms-eval",
            ("lmms_eval", "lmms_eval.evaluator", "lmms_eval.models", "lmms_eval.tasks"),
            "eval",
            exercise=_lock_files,
        ),
        # More than the package itself: a folder of its name that is empty can be imported, too.
        Package("datasets", ("datasets", "datasets.config", "datasets.exceptions"), "eval"),
        Package("fvcore", ("fvcore", "fvcore.nn"), "profile"),
        Package("peft", ("peft", "peft.peft_model"), "train"),
        # The writer that transformers takes is torch's.
        Package(
            "tensorboard",
            ("tensorboard", "tensorboard.summary.writer.event_file_writer", "torch.utils.tensorboard"),
            "train",
        ),
        Package("matplotlib", ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"), "plot"),
    )
}
"""By top-level module."""


def require(root: str, extra: str | None = None) -> None:
    """Import an optional package for real; what it prints goes to stderr.

    Args:
        root: Its top-level module, e.g. ``lmms_eval``.
        extra: The extra to name, where more than one brings it.

    Raises:
        MissingExtraError: It is not installed.
        BrokenPackageError: It is installed, and its import fails.
    """
    package = OPTIONAL[root]
    import_for_real(package, extra or package.extra)


def require_if_installed(*roots: str) -> None:
    """Import those of some optional packages that are there, because a library will do so unasked.

    Raises:
        BrokenPackageError: The import of one fails.
    """
    for root in roots:
        if installed(root):
            require(root)


def installed(root: str) -> bool:
    """Whether there is a module of that name; a folder that merely has it is none."""
    try:
        spec = importlib.util.find_spec(root)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None


def import_for_real(package: Package, extra: str | None = None) -> None:
    """Import all that pmod uses of a package.

    Args:
        package: The package.
        extra: The extra of pmod-cli that the user is told to install; pmod-cli alone if None.

    Raises:
        MissingExtraError: It is not installed.
        BrokenPackageError: It is installed, and its import fails, whatever it raises.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            for module in package.modules:
                importlib.import_module(module)
            if package.exercise is not None:
                package.exercise()
    except (Exception, SystemExit) as error:
        if not installed(package.root):
            raise MissingExtraError(package.name, extra) from None
        raise BrokenPackageError(
            installed_name(package), reason(error), import_remedy(package, extra, error)
        ) from error


@contextlib.contextmanager
def starting(command: str) -> Iterator[None]:
    """Around the imports of a command: what is broken among pmod's own requirements is one line as well.

    Args:
        command: The verb.

    Raises:
        PmodError: An import within failed.
    """
    try:
        yield
    except PmodError:
        raise
    except (Exception, SystemExit) as error:
        raise PmodError(
            f"pmod {command} cannot start: {reason(error)}", "pmod doctor says what is broken"
        ) from error


def installed_name(package: Package) -> str:
    """Name and version of a package, as far as its metadata is there."""
    try:
        return f"{package.name} {version(package.name)}"
    except PackageNotFoundError:
        return package.name


def reason(error: BaseException) -> str:
    """What an import raised, in one line: of a chain of errors the one that began it."""
    while error.__cause__ is not None:
        error = error.__cause__
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:300]}" if words else type(error).__name__


def import_remedy(package: Package, extra: str | None = None, error: BaseException | None = None) -> str:
    """What really helps: reinstalling a package does not, if something else is in its way.

    Args:
        package: Whose import failed.
        extra: The extra of pmod-cli to name; the package's own by default.
        error: What the import raised, if it came to that.
    """
    extra = extra or package.extra
    found = hiding(package)
    if found is not None:
        return f"{found} is imported in its place: rename it"
    if package.mend is not None and (better := package.mend()):
        return better
    if unfit := bounds.outside((extra,)):
        return f"{unfit[0]}: {unfit[0].remedy}"
    while error is not None and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] != package.root:
        return bounds.install_command(extra, upgrade=True)
    return f"pip install --force-reinstall --no-deps '{bounds.requirement_of(package.name)}'"


def hiding(package: Package) -> Path | None:
    """The folder or file that is imported instead of the installed package, if there is one."""
    spec = importlib.util.find_spec(package.root)
    if spec is None or spec.origin is None:
        return None
    origin = Path(spec.origin)
    place = origin.parent if origin.name == "__init__.py" else origin
    try:
        own = Path(str(distribution(package.name).locate_file(place.name)))
    except PackageNotFoundError:
        return place
    # An editable installation has no folder there, and hides nothing.
    return place if own.exists() and own.resolve() != place.resolve() else None
