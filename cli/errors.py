"""The one error handler of every entry point.

A mistake of the user ends in one sentence, `error: ...`, and exit status 1; argparse ends a wrong
command line with status 2. A traceback is for bugs: it is shown with `--debug` or TOKCOM_DEBUG=1.
"""

import contextlib
import contextvars
import os
import re
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires


def wants_traceback(debug: bool = False) -> bool:
    """Whether tracebacks were asked for, by `--debug` or by the environment."""
    return debug or os.environ.get("TOKCOM_DEBUG", "0") not in ("", "0")


def _explain_os_error(error: OSError) -> str:
    if error.filename is None or error.errno is None:
        return str(error)  # raised by us or by a library, with a sentence of its own
    if isinstance(error, FileNotFoundError):
        return f"{error.filename} does not exist."
    return f"{error.filename} cannot be used: {error.strerror}."


def missing_package(module: str) -> str:
    """What to do about a package that is not installed: the extra of tokcom that brings it, or its
    name."""
    package = {"yaml": "PyYAML"}.get(module, module.partition(".")[0]).replace("_", "-")
    try:
        lines = requires("tokcom") or []
    except PackageNotFoundError:  # remote code of a clone
        lines = []
    for line in lines:
        found = re.match(r"([\w.-]+).*extra == ['\"](\w+)['\"]", line)
        if found and found[1].lower() == package.lower():
            return f"pip install 'tokcom[{found[2]}]', or {package} alone"
    return f"pip install {package}"


def explain(error: Exception) -> str:
    """What went wrong, in words for the person at the keyboard."""
    # imported here, because --help must not wait for it
    from huggingface_hub.errors import StrictDataclassError

    from tokcom.training.stopping import TrainingError, TrainingStopped

    if isinstance(error, OSError):
        return _explain_os_error(error)
    if isinstance(error, ModuleNotFoundError) and not (error.name or "tokcom").startswith("tokcom"):
        return f"this command needs {error.name}, which is not installed: {missing_package(error.name)}"
    if isinstance(error, StrictDataclassError):
        return str(error.__cause__ or error)  # without the name of the validator
    if isinstance(error, ValueError | TrainingError | TrainingStopped):
        return str(error)
    if type(error).__name__ == "OutOfMemoryError":  # of torch, which need not be imported for it
        return "the device has no memory left for this; use a smaller batch, a shorter text, or --device cpu."
    if isinstance(error, MemoryError):
        return "there is no memory left for this; use a smaller batch or a shorter text."
    reason = (str(error).strip() or "no message").splitlines()[0]
    return f"unexpected {type(error).__name__}: {reason} (--debug shows where)"


def _one_sentence(message: Warning | str, *where: object, **more: object) -> str:
    """A warning without the line of our code that raised it."""
    return f"warning: {message}\n"


_passes_through = contextvars.ContextVar("tracebacks were asked for", default=False)


@contextlib.contextmanager
def report_errors(debug: bool = False) -> Iterator[None]:
    """End the process with one sentence and status 1 if the body fails.

    With `debug` or TOKCOM_DEBUG=1 the exception passes through and shows its traceback, also
    through the handler of another entry point that the body calls. Also a decorator,
    `@report_errors()`, of every `main`.
    """
    debug = debug or _passes_through.get()
    before = _passes_through.set(debug)
    formatted = warnings.formatwarning
    if not wants_traceback(debug):
        warnings.formatwarning = _one_sentence
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)  # 128 + SIGINT, as shells count
    except BrokenPipeError:
        # whoever read our output has left, as `head` does; Python would complain again when it
        # closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if wants_traceback(debug):
            raise
        sys.exit(f"error: {explain(error)}")
    finally:
        warnings.formatwarning = formatted
        _passes_through.reset(before)
