"""Find out whether torch_gcu is installed, can be imported and finds cards, and which generation it is.

Two libraries of that name exist. The older (T20 cards, torch 1.10) is lazy and has no ``torch.gcu``; the newer
(S60, torch 2.10) is eager. The functions called here are those of Enflame's packages.
"""

from __future__ import annotations

import importlib
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgglab.devices import AUTOLOAD, DeviceOptions
from vgglab.errors import UserError

if TYPE_CHECKING:
    from vgglab.devices.base import Device

TF32_VARIABLE = "ENFLAME_ENABLE_TF32"  # read by the lazy generation only
VISIBLE_CARDS_VARIABLE = "TOPS_VISIBLE_DEVICES"
DOCTOR_HINT = "python -m vgglab.doctor shows what to fix"


def why_unavailable(kind: str, options: DeviceOptions) -> str | None:
    """Return why ``--device auto`` cannot use a GCU card: None if it can, "" if torch_gcu is not installed.

    Raises UserError if torch_gcu is installed but broken.
    """
    if not is_installed():
        return ""
    return None if count_cards(load(options)) else why_no_cards()


def open_adapter(kind: str, options: DeviceOptions) -> Device:
    """Return the adapter for the installed torch_gcu. Raises UserError if it is missing, broken or finds no card."""
    torch_gcu = load(options)
    if count_cards(torch_gcu) == 0:
        raise UserError(f"--device gcu: {why_no_cards()}")
    if card_api(torch_gcu) is torch_gcu:  # lazy
        from vgglab.devices.gcu_lazy import LazyGcu

        tf32 = os.environ.get(TF32_VARIABLE) == "true"
        if options.tf32 and not tf32:
            raise UserError(f"--tf32: torch_gcu is already loaded; set {TF32_VARIABLE}=true before starting Python")
        return LazyGcu(options, torch_gcu, tf32)
    from vgglab.devices.gcu_eager import EagerGcu

    return EagerGcu(options, torch_gcu)


def is_installed() -> bool:
    return "torch_gcu" in sys.modules or find_spec("torch_gcu") is not None


def load(options: DeviceOptions) -> Any:
    """Import and return torch_gcu; if it is lazy, set its TF32 variable first. Raises UserError if that fails."""
    if not is_installed():
        raise UserError(
            f"--device gcu: torch_gcu is not installed for {sys.executable}; "
            "install Enflame's wheel, or use --device gcu-sim, a simulated card"
        )
    if _is_lazy_on_disk():
        _set_tf32_variable(options.tf32)
    try:
        # `import torch` may have done this already, but the lazy generation has no autoload, and a parent process
        # that has loaded the eager one turns autoload off for its children. Import before a TensorBoard writer
        # is created: the import sets driver flags that must be set by then.
        torch_gcu = importlib.import_module("torch_gcu")
    except (Exception, SystemExit) as error:  # a broken installation can raise almost any exception
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"--device gcu: torch_gcu cannot be loaded ({reason}); {DOCTOR_HINT}") from None
    # Loader workers use CPU tensors only, so they should not load the card's library. (The import itself
    # may have set the variable to 0 already; a process that needs a card imports torch_gcu as above.)
    os.environ[AUTOLOAD] = "0"
    return torch_gcu


def _is_lazy_on_disk() -> bool:
    """Whether the installed torch_gcu is lazy, without importing it: only the lazy generation has ``core/``."""
    spec = find_spec("torch_gcu") if "torch_gcu" not in sys.modules else sys.modules["torch_gcu"].__spec__
    return any(Path(folder, "core").is_dir() for folder in (spec and spec.submodule_search_locations) or ())


def _set_tf32_variable(tf32: bool | None) -> None:
    """Set the environment variable for TF32: it must be set before the import and must not change afterwards.

    The flag overrides the variable; without either, TF32 is off, as in the original example.
    """
    if tf32 is None:
        tf32 = os.environ.get(TF32_VARIABLE, "").lower() in ("true", "1")
    value = str(tf32).lower()  # torch_gcu expects lower case
    if "torch_gcu" in sys.modules and os.environ.get(TF32_VARIABLE) != value:
        raise UserError(f"--tf32: torch_gcu is already loaded; set {TF32_VARIABLE}={value} before starting Python")
    os.environ[TF32_VARIABLE] = value


def card_api(torch_gcu: Any) -> Any:
    """Return the module with the functions for cards: torch_gcu itself if it is lazy, torch.gcu if it is eager.

    Raises:
        UserError: the imported library is neither.
    """
    import torch

    if hasattr(torch_gcu, "JitRunMode"):
        return torch_gcu
    if hasattr(torch, "gcu"):
        return torch.gcu
    raise UserError(f"--device gcu: unknown generation of torch_gcu; {DOCTOR_HINT}")


def count_cards(torch_gcu: Any) -> int:
    """Return the number of cards, 0 without a driver."""
    api = card_api(torch_gcu)
    return api.device_count() if api.is_available() else 0


def why_no_cards() -> str:
    """Return the error message for a torch_gcu that is installed but finds no card."""
    visible = os.environ.get(VISIBLE_CARDS_VARIABLE)
    cards = [card.strip() for card in (visible or "").split(",")]
    if visible is not None and len(set(cards)) < len(cards):
        return f"{VISIBLE_CARDS_VARIABLE}={visible} names a card twice, so torch_gcu finds none; name each card once"
    if visible is not None and (visible.strip() == "" or cards[0].startswith("-")):
        return f"{VISIBLE_CARDS_VARIABLE}={visible} hides every card; unset it, or name at least one card"
    return f"torch_gcu finds no card: check the driver, and that LD_LIBRARY_PATH contains /opt/tops/lib; {DOCTOR_HINT}"
