"""Optional packages: imported for real before the work, with a one-line error where that fails; and their versions.

That a package is on the disk says little: its import may still raise, because a version does not fit or another module
has its name. So every command that needs one imports it here first, and ``pmod doctor`` does the same.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path
from traceback import walk_tb
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple

from pmod_cli.output.errors import BrokenPackageError, MissingExtraError, PmodError, variables_in
from pmod_cli.output.versions import version_of

if TYPE_CHECKING:
    from packaging.requirements import Requirement

EXTRAS = ("eval", "profile", "train", "plot", "kernels", "smolvlm", "video", "serve")
"""Those that a user installs; the others are sums of them, or for development."""


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
    """Do what lmms-eval does first in every evaluation: there it imports a private module of filelock."""
    from lmms_eval import evaluator

    prepare = getattr(evaluator, "_enable_reentrant_filelocks", None)  # 0.7.3 has it; private, so it may go
    if prepare is not None:
        prepare()


def _settings_file() -> str | None:
    """What mends an import of matplotlib where a file of the user's stands in its way."""
    found = Path("matplotlibrc").exists()
    return "correct or rename the working folder's matplotlibrc, which it reads" if found else None


_LMMS_EVAL = ("lmms_eval", "lmms_eval.evaluator", "lmms_eval.models", "lmms_eval.tasks")
# More than the package itself: a folder of its name that is empty can be imported, too.
_DATASETS = ("datasets", "datasets.config", "datasets.exceptions")
# The writer that transformers takes is torch's.
_TENSORBOARD = ("tensorboard", "tensorboard.summary.writer.event_file_writer", "torch.utils.tensorboard")
_MATPLOTLIB = ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg")

OPTIONAL = {
    package.root: package
    for package in (
        Package("lmms-eval", _LMMS_EVAL, "eval", exercise=_lock_files),
        Package("datasets", _DATASETS, "eval"),
        Package("fvcore", ("fvcore", "fvcore.nn"), "profile"),
        Package("peft", ("peft", "peft.peft_model"), "train"),
        Package("tensorboard", _TENSORBOARD, "train"),
        Package("matplotlib", _MATPLOTLIB, "plot", mend=_settings_file),
        Package("liger-kernel", ("liger_kernel", "liger_kernel.transformers"), "kernels"),
        Package("num2words", ("num2words",), "smolvlm"),
        Package("av", ("av",), "video"),
        Package("fastapi", ("fastapi", "fastapi.middleware.cors"), "serve"),
        Package("uvicorn", ("uvicorn", "uvicorn.server"), "serve"),
        Package("openai", ("openai", "openai.types.chat"), "serve"),
    )
}
"""By top-level module."""


def require(root: str, extra: str | None = None) -> None:
    """Import an optional package by its top-level module; see `import_for_real`."""
    import_for_real(OPTIONAL[root], extra)


def require_if_installed(*roots: str) -> None:
    """Import those of the packages that are installed, because a library will do so unasked."""
    for root in roots:
        if installed(root):
            require(root)


def installed(root: str) -> bool:
    """Whether there is a module of that name; a mere folder of that name does not count."""
    try:
        spec = importlib.util.find_spec(root)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None


def import_for_real(package: Package, extra: str | None = None) -> None:
    """Import all that pmod uses of a package; what it prints goes to stderr.

    Args:
        package: The package.
        extra: The extra of pmod-cli that the user is told to install; the package's own by default.

    Raises:
        MissingExtraError: It is not installed.
        BrokenPackageError: It is installed, but its import raises, whatever that is.
    """
    extra = extra or package.extra
    try:
        with contextlib.redirect_stdout(sys.stderr):
            for module in package.modules:
                importlib.import_module(module)
            if package.exercise is not None:
                package.exercise()
    except (Exception, SystemExit) as error:
        if not installed(package.root):
            raise MissingExtraError(package.name, extra) from None
        name = " ".join(filter(None, (package.name, version_of(package.name))))
        why = reason(error)
        raise BrokenPackageError(name, why, import_remedy(package, extra, why, error)) from error


@contextlib.contextmanager
def starting(command: str) -> Iterator[None]:
    """Around the imports of a command: a broken requirement of pmod itself is a one-line error, too."""
    _refuse_unfit_process()
    try:
        yield
    except PmodError:
        raise
    except (Exception, SystemExit) as error:
        # A library imports some packages unasked: which one is at fault is told as where pmod asks for it.
        passed = {part for frame, _ in walk_tb(_first_cause(error).__traceback__) for part in _parts(frame)}
        for package in OPTIONAL.values():
            if package.root in passed:
                import_for_real(package)
        why = reason(error)
        hint = variables_in(why) or "pmod doctor says what is broken"
        raise PmodError(f"pmod {command} cannot start: {why}", hint) from error


def _parts(frame: FrameType) -> tuple[str, ...]:
    return Path(frame.f_code.co_filename).parts


def _refuse_unfit_process() -> None:
    """Refuse what libraries would end the program over, or with words that say nothing."""
    if sys.flags.optimize > 1:
        raise PmodError(
            "transformers needs docstrings, which Python drops here", "unset PYTHONOPTIMIZE, no -OO"
        )
    os.umask(mask := os.umask(0o077))
    if mask & 0o700:
        raise PmodError(f"umask {mask:03o} takes from you what is written", "umask 022 is usual")
    for name, value in os.environ.items():
        if _ALLOCATOR.fullmatch(name) and not _ALLOCATOR_SETTINGS.fullmatch(value):  # torch would abort
            raise PmodError(f"{name}={value} in the environment is not KEY:VALUE,...", "correct or unset it")


_ALLOCATOR = re.compile("PYTORCH_((CUDA|HIP)_)?ALLOC_CONF")
_ALLOCATOR_SETTINGS = re.compile(r"(\s*\w+\s*:\s*(\[[^]]*\]|[^][:,]+)(,|$))*")


def reason(error: BaseException) -> str:
    """What an import raised, in one line; in a chain of errors, the first."""
    error = _first_cause(error)
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:300]}" if words else type(error).__name__


def _first_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def import_remedy(
    package: Package, extra: str | None, why: str = "", error: BaseException | None = None
) -> str:
    """What mends a failed import, by its `reason`. To install again does not, if something else is in the way."""
    if better := variables_in(why):
        return better
    if (other := _hiding(package)) is not None:
        return f"{other} is imported in its place: rename it"
    if package.mend is not None and (better := package.mend()):
        return better
    if unfit := outside((extra,)):
        return f"{unfit[0].name} {unfit[0].installed} is installed, {unfit[0].wanted} is wanted: {unfit[0].remedy}"
    cause = _first_cause(error) if error else None
    if isinstance(cause, ModuleNotFoundError) and (cause.name or "").split(".")[0] != package.root:
        return install_command(extra, upgrade=True)
    return f"pip install --force-reinstall --no-deps '{requirement_of(package.name)}'"


def _hiding(package: Package) -> Path | None:
    """What is imported in the place of the installed package, if there is one."""
    spec = importlib.util.find_spec(package.root)
    if spec is None or spec.origin is None:
        return None
    origin = Path(spec.origin)
    path = origin.parent if origin.name == "__init__.py" else origin
    try:
        own = Path(str(distribution(package.name).locate_file(path.name)))
    except PackageNotFoundError:
        return path
    # An editable installation has no folder there, and hides nothing.
    return path if own.exists() and own.resolve() != path.resolve() else None


class Outside(NamedTuple):
    """An installed package whose version is not one that pmod-cli declares, e.g. ``<4,>=3.20``, and what mends it."""

    name: str
    installed: str
    wanted: str
    remedy: str


def install_command(extra: str | None, *, upgrade: bool = False) -> str:
    """The command that installs pmod-cli with one of its extras, or alone if None."""
    target = f"'pmod-cli[{extra}]'" if extra else "pmod-cli"
    return f"pip install {'--upgrade ' if upgrade else ''}{target}"


def outside(extras: Sequence[str | None] = EXTRAS) -> list[Outside]:
    """Installed packages whose versions are not those that pmod-cli and its extras declare; in order of the metadata.

    There are none in a source tree, which has no metadata.
    """
    found: dict[str, Outside] = {}
    for extra, requirement in _declared(extras):
        name, wanted = requirement.name, requirement.specifier
        number = version_of(name)
        if number and not wanted.contains(number, prereleases=True):
            found.setdefault(name, Outside(name, number, str(wanted), install_command(extra, upgrade=True)))
    return list(found.values())


def requirement_of(name: str) -> str:
    """How pmod-cli asks for a package, e.g. ``lmms-eval<0.8,>=0.7.3``; its name alone if it does not."""
    asked = (
        f"{name}{requirement.specifier}" for _, requirement in _declared(EXTRAS) if requirement.name == name
    )
    return next(asked, name)


def _declared(extras: Sequence[str | None]) -> Iterator[tuple[str | None, Requirement]]:
    """The requirements that hold on this machine, each with the extra that brings it, None for pmod-cli itself."""
    try:
        from packaging.requirements import Requirement

        lines = requires("pmod-cli") or []
    except (ImportError, PackageNotFoundError):  # a broken environment, which other checks report
        return
    for line in lines:
        requirement = Requirement(line)
        marker = requirement.marker
        for extra in dict.fromkeys((None, *extras)):
            if marker is None or marker.evaluate({"extra": extra or ""}):
                yield extra, requirement
                break
