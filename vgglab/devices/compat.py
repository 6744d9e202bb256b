"""Bridge the differences between torch 1.10 (the vendor's old stack) and current versions; avoid slow imports."""

from __future__ import annotations

import contextlib
import inspect
import os
import pickle
import sys
import warnings
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

# The files of torch that define the wrappers around optimizer methods.
WRAPPERS = (os.path.join("torch", "_compile.py"), os.path.join("torch", "optim", "optimizer.py"))


def without_compiler(optimizer: type[Optimizer]) -> Callable[..., Optimizer]:
    """Return the optimizer class in a form that does not import torch's compiler, which takes seconds.

    torch (2.15) wraps some methods to exclude them from compiled networks; on the first call the wrappers import the
    whole compiler. This function unwraps the methods, except those that a card's library has replaced.
    """
    unwrapped = {}
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict", "step"):
        method = getattr(optimizer, name)
        original = inspect.unwrap(method, stop=_is_not_torch_wrapper)
        if original is not method:
            unwrapped[name] = torch.no_grad()(original) if name == "step" else original  # like the wrapper
    return type(optimizer.__name__, (optimizer,), unwrapped) if unwrapped else optimizer


def _is_not_torch_wrapper(wrapper: Any) -> bool:
    return not (inspect.isfunction(wrapper) and wrapper.__code__.co_filename.endswith(WRAPPERS))


def parallel_without_compiler(network: nn.Module, **options: Any) -> DistributedDataParallel:
    """Wrap a network that is not compiled in ``DistributedDataParallel``, without importing the compiler.

    torch (2.15) imports the compiler in two places: in the constructor, to read one compiler setting (this function
    supplies the default), and in a wrapper around ``_inside_ddp_forward``, the context manager for each forward pass
    (this function removes the wrapper).
    """
    context = getattr(getattr(DistributedDataParallel, "_inside_ddp_forward", None), "__wrapped__", None)
    overrides: dict[str, Any] = {}
    if context is not None:
        unwrapped = inspect.unwrap(context, stop=_is_not_torch_wrapper)
        overrides["_inside_ddp_forward"] = contextlib.contextmanager(unwrapped)
    unwrapped_class = type("DistributedDataParallel", (DistributedDataParallel,), overrides)
    if "torch._dynamo" in sys.modules or "_dynamo" not in getattr(torch, "_lazy_modules", ()):
        return unwrapped_class(network, **options)
    default: Any = SimpleNamespace(utils=SimpleNamespace(get_optimize_ddp_mode=lambda: "ddp_optimizer"))
    torch._dynamo = default
    try:
        return unwrapped_class(network, **options)
    finally:
        del torch._dynamo


DOS_DIRECTORY_BIT = 0x10  # the folder bit in the attributes of a zip entry


def describe_damage(file: Path) -> str:
    """Return what is damaged in a file written by ``torch.save``, or ""; ``torch.load`` does not check for this."""
    try:
        if not zipfile.is_zipfile(file):  # another format, or incomplete: torch reports which
            return ""
        with zipfile.ZipFile(file) as archive:
            damaged_entry = archive.testzip()
            # torch reads no data from an entry marked as a folder: the weights would be uninitialised memory.
            folders = [entry.filename for entry in archive.infolist() if entry.external_attr & DOS_DIRECTORY_BIT]
    # RuntimeError: a damaged bit marks an entry as encrypted.
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError) as error:
        return str(error)
    if folders:
        return f"{folders[0]} is marked as a folder"
    return f"the checksum of {damaged_entry} does not match" if damaged_entry else ""


class NotACheckpoint(ValueError):
    """The file is not a checkpoint, is truncated, or contains more than tensors and plain values."""


def load_tensors(path: str | Path) -> Any:
    """Load a file that ``torch.save`` wrote, onto the CPU and without executing code from it.

    Raises:
        OSError: the file cannot be read.
        NotACheckpoint: it is damaged, or contains anything but tensors, numbers, strings, lists and dicts.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about foreign files; the caller reports what matters
            if "weights_only" in inspect.signature(torch.load).parameters:  # torch >= 1.13
                return torch.load(path, map_location="cpu", weights_only=True)
            _reject_torchscript(path)
            return torch.load(path, map_location="cpu", pickle_module=_PlainPickle)
    except OSError:
        raise
    except Exception as error:  # a damaged zip or pickle can raise almost any exception
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise NotACheckpoint(first_line) from None


def _reject_torchscript(path: str | Path) -> None:
    """Refuse TorchScript archives: torch 1.10 passes them to torch.jit.load, which runs the code in them."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        parts = {part for name in archive.namelist() for part in name.split("/")}
    if parts & {"constants.pkl", "code"}:
        raise NotACheckpoint("a TorchScript archive, which contains code")


class _PlainUnpickler(pickle.Unpickler):
    """An unpickler for tensors and plain containers; it refuses every other global."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
            return getattr(torch._utils, name)
        if module == "torch" and (name.endswith("Storage") or name == "Size"):
            return getattr(torch, name)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise pickle.UnpicklingError(f"{module}.{name} is not a tensor or a plain value")


class _PlainPickle:
    """The names that torch.load needs from its ``pickle_module``."""

    Unpickler = _PlainUnpickler

    @staticmethod
    def load(file: Any, **options: Any) -> Any:
        return _PlainUnpickler(file, **options).load()
